import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from webdataset.compat import WebDataset

from strata.format.shard_tar import ARCHIVE_END, BLOCK, append_members, member_header

SAMPLES = {
    "one-0123456789": [("000.jpg", b"x" * 700), ("001.jpg", b"y" * 512), ("json", b"{}")],
    "two-" + "z" * 80: [("000.jpg", b""), ("frames.i32", b"abc")],
    "three": [("999.jpg", b"i"), ("1000.jpg", b"j" * 20_000), ("frames.i32", b"k")],
}


def by_tarfile() -> bytes:
    """The same members by the standard library, as the format describes a shard."""
    file = io.BytesIO()
    end = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in SAMPLES.items():
            for ext, content in members:
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    return file.getvalue()[:end] + bytes(1024)


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    places = []
    with path.open("wb") as file:
        for key, members in SAMPLES.items():
            places += append_members(file, key, members[:1])  # In parts, as a worker sends them.
            places += append_members(file, key, members[1:])
        file.write(ARCHIVE_END)
    content = path.read_bytes()
    assert content == by_tarfile()
    assert hashlib.sha256(content).hexdigest() == (
        "11d17dc078efd022c76769b7d2d38ca4c6563bed523bbc1695332743461d1a0a"
    )
    expected = [(f"{k}.{e}", c) for k, members in SAMPLES.items() for e, c in members]
    assert [(name, content[at : at + size]) for name, at, size in places] == expected
    for name, at, size in places:
        assert content[at - BLOCK : at] == member_header(name, size)
    samples = list(WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(SAMPLES)


@pytest.mark.parametrize("key", ["k" * 97, "ü"])
def test_name_that_needs_a_second_header(key: str) -> None:
    file = io.BytesIO()
    with pytest.raises(ValueError, match="up to 100 ASCII characters"):
        append_members(file, key, [("jpg", b"")])
    append_members(file, "k" * 96, [("jpg", b"")])


def test_workers_do_not_import_torch() -> None:
    """It would cost 1.6 s and 260 MB in every process, each of which imports the command's file."""
    code = (
        "import io, sys, strata.preprocess.command\n"
        "from strata.format.shard_tar import append_members\n"
        "append_members(io.BytesIO(), 'a', [('jpg', b'')])\n"
        "assert 'torch' not in sys.modules\n"
        "import webdataset; assert webdataset.WebDataset"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
