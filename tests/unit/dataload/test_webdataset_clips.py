"""Clips in plain PyTorch: the right frames of every payload, split among ranks and workers."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.handlers import warn_and_continue
from webdataset.writer import ShardWriter

import strata.dataload
from strata.counter_random import Stream, uniforms
from strata.dataload.clips import training_clip
from strata.dataload.reader import ShardReader
from strata.dataload.reference import decode_strip, decode_video
from strata.dataload.webdataset_clips import ClipDataset
from strata.errors import ConfigError, ShardError
from strata.format.schema import NormalForm
from strata.preprocess.command import main
from tests.support.shard_folders import HEIGHT, WIDTH, make_shards
from tests.support.source_videos import moving_scene, write_video

MP4 = NormalForm(
    width=WIDTH, height=HEIGHT, payload="mp4", codec="vp9", quantizer=4, gop=8, segment_frames=18
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    sizes: Any = {"num_classes": 2, "shard_size": 2, "seed": 1}
    make_shards(root / "jpeg", num_videos=7, **sizes)
    make_shards(root / "mp4", num_videos=3, **sizes, form=MP4)
    (root / "foreign").mkdir()
    with ShardWriter(str(root / "foreign" / "x-%03d.tar"), maxcount=2, verbose=0) as writer:
        for k in range(3):
            path = write_video(root / "v.mp4", moving_scene(40, 96, 64, seed=k), codec="libx264")
            # A key with a dot, which webdataset itself would split elsewhere.
            writer.write({"__key__": f"v{k}.a", "mp4": path.read_bytes(), "cls": str(k % 2)})
            writer.write({"__key__": f"broken{k}.a", "mp4": b"no video", "cls": "0"})
    size = ["--width", str(WIDTH), "--height", str(HEIGHT)]
    main(["index", str(root / "foreign"), *size, "--max-rejects", "3"])
    return {name: root / name for name in ("jpeg", "mp4", "foreign")}


def all_frames(reader: ShardReader, sample: int) -> np.ndarray:
    """Decode every frame of a sample by other code."""
    match reader.manifest.form.payload:
        case "jpeg":
            every = np.arange(reader.num_frames[sample])
            return decode_strip(reader.strip(sample, every), HEIGHT)
        case "mp4":
            segments = [reader.member(sample, f"{k:03d}.mp4") for k in range(2)]
            return np.concatenate([decode_video(np.frombuffer(s, np.uint8)) for s in segments])
        case "foreign":
            frames = moving_scene(40, 96, 64, seed=sample)
            scaled = [
                Image.fromarray(f).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for f in frames
            ]
            return np.stack([np.asarray(picture) for picture in scaled])


@pytest.mark.parametrize("payload", ["jpeg", "mp4", "foreign"])
def test_clips_are_the_frames_of_the_videos(folders: dict[str, Path], payload: str) -> None:
    dataset = strata.dataload.webdataset(
        folders[payload], clip_frames=6, stride=3, random_place=True, seed=5
    )
    dataset.set_epoch(2)
    assert isinstance(dataset, WebDataset)
    reader = ShardReader(folders[payload])
    samples = list(dataset)
    assert [s["__key__"] for s in samples] == list(reader.keys)
    assert [s["label"] for s in samples] == reader.labels.tolist()
    draws = uniforms(5, Stream.PLAIN_CLIP, 2, np.arange(len(samples)), 0, 1)[:, 0]
    places = training_clip(reader.num_frames, draws, clip_frames=6, stride=3)
    assert (places[:, 0] > 0).any()
    for number, sample in enumerate(samples):
        clip = sample["clip"]
        assert clip.shape == (6, 3, HEIGHT, WIDTH)
        assert clip.dtype == torch.uint8
        videos = all_frames(reader, number).astype(int)
        found = clip.permute(0, 2, 3, 1).numpy().astype(int)
        # The right frame is the nearest of all of them, and near.
        gaps = np.abs(found[:, None] - videos[None]).mean(axis=(2, 3, 4))
        assert gaps.argmin(axis=1).tolist() == places[number].tolist()
        assert gaps.min(axis=1).max() < {"jpeg": 1, "mp4": 2, "foreign": 8}[payload]


def test_centre_clips_as_floats_and_tuples(folders: dict[str, Path]) -> None:
    options: Any = {"clip_frames": 4, "dtype": torch.float32}
    dataset = strata.dataload.webdataset(folders["jpeg"], **options)
    pairs: Any = dataset.to_tuple("clip", "label")
    clips = [clip for clip, _ in pairs]
    reader = ShardReader(folders["jpeg"])
    expected = decode_strip(reader.strip(2, np.arange(16, 20)), HEIGHT)  # 35 frames.
    np.testing.assert_array_equal(
        clips[2].numpy(), expected.transpose(0, 3, 1, 2).astype(np.float32) / 255
    )


def keys(dataset: ClipDataset, epoch: int) -> list[str]:
    dataset.set_epoch(epoch)
    return [sample["__key__"] for sample in dataset]


def test_orders_are_of_the_seed_and_the_epoch(folders: dict[str, Path]) -> None:
    dataset = strata.dataload.webdataset(folders["jpeg"], clip_frames=1, shuffle=3, seed=1)
    first, second, again = keys(dataset, 0), keys(dataset, 1), keys(dataset, 0)
    plain = keys(strata.dataload.webdataset(folders["jpeg"], clip_frames=1), 0)
    assert sorted(first) == sorted(second) == plain
    assert first == again
    assert len({tuple(first), tuple(second), tuple(plain)}) == 3


def test_ranks_and_workers_share_each_epoch(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = strata.dataload.webdataset(folders["jpeg"], clip_frames=1, shuffle=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for epoch in range(3):
        found = []
        for rank, worker in itertools.product("01", repeat=2):
            for name, value in (("RANK", rank), ("WORKER", worker), ("NUM_WORKERS", "2")):
                monkeypatch.setenv(name, value)
            found.append(keys(dataset, epoch))
        assert all(found)
        assert sorted(itertools.chain(*found)) == [f"video-{k:04d}" for k in range(7)]


def test_damage_is_named_or_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    sizes: Any = {"num_videos": 3, "num_classes": 2, "shard_size": 3, "seed": 1}
    make_shards(tmp_path / "set", **sizes)
    reader = ShardReader(tmp_path / "set")
    _, members = reader.members(1)
    path = tmp_path / "set" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    offset, size = members["000.jpg"]
    content[offset + size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"video-0001 in shard-000000.tar: .*checksum differs"):
        list(strata.dataload.webdataset(tmp_path / "set", clip_frames=35))
    lenient = strata.dataload.webdataset(
        tmp_path / "set", clip_frames=35, handler=warn_and_continue
    )
    with pytest.warns(UserWarning, match="video-0001"):
        assert keys(lenient, 0) == ["video-0000", "video-0002"]


def test_arguments_out_of_range(folders: dict[str, Path], tmp_path: Path) -> None:
    make = strata.dataload.webdataset
    with pytest.raises(ConfigError, match="clip_frames is 0"):
        make(folders["jpeg"], clip_frames=0)
    with pytest.raises(ConfigError, match=r"dtype is torch\.int64; use torch\.uint8"):
        make(folders["jpeg"], dtype=torch.int64)
    with pytest.raises(ConfigError, match="the epoch is 65536"):
        make(folders["jpeg"]).set_epoch(1 << 16)
    with pytest.raises(ShardError, match="does not exist"):
        make(tmp_path / "none")


LOADER = """
import sys
import strata.dataload
assert "torch" not in sys.modules
from torch.utils.data import DataLoader
dataset = strata.dataload.webdataset(sys.argv[1], clip_frames=2, shuffle=4)
loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
orders = []
for epoch in (0, 1):
    dataset.set_epoch(epoch)
    batches = list(loader)
    assert batches[0]["clip"].shape[:3] == (2, 2, 3), batches[0]["clip"].shape
    orders.append([key for batch in batches for key in batch["__key__"]])
assert sorted(orders[0]) == sorted(orders[1]) == [f"video-{k:04d}" for k in range(7)], orders
assert orders[0] != orders[1]
assert not [name for name in sys.modules if name.startswith("nvidia.dali")]
"""


def test_batches_of_a_torch_loader_without_dali(folders: dict[str, Path]) -> None:
    """In a process of its own, which has no threads of DALI when it forks the workers."""
    subprocess.run([sys.executable, "-c", LOADER, str(folders["jpeg"])], check=True)
