"""Folders as people have them: links, no permission, hidden files, several folders."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from strata.errors import ConfigError, FaultKind
from strata.preprocess.datasets.folder import find_folder
from strata.preprocess.datasets.listing import list_files, name_of, path_of, read_lines, some_of
from tests.unit.preprocess.datasets.test_folder import put

AS_NOBODY = """
import os, sys
from strata.errors import exit_with_one_line
from strata.preprocess.command import main
if os.geteuid() == 0:
    os.seteuid(65534)
with exit_with_one_line():
    main(sys.argv[1:])
"""


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own may not be entered by others."""
    folder = Path(tempfile.mkdtemp(prefix="strata-test-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def as_nobody(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, run by a user who is not root."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
    )


def labels(*folders: Path) -> dict[str, str]:
    (only,) = find_folder(folders)
    return {s.name: only.classes[s.label] for s in only.sources if s.fault is None}


def test_a_linked_class_folder_is_a_class(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    put(videos / "run" / "a.mp4", b"a")
    put(videos / "walk" / "c.mp4", b"c")
    put(tmp_path / "elsewhere" / "b.mp4", b"b")
    (videos / "sit").symlink_to(tmp_path / "elsewhere")
    assert labels(videos) == {"run/a.mp4": "run", "sit/b.mp4": "sit", "walk/c.mp4": "walk"}
    (only,) = find_folder([videos])
    assert only.notes == ()


def test_linked_files_are_videos_and_broken_ones_absent(tmp_path: Path) -> None:
    put(tmp_path / "videos" / "run" / "a.mp4", b"a")
    put(tmp_path / "other.bin", b"b")
    (tmp_path / "videos" / "run" / "b.mp4").symlink_to(tmp_path / "other.bin")
    (tmp_path / "videos" / "run" / "c.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (only,) = find_folder([tmp_path / "videos"])
    assert [(s.name, s.path is None) for s in only.sources] == [
        ("run/a.mp4", False),
        ("run/b.mp4", False),
        ("run/c.mp4", True),
    ]


@pytest.mark.parametrize("target", ["nowhere", "walk"], ids=["missing", "itself"])
def test_a_class_link_that_leads_nowhere_is_an_error(tmp_path: Path, target: str) -> None:
    put(tmp_path / "run" / "a.mp4", b"a")
    (tmp_path / "walk").symlink_to(target)
    with pytest.raises(ConfigError, match=rf"walk cannot be read \(it is a link to {target}: "):
        find_folder([tmp_path])


def test_loops_of_links_end_with_a_note(tmp_path: Path) -> None:
    put(tmp_path / "run" / "a.mp4", b"a")
    put(tmp_path / "walk" / "b.mp4", b"b")
    (tmp_path / "run" / "up").symlink_to("..")
    (tmp_path / "run" / "to_walk").symlink_to("../walk")
    (tmp_path / "walk" / "to_run").symlink_to("../run")
    assert labels(tmp_path) == {"run/a.mp4": "run", "walk/b.mp4": "walk"}
    (only,) = find_folder([tmp_path])
    assert only.notes == (
        "3 links lead to folders that are read under another name and are not followed: "
        "run/to_walk -> walk, run/up -> ., walk/to_run -> run",
    )


def test_one_folder_under_two_class_names_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "run" / "a.mp4", b"a")
    (tmp_path / "jog").symlink_to("run")
    with pytest.raises(ConfigError, match=r"jog and run in .* are one folder under two names"):
        find_folder([tmp_path])


def test_what_cannot_be_read_is_an_error_before_anything_is_written(open_tmp: Path) -> None:
    videos, out = open_tmp / "videos", open_tmp / "out"
    for name in ("run/a.mp4", "sit/b.mp4", "walk/c.mp4"):
        put(videos / name, name.encode())
    out.mkdir()
    out.chmod(0o777)
    argv = ("folder", "--videos", videos, "--out", out / "shards")
    for path, message in (
        (videos / "sit", "sit cannot be read (Permission denied)"),
        (videos / "sit" / "b.mp4", "b.mp4 cannot be read (no permission to read it)"),
    ):
        mode = path.stat().st_mode
        path.chmod(0)
        done = as_nobody(*argv)
        path.chmod(mode)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not list(out.iterdir())
    # The folder that holds everything, and one of lists.
    videos.chmod(0)
    done = as_nobody(*argv)
    videos.chmod(0o755)
    assert (done.returncode, "videos cannot be read" in done.stderr) == (2, True), done.stderr
    (open_tmp / "lists").mkdir(mode=0)
    for kind in ("ucf101", "hmdb51", "kinetics400"):
        done = as_nobody(kind, *argv[1:], "--splits", open_tmp / "lists")
        assert (done.returncode, "lists" in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 1
    # A folder that can be listed and not entered.
    (videos / "sit").chmod(0o744)
    done = as_nobody(*argv)
    assert (done.returncode, "b.mp4 cannot be read" in done.stderr) == (2, True), done.stderr


def test_hidden_and_system_files_are_never_data(tmp_path: Path) -> None:
    put(tmp_path / "run" / "a.mp4", b"a")
    for name in (
        "._run/b.mp4",
        "__MACOSX/run/._a.mp4",
        ".hidden/c.mp4",
        "run/._a.mp4",
        "run/.DS_Store",
        "run/Thumbs.db",
        "run/desktop.ini",
        "lost+found/d.mp4",
    ):
        put(tmp_path / name, b"a")
    assert labels(tmp_path) == {"run/a.mp4": "run"}
    (only,) = find_folder([tmp_path])
    assert only.notes[0].startswith("8 hidden or system files and folders are ignored: ")


def test_pipes_and_files_without_a_videos_name_are_noted(tmp_path: Path) -> None:
    put(tmp_path / "run" / "a.mp4", b"a")
    put(tmp_path / "run" / "all.zip", b"a")
    put(tmp_path / "run" / "noextension", b"a")
    os.mkfifo(tmp_path / "run" / "pipe")
    (only,) = find_folder([tmp_path])
    assert only.notes == (
        "1 are pipes, devices or no paths: run/pipe",
        "2 files are not videos by their names: run/all.zip, run/noextension",
    )


def test_several_folders_are_one_set(tmp_path: Path) -> None:
    for name in ("one/run/a.mp4", "one/run/b.mp4", "two/run/c.mp4", "two/walk/d.mp4"):
        put(tmp_path / name, name.encode())
    for folder in ("one", "two"):
        put(tmp_path / folder / "run" / "same.mp4", b"same")
        put(tmp_path / folder / "run" / "differs.mp4", folder.encode())
    (only,) = find_folder([tmp_path / "one", tmp_path / "two"])
    assert only.classes == ("run", "walk")
    assert [(s.name, s.label) for s in only.sources] == [
        ("run/a.mp4", 0),
        ("run/b.mp4", 0),
        ("run/c.mp4", 0),
        ("run/differs.mp4", 0),
        ("run/same.mp4", 0),
        ("walk/d.mp4", 1),
    ]
    assert only.notes == (
        "1 videos are in several folders with the same bytes, and kept once: run/same.mp4",
    )
    ((fault, detail),) = [s.fault for s in only.sources if s.fault]
    assert fault == FaultKind.CONFLICT
    assert "one/run/differs.mp4 and" in detail


def test_folders_inside_each_other_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "run" / "a.mp4", b"a")
    for folders in ([tmp_path, tmp_path], [tmp_path, tmp_path / "run"]):
        with pytest.raises(ConfigError, match="are one folder, or one is inside the other"):
            list_files(folders)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\xef\xbb\xbfa 1\r\n\r\n  b 2 \n", ["a 1", "b 2"]),
        ("a\u2028b 1\x0c\nc".encode(), ["a\u2028b 1", "c"]),
        ("é 1\n".encode("utf-16"), ["é 1"]),
        (b"caf\xe9 1\r", ["caf\udce9 1"]),
        (b"", []),
    ],
    ids=["mark, CRLF, blank", "odd separators in names", "UTF-16", "Latin-1", "empty"],
)
def test_lists_of_any_editor(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    assert read_lines(tmp_path / "list.txt") == lines


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"PK\x03\x04\0\0")
    with pytest.raises(ConfigError, match=r"list .*it is not text\); correct --splits"):
        read_lines(tmp_path / "list.txt")


def test_names_keep_their_bytes_and_can_be_shown() -> None:
    name = name_of(os.fsdecode(b"caf\xe9\nx.mp4"))
    assert name == "caf\udce9\nx.mp4"
    assert os.fsencode(path_of(name)) == b"caf\xe9\nx.mp4"
    assert some_of([name, "b"], 1) == r"caf\udce9\nx.mp4, ..."
