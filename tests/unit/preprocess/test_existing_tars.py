"""Tars as other programs write them: each works, or one line names the file and the member."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from strata.errors import ShardError
from strata.preprocess.existing_tars import index_text, read_tar

GOOD = {"a.cls": b"1", "a.mp4": b"AAAA", "b.cls": b"2", "b.mp4": b"BBBBB"}


def write_tar(path: Path, members: dict[str, bytes], *, kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def add(path: Path, name: str, **fields: object) -> None:
    """Append a member without content."""
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info)


def contents(path: Path) -> dict[str, dict[str, bytes]]:
    samples = read_tar(path).samples
    return {s.key: {ext: m.read(path) for ext, m in s.members.items()} for s in samples}


def test_keys_part_at_the_first_dot(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"d.x/v.000.jpg": b"1", "d.x/v.frames.i32": b"2"})
    assert contents(path) == {"d.x/v": {"000.jpg": b"1", "frames.i32": b"2"}}
    (sample,) = read_tar(path).samples
    assert index_text([sample]) == (
        b"v1.2 1\n000.jpg 512 1 d.x/v.000.jpg frames.i32 1536 1 d.x/v.frames.i32\n"
    )


@pytest.mark.parametrize("first", ["vid.0", "Mr. Bean 3.5", "v1.0-beta", "dir.x/a.b.c"])
def test_keys_with_dots(tmp_path: Path, first: str) -> None:
    members = {f"{first}.cls": b"1", f"{first}.MP4": b"A", "vid.1.cls": b"2", "vid.1.webm": b"B"}
    path = write_tar(tmp_path / "a.tar", members | {"plain.mp4": b"C"})
    assert contents(path) == {
        first: {"cls": b"1", "MP4": b"A"},
        "vid.1": {"cls": b"2", "webm": b"B"},
        "plain": {"mp4": b"C"},
    }


def test_members_that_a_format_adds_are_no_samples(tmp_path: Path) -> None:
    long_name = "folder/" * 30 + "v"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "a.tar", {f"{long_name}.mp4": b"A"}, kind=kind)
        assert contents(path) == {long_name: {"mp4": b"A"}}


def test_names_with_spaces_and_odd_bytes(tmp_path: Path) -> None:
    name = "my caf\udce9 100%\u2028é"
    path = write_tar(tmp_path / "a.tar", {f"{name}.mp4": b"A"}, kind=tarfile.GNU_FORMAT)
    assert contents(path) == {name: {"mp4": b"A"}}
    text = "v1.2 1\nmp4 512 1 my%20caf%E9%20100%%E2%80%A8é.mp4\n"
    assert index_text(read_tar(path).samples) == text.encode()


def test_hidden_and_system_members_are_ignored_and_counted(tmp_path: Path) -> None:
    extra = ("._a.mp4", "./._b.cls", "__MACOSX/._a.mp4", ".DS_Store", "x/Thumbs.db", "README")
    path = write_tar(tmp_path / "a.tar", GOOD | dict.fromkeys(extra, b"junk"))
    add(path, "folder", type=tarfile.DIRTYPE)
    add(path, "pipe.mp4", type=tarfile.FIFOTYPE)
    assert list(contents(path)) == ["a", "b"]
    assert sorted(read_tar(path).ignored) == sorted([*extra, "pipe.mp4"])


def test_links_in_a_tar_are_what_they_lead_to(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", GOOD)
    add(path, "c/x.mp4", type=tarfile.SYMTYPE, linkname="../a.mp4")
    add(path, "c/x.cls", type=tarfile.LNKTYPE, linkname="b.cls")
    add(path, "c/y.mp4", type=tarfile.LNKTYPE, linkname="c/x.mp4")
    assert contents(path)["c/x"] == {"mp4": b"AAAA", "cls": b"2"}
    assert contents(path)["c/y"] == {"mp4": b"AAAA"}


def cut_at_a_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        (last,) = [m for m in tar if m.name == "b.cls"]
    path.write_bytes(path.read_bytes()[: last.offset])


def cut(num_bytes: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:num_bytes])


def replaced(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def overwrite_a_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2048:2560] = b"\x55" * 512
    path.write_bytes(content)


def make_sparse(path: Path) -> None:
    """A member of GNU tar's old sparse format; tarfile reads such, and does not write them."""
    info = tarfile.TarInfo("c.mp4")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\000000000000\0"
    header[483:495] = b"00000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(m.offset_data + 512 for m in tar)
    path.write_bytes(content[:end] + header + bytes(1024))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: p.write_bytes(gzip.compress(p.read_bytes())),
            r"compressed with gzip.*gunzip",
        ),
        (replaced(b"BZh91AY&SY"), "is compressed with bzip2"),
        (replaced(b"\xfd7zXZ\0\0\0"), "is compressed with xz"),
        (replaced(b"\x28\xb5\x2f\xfd\0\0"), "is compressed with zstd"),
        (replaced(b""), r"not readable as a tar \(empty file\)"),
        (replaced(b"<html>not found</html>" * 99), "not readable as a tar"),
        (cut_at_a_member, r"ends after 2,048 bytes without the block that ends a tar: it was cut"),
        (cut(1024 + 512 + 3), r"not readable as a tar \(unexpected end of data\)"),
        (cut(700), "not readable as a tar"),
        (overwrite_a_header, "is damaged at byte 2,048"),
        (lambda p: p.write_bytes(2 * p.read_bytes()), r"more data behind its end at byte 4,096"),
        (lambda p: add(p, "b.mp4"), r"member b\.mp4 is there twice"),
        (lambda p: add(p, "a.json"), r"the members of a do not stand together"),
        (lambda p: add(p, "../c.mp4"), r"member \.\./c\.mp4 has '\.\.' in its name"),
        (
            lambda p: add(p, "c.mp4", type=tarfile.SYMTYPE, linkname="/data/c.mp4"),
            r"member c\.mp4 is a link to /data/c\.mp4, which is no file in this tar",
        ),
        (
            lambda p: add(p, "c.mp4", type=tarfile.SYMTYPE, linkname="c.mp4"),
            r"member c\.mp4 is a link to c\.mp4, which",
        ),
        (make_sparse, r"member c\.mp4 is stored with holes"),
    ],
    ids=[
        "gzip",
        "bzip2",
        "xz",
        "zstd",
        "empty file",
        "no tar",
        "cut at a member",
        "cut in a member",
        "cut in a header",
        "damaged header",
        "joined by cat",
        "member twice",
        "sample in parts",
        "above the folder",
        "link out of the tar",
        "link to itself",
        "sparse",
    ],
)
def test_what_is_no_sound_tar_is_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = write_tar(tmp_path / "000000.tar", GOOD)
    assert len(contents(path)) == 2
    damage(path)
    with pytest.raises(ShardError, match=message) as error:
        read_tar(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [bytes(10240), bytes(512)], ids=["zeros", "one block"])
def test_a_tar_without_members(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert read_tar(tmp_path / "a.tar").samples == []


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE]
)
def test_a_name_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"first.mp4": b"A"})
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, 4 << 30
    content = path.read_bytes()[:1024]
    with path.open("wb") as file:
        file.write(content + header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(5 << 30)
    with pytest.raises(ShardError, match=r"a.tar: a member's name and attributes take 4,294,967"):
        read_tar(path)
