"""The frame cache: bit-identical batches, filled once, shared by ranks, clear errors."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from strata.dataload import frame_cache as cache_module
from strata.dataload.config import DataConfig
from strata.dataload.faults import SampleFaultError
from strata.dataload.frame_cache import (
    CacheChoice,
    FrameCache,
    cache_bytes,
    decode_planes,
    to_rgb,
)
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import ClassificationRecipe, open_plan
from strata.distributed import World
from strata.errors import ConfigError
from strata.format.schema import NormalForm
from strata.limits import available_memory
from tests.support.loader_batches import SEED, batches
from tests.support.rank_processes import run_ranks
from tests.support.shard_folders import HEIGHT, WIDTH, encode_strip, make_shards

CPU = torch.device("cpu")
FORM = NormalForm(width=WIDTH, height=HEIGHT)


def config_for(folder: Path, cache: CacheChoice = "host", **changes) -> DataConfig:
    return DataConfig(shards=folder, batch_size=4, size=32, threads=2, cache=cache, **changes)


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.epoch, a.step) == (b.epoch, b.step)
        np.testing.assert_array_equal(a.samples, b.samples)
        assert torch.equal(a.short, b.short)
        assert (a.long is None) == (b.long is None)
        assert a.long is None or b.long is None or torch.equal(a.long, b.long)


def decode_by_dali(strip: np.ndarray) -> np.ndarray:
    @pipeline_def
    def graph():
        coded = fn.external_source(name="coded")
        return fn.decoders.image(coded, device="cpu", output_type=types.DALIImageType.RGB)

    pipe = graph(batch_size=1, num_threads=1, device_id=None)
    pipe.build()
    pipe.feed_input("coded", [strip])
    return np.array(pipe.run()[0].at(0))


@pytest.mark.parametrize("frames", [[7], [0, 1, 2], [3, 3, 9], [32, 0, 17, 5, 5, 31]])
@pytest.mark.parametrize("rows", [16, 80, 10_000])
def test_planes_become_what_the_decoder_makes_of_the_same_frames(
    shards: Path, frames: list[int], rows: int
):
    """Frames decoded with all others and assembled in another order, including borders."""
    reader = ShardReader(shards / "train")
    full = decode_planes(reader.strip(3, np.arange(36)), FORM)
    assert full.shape == (36, HEIGHT * WIDTH * 3 // 2)
    want = decode_by_dali(reader.strip(3, np.array(frames)))
    luma = full[frames, : HEIGHT * WIDTH].reshape(1, -1, WIDTH)
    chroma = full[frames, HEIGHT * WIDTH :].reshape(len(frames), 2, HEIGHT // 2, WIDTH // 2)
    chroma = chroma.swapaxes(0, 1).reshape(1, 2, -1, WIDTH // 2)
    got = np.empty((1, *want.shape), np.uint8)
    to_rgb(luma, chroma, got, rows)
    np.testing.assert_array_equal(got[0], want)
    on_tensors = torch.empty(got.shape, dtype=torch.uint8)
    to_rgb(torch.from_numpy(luma), torch.from_numpy(chroma.copy()), on_tensors, rows)
    np.testing.assert_array_equal(on_tensors.numpy()[0], want)


def test_extreme_colours_are_clipped_as_the_decoder_does():
    """Noise with extreme values tests rounding and clipping of all three channels."""
    rng = np.random.default_rng(0)
    blocks = rng.choice(np.array([0, 255], np.uint8), (4, HEIGHT // 4, WIDTH // 4, 3))
    strip = np.frombuffer(encode_strip(blocks.repeat(4, 1).repeat(4, 2)), np.uint8)
    planes = decode_planes(strip, FORM)
    got = np.empty((1, 4 * HEIGHT, WIDTH, 3), np.uint8)
    chroma = planes[:, HEIGHT * WIDTH :].reshape(4, 2, HEIGHT // 2, WIDTH // 2).swapaxes(0, 1)
    luma = planes[:, : HEIGHT * WIDTH].reshape(1, -1, WIDTH)
    to_rgb(luma, chroma.reshape(1, 2, -1, WIDTH // 2), got, 32)
    assert {0, 255} <= set(got.ravel().tolist())
    np.testing.assert_array_equal(got[0], decode_by_dali(strip))


def test_batches_are_the_same_and_nothing_is_decoded_twice(shards: Path):
    config = config_for(shards / "train")
    plain = batches(dataclasses.replace(config, cache="none"))
    kept = batches(config)
    assert_same(plain, kept)
    total = int(ShardReader(config.shards).num_frames.sum())
    assert sum(b.frames_decoded for b in kept if b.epoch == 0) == total
    assert all(b.bytes_read > 0 for b in kept if b.epoch == 0)
    assert all(b.frames_decoded == b.bytes_read == 0 for b in kept if b.epoch == 1)


def test_a_stopped_stream_resumes_with_an_empty_cache(shards: Path):
    config = config_for(shards / "train")
    plain = batches(dataclasses.replace(config, cache="none"))
    assert_same(plain[7:], batches(config, epochs=(1, 2), start_step=1))


def test_videos_of_several_segments(tmp_path: Path):
    form = dataclasses.replace(FORM, segment_frames=15)
    make_shards(tmp_path / "set", num_videos=4, num_classes=2, shard_size=4, seed=3, form=form)
    config = config_for(tmp_path / "set")
    assert_same(batches(dataclasses.replace(config, cache="none")), batches(config))


def test_a_classifiers_clips_are_the_same(shards: Path):
    def clips(cache: CacheChoice) -> list[torch.Tensor]:
        config, reader = config_for(shards / "train", cache), ShardReader(shards / "train")
        recipe = ClassificationRecipe(clip_frames=8, stride=2)
        loader = TrainLoader(
            reader,
            config,
            open_plan(reader, config, SEED, recipe),
            world=World(),
            device=CPU,
            epochs=(0, 2),
            recipe=recipe,
        )
        with loader:
            return [b.short for b in loader]

    plain, kept = clips("none"), clips("host")
    assert len(plain) == 12
    assert all(map(torch.equal, plain, kept))


def _fill_on_rank(world: World, folder: Path) -> tuple[list[torch.Tensor], int, int]:
    found = batches(config_for(folder), world=world, epochs=(0, 3))
    decoded = [sum(b.frames_decoded for b in found if b.epoch == e) for e in range(3)]
    return [b.short for b in found], decoded[0], decoded[1] + decoded[2]


def test_ranks_of_a_node_share_what_is_decoded(shards: Path):
    folder = shards / "train"
    plain = batches(config_for(folder, "none"), epochs=(0, 3))
    ranks = run_ranks(_fill_on_rank, 2, folder)
    for step, batch in enumerate(plain):
        assert torch.equal(batch.short, torch.cat([views[step] for views, *_ in ranks]))
    total = int(ShardReader(folder).num_frames.sum())
    # Each rank decodes at most the samples that the other has not decoded yet.
    assert sum(first for _, first, _ in ranks) <= total
    assert sum(first + later for _, first, later in ranks) < 1.5 * total


def test_a_damaged_sample_is_named_and_replaced_as_without(shards: Path, tmp_path: Path):
    folder = Path(shutil.copytree(shards / "train", tmp_path / "train"))
    shard, members = ShardReader(folder).members(3)
    path = folder / f"shard-{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    start = members["000.jpg"][0]
    content[start + 2 : start + 300] = bytes(298)
    path.write_bytes(bytes(content))
    with pytest.raises(SampleFaultError, match=r"1 sample failed to decode: video-0003 in shard-0"):
        batches(config_for(folder))
    plain = batches(config_for(folder, "none", max_faults=1))
    kept = batches(config_for(folder, max_faults=1))
    assert_same(plain, kept)
    assert [f.sample for b in kept for f in b.faults] == [3]


def test_a_set_that_does_not_fit_is_refused_with_the_sum(
    shards: Path, monkeypatch: pytest.MonkeyPatch
):
    reader = ShardReader(shards / "train")
    frames = int(reader.num_frames.sum())
    needed = frames * (HEIGHT * WIDTH * 3 + 4 * WIDTH)
    assert cache_bytes(reader, CPU) == needed
    assert cache_bytes(reader, torch.device("cuda")) == frames * HEIGHT * WIDTH * 3 // 2
    monkeypatch.setattr(cache_module, "available_memory", lambda: (needed, "the machine"))
    with pytest.raises(
        ConfigError,
        match=r"cache host does not fit: 838 frames of 9,472 bytes are 0\.01 GB, of the 0\.01 GB "
        r"that the machine has free it may use 90%.*use data\.cache none",
    ):
        batches(config_for(shards / "train"))
    monkeypatch.setattr(cache_module, "available_memory", lambda: (2 * needed, "the machine"))
    batches(config_for(shards / "train"), count=1)


def test_memory_is_allocated_on_use_and_freed_with_the_cache(shards: Path):
    def shared_mib() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("RssShmem")) / 1024

    reader = ShardReader(shards / "train")
    before = shared_mib()
    kept = FrameCache(reader, "host", CPU, 2)
    assert shared_mib() - before < 0.5
    kept.windows(np.arange(24), np.tile(np.arange(8), (24, 1)))
    size = cache_bytes(reader, CPU) / 2**20
    assert size <= shared_mib() - before < size + 1
    kept.close()
    assert shared_mib() - before < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "host", "decode": "gpu"}, "keeps what the CPU decodes, but data.decode is gpu"),
        ({"cache": "device", "augment": "cpu"}, "data.cache device is for augmenting on the GPU"),
    ],
)
def test_settings_that_contradict_are_named(changes, message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig(shards=Path("none"), **changes)


def test_a_cache_on_a_gpu_needs_one(shards: Path):
    with pytest.raises(ConfigError, match=r"data\.cache is device, but this rank has no GPU.*host"):
        batches(config_for(shards / "train", "device"))


def test_videos_cannot_be_cached(tmp_path: Path):
    form = NormalForm(width=WIDTH, height=HEIGHT, payload="mp4", codec="mjpeg", quantizer=3)
    make_shards(tmp_path / "set", num_videos=4, num_classes=2, shard_size=4, seed=3, form=form)
    with pytest.raises(ConfigError, match=r"keeps frames of the jpeg payload.* is mp4"):
        batches(config_for(tmp_path / "set"))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, (8_192_000, "the machine")),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "5000000\n",
                "sys/fs/cgroup/job/memory.current": "4000000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 1\nactive_file 200\ninactive_file 300\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "3000000\n",
            },
            (1_000_500, "sys/fs/cgroup/job"),
        ),
        (
            {
                "proc/self/cgroup": "4:cpuset:/a\n3:cpu,memory:/host/path\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "700000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000\n",
                "sys/fs/cgroup/memory/memory.stat": "active_file 1\ntotal_active_file 250000\n",
            },
            (50_000, "sys/fs/cgroup/memory"),
        ),
    ],
    ids=["no limit", "version 2, the group above", "version 1, in a container"],
)
def test_free_memory_respects_the_control_group(tmp_path: Path, files, expected):
    found, where = available_memory(write(tmp_path, MACHINE | files))
    assert found == expected[0]
    assert where.endswith(expected[1])


def test_free_memory_of_this_machine():
    found, where = available_memory()
    assert found > 2**20
    assert where
