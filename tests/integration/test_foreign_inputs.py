"""Folders of tars as other people have them, through `index`, the loader and the check."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest

from strata.dataload.decode_windows import read_windows
from strata.dataload.reader import ShardReader
from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.preprocess.audit import check_folder
from strata.preprocess.command import main
from tests.support.source_videos import moving_scene, write_video
from tests.unit.preprocess.datasets.test_listing import as_nobody, open_tmp
from tests.unit.preprocess.test_existing_tars import write_tar

__all__ = ["open_tmp"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    return write_video(path, moving_scene(20, 64, 48), codec="libx264").read_bytes()


def index(folder: Path, *options: str | Path) -> None:
    main(["index", str(folder), "--min-frames", "1", "--workers", "1", *map(str, options)])


def frames_of(folder: Path) -> list[np.ndarray]:
    """The first frame of every sample, as training reads it."""
    reader = ShardReader(folder, check="hash")
    windows = read_windows(reader, range(reader.num_samples), [np.arange(1)] * reader.num_samples)
    reader.close()
    assert isinstance(windows.coded, list)
    return windows.coded


def test_keys_with_dots_and_spaces(tmp_path: Path, clip: bytes) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    names = ("vid.0", "Mr. Bean 3.5", "caf\udce9.1")
    members = {f"{n}.{ext}": c for n in names for ext, c in (("cls", b"0"), ("mp4", clip))}
    write_tar(folder / "0.tar", members, kind=tarfile.GNU_FORMAT)
    index(folder)
    rows = read_manifest(folder).written
    assert [row.source for row in rows] == [f"0.tar/{name}" for name in names]
    assert [row.key for row in rows] == ["vid.0", "Mr.%20Bean%203.5", "caf%E9.1"]
    assert len(frames_of(folder)) == 3
    assert check_folder(folder, decode=-1) == []


def test_notes_and_samples_without_a_label_are_printed(
    tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.flv"
    write_video(path, moving_scene(30, 96, 64), codec="libx264", options={"bf": "0"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [p for p in source.demux(video=0) if p.size][:25]:
            if packet.pts != 800:
                packet.stream = stream
                target.mux(packet)
    folder = tmp_path / "theirs"
    folder.mkdir()
    lossy = (tmp_path / "b.mkv").read_bytes()
    write_tar(folder / "0.tar", {"a.cls": b"0", "a.mkv": lossy, "b.mp4": clip})
    index(folder)
    text = capsys.readouterr().out
    assert "written with a note: 1\n    0.tar/a: frames missing by the timestamps: 1, first" in text
    assert "note: 1 samples have no label: 0.tar/b" in text


def test_hidden_tars_and_members_are_not_read(
    tmp_path: Path, clip: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    members = {"._v.mp4": b"junk", "v.mp4": clip, "._w.mp4": b"junk", "w.mp4": clip}
    write_tar(folder / "0.tar", members)
    (folder / "._0.tar").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "empty.tar").write_bytes(bytes(10240))
    index(folder)
    text = capsys.readouterr().out
    assert "2 members are hidden, of an operating system, or without an extension" in text
    assert "0.tar/._v.mp4" in text
    assert "1 tars hold no sample: empty.tar" in text
    assert read_manifest(folder).num_samples == 2
    assert check_folder(folder, decode=-1) == []


def test_several_tars_with_the_same_keys(tmp_path: Path, clip: bytes) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for k in range(2):
        write_tar(folder / f"{k}.tar", {"v.mp4": clip, "v.json": b'{"label": %d.0}' % k})
    index(folder)
    rows = read_manifest(folder).written
    assert [(r.source, r.label) for r in rows] == [("0.tar/v", 0), ("1.tar/v", 1)]


@pytest.mark.parametrize("name", ["my shard.tar", "0.TAR", "0.tar.gz", "sub/0.tar"])
def test_tars_that_cannot_be_shards_are_named(tmp_path: Path, clip: bytes, name: str) -> None:
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / name, {"v.mp4": clip})
    message = {
        "my shard.tar": r"the shard name 'my shard\.tar', which is not allowed",
        "0.TAR": r"0\.TAR ends in \.TAR; rename it to \*\.tar",
        "0.tar.gz": r"holds no \*\.tar.*decompressed \(found 0\.tar\.gz\)",
        "sub/0.tar": r"holds no \*\.tar.*: one of its folders sub",
    }[name]
    with pytest.raises(ShardError, match=message):
        index(tmp_path)


def test_a_bad_label_is_found_before_anything_is_decoded(
    tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a video was decoded")

    monkeypatch.setattr("strata.preprocess.index_existing.measure_video", never)
    write_tar(tmp_path / "0.tar", {"v.mp4": clip, "v.cls": b"0"})
    write_tar(tmp_path / "1.tar", {"w.mp4": clip, "w.json": json.dumps({"label": [1]}).encode()})
    with pytest.raises(ShardError, match=r"1\.tar: member w\.json: the label \[1\] is a list"):
        index(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.tar", "1.tar"]


def test_an_index_elsewhere(tmp_path: Path, clip: bytes) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours" / "set"
    theirs.mkdir()
    write_tar(theirs / "0.tar", {"v.mp4": clip, "v.cls": b"0"})
    write_tar(theirs / "1.tar", {"v.mp4": b"no video", "v.cls": b"0"})
    index(theirs, "--index-out", ours, "--max-rejects", "1")
    assert sorted(p.name for p in theirs.iterdir()) == ["0.tar", "1.tar"]
    assert sorted(p.name for p in ours.iterdir()) == [
        "0.idx",
        "0.tar",
        "manifest.json",
        "samples.jsonl",
    ]
    assert read_manifest(ours).split == "theirs"
    assert check_folder(ours, decode=-1) == []
    index(theirs, "--max-rejects", "1")
    for name in ("0.idx", "manifest.json", "samples.jsonl"):
        assert (theirs / name).read_bytes() == (ours / name).read_bytes()
    np.testing.assert_array_equal(frames_of(ours), frames_of(theirs))
    theirs.rename(tmp_path / "moved")
    with pytest.raises(ShardError, match=r"is a link to .*theirs/0\.tar, which is missing"):
        ShardReader(ours)


def test_a_folder_that_cannot_be_written_names_the_option(open_tmp: Path, clip: bytes) -> None:
    theirs, ours = open_tmp / "theirs", open_tmp / "ours"
    theirs.mkdir()
    ours.mkdir()
    ours.chmod(0o777)
    write_tar(theirs / "0.tar", {"v.mp4": clip, "v.cls": b"0"}).chmod(0o644)
    theirs.chmod(0o555)
    done = as_nobody("index", theirs, "--min-frames", "1")
    assert done.returncode == 2
    assert "give a folder for index and manifest with --index-out" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = as_nobody("index", theirs, "--min-frames", "1", "--index_out", ours / "set")
    assert done.returncode == 0, done.stderr
    assert check_folder(ours / "set", decode=-1) == []


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("clsbig", "000000.tar: member s1.cls: the label 1000000007 is no class number from 0 to"),
        ("gz", "is compressed with gzip"),
        ("dots", None),
        ("jsonfloat", None),
    ],
)
def test_real_cases(real_data: Path, tmp_path: Path, case: str, message: str | None) -> None:
    folder = real_data / "cases" / "10-tars" / case
    if not folder.is_dir():
        pytest.skip("the collected cases are not there")
    command = [sys.executable, "tools/shard.py", "index", str(folder), "--min-frames", "1"]
    command += ["--index-out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if message is not None:
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 1
        return
    assert done.returncode == 0, done.stderr
    rows = read_manifest(tmp_path / "out").rows
    assert {(r.status, r.label >= 0) for r in rows} == {("written", True)}
    assert check_folder(tmp_path / "out", decode=-1) == []
    assert len(frames_of(tmp_path / "out")) == len(rows)


def test_a_members_bytes_are_those_of_its_place(tmp_path: Path, clip: bytes) -> None:
    """A hard link in a tar has no content of its own: the reader must go to that of its target."""
    path = write_tar(tmp_path / "0.tar", {"v.mp4": clip, "v.cls": b"1"})
    with tarfile.open(path, "a") as tar:
        for name, target in (("w.mp4", "v.mp4"), ("w.cls", None)):
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = tarfile.LNKTYPE, target
            info.size = 0 if target else 1
            tar.addfile(info, io.BytesIO(b"0"))
    index(tmp_path)
    assert [r.label for r in read_manifest(tmp_path).written] == [1, 0]
    first, second = frames_of(tmp_path)
    np.testing.assert_array_equal(first, second)
