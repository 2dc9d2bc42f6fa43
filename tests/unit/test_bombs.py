"""A small file that asks for much: refused in one line, with bounded memory."""

import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strata.dataload.faults import SampleFaultError
from strata.dataload.reader import ShardReader
from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.format.schema import FrameTable, NormalForm
from strata.format.strip_jpeg import assemble_strip
from strata.preprocess.command import main as shard_main
from tests.support.shard_edits import edit_manifest, place_of
from tests.support.shard_folders import make_shards
from tests.support.source_videos import moving_scene, write_video

LIMIT_BYTES = 64 << 20


@contextmanager
def bounded() -> Iterator[None]:
    """No more than 64 MiB are allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("v") / "v.mp4"
    return write_video(path, moving_scene(40, 32, 32)).read_bytes()


def index(folder: Path) -> None:
    with bounded():
        shard_main(["index", str(folder), "--workers", "1", "--max-rejects", "1"])


@pytest.mark.parametrize("label", ["1000000000", "100000", "9" * 5000, "0" * 5000 + "100000"])
@pytest.mark.parametrize("member", ["cls", "json"])
def test_a_huge_label(tmp_path: Path, video: bytes, label: str, member: str):
    content = label if member == "cls" else json.dumps({"label": label})
    write_tar(tmp_path / "a.tar", {"a.mp4": video, f"a.{member}": content.encode()})
    message = (
        rf"a\.tar: member a\.{member}.*(no class number from 0 to 99,999|too many for a label)"
    )
    with pytest.raises(ShardError, match=message):
        index(tmp_path)


def test_a_label_with_leading_zeros_is_a_number(tmp_path: Path, video: bytes):
    write_tar(tmp_path / "a.tar", {"a.mp4": video, "a.cls": b"0003"})
    index(tmp_path)
    assert read_manifest(tmp_path).written[0].label == 3


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "is not valid: maximum recursion"),
        (b'{"label":' * 100_000, "is not valid"),
        (b'{"label": ' + b"9" * 5000 + b"}", "is not valid: Exceeds the limit"),
        (b" " * (2 << 20), "has 2,097,152 bytes, too many for a label"),
        (b"\xff\xfe", "is not valid"),
    ],
    ids=["deep", "deep-object", "digits", "large", "no-text"],
)
def test_facts_of_foreign_samples(tmp_path: Path, video: bytes, facts: bytes, reason: str):
    members = {"a.mp4": video, "a.json": facts, "b.mp4": video, "b.json": b'{"label": "x"}'}
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ShardError, match=rf"a\.tar: member a\.json {reason}"):
        index(tmp_path)


def test_a_compressed_tar_is_not_unpacked(tmp_path: Path):
    with gzip.open(tmp_path / "a.tar", "wb") as file:
        for _ in range(64):
            file.write(bytes(16 << 20))
    with pytest.raises(ShardError, match="compressed with gzip"), bounded():
        shard_main(["index", str(tmp_path), "--workers", "1"])


@pytest.mark.parametrize("side", [65_520, 4096, 0, -16])
@pytest.mark.parametrize("name", ["width", "height"])
def test_a_normal_form_of_huge_frames(tmp_path: Path, side: int, name: str):
    make_shards(tmp_path / "a", num_videos=1, num_classes=1, shard_size=1, seed=0)
    edit_manifest(tmp_path / "a", lambda head, _: head["form"].update({name: side}))
    with (
        pytest.raises(ShardError, match=rf"manifest\.json: normal form: {name} is {side}"),
        bounded(),
    ):
        ShardReader(tmp_path / "a")


def test_the_largest_form_is_possible():
    form = NormalForm(width=2048, height=2048)
    assert form.frames_per_segment == 31


@pytest.mark.parametrize(("index_of", "value"), [(2, 10**9), (2, 2**31 - 1), (5, 2**31 - 1)])
def test_a_frame_table_of_huge_numbers(index_of: int, value: int):
    table = np.zeros(8 + 80, "<i4")
    table[:8] = [1, 0, 40, 48, 64, 1, 1000, 0]
    table[index_of] = value
    with pytest.raises(ShardError, match="frame table: "), bounded():
        FrameTable.from_bytes(table.tobytes())


def test_a_picture_of_65500_rows_and_columns(tmp_path: Path):
    """It would decode to 12.9 GB."""
    folder = tmp_path / "a"
    make_shards(folder, num_videos=2, num_classes=1, shard_size=2, seed=0, schema=1)
    path, start, size = place_of(folder, 0, "000.jpg")
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xc0", start, start + size) + 5
    content[place : place + 4] = (65_500).to_bytes(2, "big") * 2
    path.write_bytes(content)
    reader = ShardReader(folder)
    with pytest.raises(SampleFaultError, match=r"video-0000 in shard-000000\.tar"), bounded():
        reader.strip(0, np.arange(33))
    assert reader.strip(1, np.arange(33)).size > 0


def test_a_header_of_any_length(tmp_path: Path):
    """The bytes before the first frame are shared by all strips: they are few."""
    table = FrameTable(0, 48, 64, 1000, np.array([1 << 20], np.int32), np.array([9], np.int32))
    with pytest.raises(ShardError, match="a header of 1048576 bytes"):
        assemble_strip([bytes(2 << 20)], table, [0])


@pytest.mark.parametrize("name", ["num_frames", "num_bytes", "num_samples"])
def test_counts_of_a_shard(tmp_path: Path, name: str):
    make_shards(tmp_path / "a", num_videos=1, num_classes=1, shard_size=1, seed=0)

    def change(head: dict[str, Any], _: list[Any]) -> None:
        head["shards"][0][name] = 1 << 32

    edit_manifest(tmp_path / "a", change)
    with pytest.raises(ShardError), bounded():
        ShardReader(tmp_path / "a")
