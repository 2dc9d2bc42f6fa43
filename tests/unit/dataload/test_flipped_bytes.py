"""A flipped byte is reported with its sample when it is used, or has no effect."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strata.dataload.config import DataConfig
from strata.dataload.decode_windows import read_windows
from strata.dataload.faults import SampleFaultError
from strata.dataload.frame_cache import FrameCache
from strata.dataload.loader import Batch, EvaluationLoader, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import PretrainingRecipe, open_plan
from strata.distributed import World
from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.format.schema import NormalForm
from strata.preprocess.audit import check_folder
from tests.support.shard_edits import flip, place_of
from tests.support.shard_folders import HEIGHT, WIDTH, make_shards

CPU = torch.device("cpu")
FORMS = {
    "jpeg": NormalForm(width=WIDTH, height=HEIGHT, segment_frames=20),
    "mjpeg": NormalForm(
        width=WIDTH, height=HEIGHT, payload="mp4", codec="mjpeg", quantizer=3, segment_frames=20
    ),
}


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / request.param
    form = FORMS[request.param]
    make_shards(folder, num_videos=4, num_classes=2, shard_size=2, seed=3, form=form)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def windows(folder: Path) -> list[bytes]:
    """All frames of all samples, coded, as the decoder gets them."""
    reader = ShardReader(folder)
    try:
        frames = [np.arange(count) for count in reader.num_frames.tolist()]
        coded = read_windows(reader, list(range(reader.num_samples)), frames).coded
        return [np.asarray(c).tobytes() for c in coded]
    finally:
        reader.close()


def test_no_flipped_byte_is_used_for_training(folder: Path):
    """At 150 random positions in the shards."""
    good = windows(folder)
    random = np.random.default_rng(5)
    num_found = 0
    for _ in range(150):
        number = int(random.integers(2))
        path = folder / f"shard-{number:06d}.tar"
        place, mask = int(random.integers(path.stat().st_size)), 1 << int(random.integers(8))
        flip(path, place, mask)
        faults = ()
        try:
            assert windows(folder) == good, f"byte {place} of {path.name}"
        except SampleFaultError as error:
            faults = error.faults
        keys = {f"video-{k:04d}" for k in (2 * number, 2 * number + 1)}
        assert len(faults) <= 1
        assert all(f.shard == path.name and f.key in keys for f in faults)
        num_found += len(faults)
        flip(path, place, mask)
    assert num_found > 50


def test_no_flip_enters_the_cache(folder: Path):
    if folder.name != "jpeg":
        pytest.skip("the cache is for the jpeg payload")
    random = np.random.default_rng(6)

    def filled() -> bytes:
        reader = ShardReader(folder)
        cache = FrameCache(reader, "host", CPU, threads=1)
        try:
            cache.windows(np.arange(4), [np.arange(3)] * 4)
            return cache._frames.tobytes()
        finally:
            cache.close()
            reader.close()

    good = filled()
    for _ in range(40):
        path, start, size = place_of(folder, int(random.integers(4)), "000.jpg")
        place = start + int(random.integers(size))
        flip(path, place)
        with contextlib.suppress(SampleFaultError):
            assert filled() == good
        flip(path, place)


def batches(folder: Path, max_faults: int, **changes: Any) -> Iterator[Batch]:
    config = DataConfig(shards=folder, batch_size=4, size=32, threads=1, max_faults=max_faults)
    config = dataclasses.replace(config, **changes)
    reader = ShardReader(folder)
    loader = TrainLoader(
        reader,
        config,
        open_plan(reader, config, 1),
        world=World(),
        device=CPU,
        epochs=(0, 2),
        recipe=PretrainingRecipe(config.clips, lambda _: False),
    )
    try:
        with loader:
            yield from loader
    finally:
        reader.close()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A set of schema 1, whose flips only the decoder or a check of the header can find."""
    make_shards(tmp_path / "old", num_videos=24, num_classes=4, shard_size=9, seed=1, schema=1)
    return tmp_path / "old"


def test_sets_of_schema_1_give_the_same_batches(old: Path, shards: Path):
    manifest = read_manifest(old)
    assert (manifest.schema, manifest.shards[0].index_sha256) == (1, None)
    assert check_folder(old, decode=-1) == []
    assert "checksums=None" in repr(ShardReader(old).table(0))
    assert ShardReader(shards / "train").table(0).checksums is not None
    for one, two in zip(batches(old, 0), batches(shards / "train", 0), strict=True):
        assert torch.equal(one.short, two.short)
        assert one.samples.tolist() == two.samples.tolist()


EDITS = {
    "width": (b"\xff\xc0", 7, b"\x00\x50"),
    "bomb": (b"\xff\xc0", 5, b"\xff\xdc\xff\xdc"),
    "zero": (b"\xff\xc0", 7, b"\x00\x00"),
    "components": (b"\xff\xc0", 9, b"\x00"),
    "sampling": (b"\xff\xc0", 11, b"\x11"),
    "restarts": (b"\xff\xdd", 4, b"\x00\x00"),
    "length": (b"\xff\xdb", 2, b"\x00\x00"),
    "huffman": (b"\xff\xc4", 4, b"\x2f"),
}


@pytest.mark.parametrize("cache", ["none", "host"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_picture_of_another_size_is_a_fault_like_any_other(old: Path, edit: str, cache: str):
    marker, offset, new = EDITS[edit]
    path, start, size = place_of(old, 5, "000.jpg")
    content = bytearray(path.read_bytes())
    place = content.index(marker, start, start + size) + offset
    content[place : place + len(new)] = new
    path.write_bytes(content)
    with pytest.raises(SampleFaultError, match=r"video-0005 in shard-000000\.tar"):
        list(batches(old, 0, cache=cache))
    got = list(batches(old, 1, cache=cache))
    assert len(got) == 12
    assert [f.key for b in got for f in b.faults] == ["video-0005"]
    reader = ShardReader(old)
    loader = EvaluationLoader(
        reader,
        DataConfig(shards=old, size=32, threads=1, max_faults=10),
        world=World(),
        device=CPU,
        videos_per_batch=4,
        num_clips=2,
        stride=1,
    )
    with loader, pytest.raises(SampleFaultError, match="1 sample failed to decode: video-0005"):
        list(loader)
    assert any("video-0005: " in fault for fault in check_folder(old, decode=0))


TABLE_EDITS = {
    "frames": (2, 10**9),
    "negative": (2, -5),
    "none": (2, 0),
    "height": (3, 65_520),
    "width": (4, 0),
    "segments": (5, 7),
    "per-segment": (6, 0),
    "first": (8, 10**9),
    "offset": (12, -(10**9)),
    "length": (8 + 33 + 3, 2**31 - 1),
    "negative-length": (8 + 33 + 3, -(2**31)),
    "no-length": (8 + 33 + 3, 0),
}


@pytest.mark.parametrize("edit", TABLE_EDITS)
def test_a_frame_table_with_any_numbers_is_a_fault_like_any_other(old: Path, edit: str):
    index, value = TABLE_EDITS[edit]
    path, start, size = place_of(old, 5, "frames.i32")
    content = bytearray(path.read_bytes())
    table = np.frombuffer(bytes(content[start : start + size]), "<i4").copy()
    table[index] = value
    content[start : start + size] = table.tobytes()
    path.write_bytes(content)
    reader = ShardReader(old)
    with pytest.raises(SampleFaultError, match=r"video-0005 in shard-000000\.tar"):
        reader.strip(5, np.arange(33))
    assert [f.key for b in batches(old, 1) for f in b.faults] == ["video-0005"]
    assert any("video-0005: " in fault for fault in check_folder(old, decode=0))


def test_the_audit_finds_damage_that_schema_1_cannot(old: Path):
    path, start, size = place_of(old, 5, "000.jpg")
    content = bytearray(path.read_bytes())
    content[start + size // 2 : start + size // 2 + 60] = bytes(60)
    path.write_bytes(content)
    faults = check_folder(old, decode=0)
    assert "shard-000000.tar: its SHA-256 is not what the manifest says" in "\n".join(faults)
    with pytest.raises(ShardError, match="SHA-256 differs"):
        ShardReader(old, check="hash")
