"""The reader returns the original frames and detects damage."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from strata.dataload.reader import ShardReader
from strata.dataload.reference import decode_strip
from strata.errors import ShardError
from strata.format.manifest import read_manifest
from tests.support.shard_folders import HEIGHT, moving_picture, rewrite


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def test_samples_are_numbered_through_the_shards(shards: Path):
    reader = ShardReader(shards / "train", check="hash")
    assert reader.num_samples == 24
    assert reader.labels.tolist() == [k % 4 for k in range(24)]
    assert reader.num_frames.tolist() == [33 + k % 5 for k in range(24)]
    assert str(reader.fault(10, "why")) == "video-0010 in shard-000001.tar: why"


@pytest.mark.parametrize("sample", [0, 8, 9, 23])
def test_a_strip_holds_the_frames_asked_for(shards: Path, sample: int):
    reader = ShardReader(shards / "train")
    frames = np.array([0, 32, 5, 5, 17])
    got = decode_strip(reader.strip(sample, frames), HEIGHT).astype(int)
    want = moving_picture(1000 + sample, 33 + sample % 5)[frames].astype(int)
    # JPEG of quality 90; border rows see a neighbour's chroma.
    assert np.abs(got - want)[:, 2:-2].mean() < 4


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ShardError, match=r"nothing does not exist; make it with tools/shard\.py"):
        ShardReader(tmp_path / "nothing")


def test_a_folder_without_manifest_is_named(copy: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"has no manifest\.json"):
        ShardReader(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard-000001.tar").unlink(), "shard-000001.tar is missing"),
        (
            lambda f: (f / "shard-000001.tar").write_bytes(b"short"),
            "shard-000001.tar has 5 bytes, the manifest says",
        ),
        (
            lambda f: (f / "shard-000002.idx").unlink(),
            "shard-000002.idx is missing or",
        ),
        (
            lambda f: (f / "shard-000002.idx").write_text("v1.2 1\nx 0 1 x\n"),
            "shard-000002.idx is damaged: its SHA-256 is not that of",
        ),
        (lambda f: (f / "samples.jsonl").write_text(""), "is damaged: the digest is not that of"),
        (
            lambda f: (f / "manifest.json").write_text("{"),
            "manifest.json is not valid: Input data",
        ),
    ],
)
def test_damage_is_found_at_the_start(copy: Path, damage, message: str):
    damage(copy)
    with pytest.raises(ShardError, match=message):
        ShardReader(copy)


def test_a_flipped_bit_is_found_by_hash(copy: Path):
    path = copy / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    ShardReader(copy, check="size")
    with pytest.raises(ShardError, match=r"shard-000000\.tar is not what the manifest says"):
        ShardReader(copy, check="hash")


def test_strips_of_another_payload_are_refused(copy: Path):
    manifest = read_manifest(copy)
    form = dataclasses.replace(manifest.form, payload="mp4")
    rewrite(dataclasses.replace(manifest, form=form), copy)
    with pytest.raises(ShardError, match="has the payload mp4, strips are cut of jpeg only"):
        ShardReader(copy).strips([0], [np.arange(2)])
