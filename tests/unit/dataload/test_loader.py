"""Streams of batches do not depend on ranks, resume or run; errors are clear."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from strata.counter_random import Stream, uniforms
from strata.dataload.augment import draw_view
from strata.dataload.clips import ClipSpec, training_window
from strata.dataload.config import DataConfig
from strata.dataload.graph_spec import ViewSlice
from strata.dataload.loader import Batch, EvaluationLoader, TrainLoader
from strata.dataload.prefetch import Prefetcher
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.dataload.reference import decode_strip, reference_view
from strata.distributed import World
from strata.errors import EXIT_LOST_PEER, ConfigError, ShardError, StallError
from tests.support.loader_batches import SEED, batches
from tests.support.shard_folders import HEIGHT, WIDTH

CPU = torch.device("cpu")


def config_for(shards: Path, **changes) -> DataConfig:
    return DataConfig(shards=shards, batch_size=4, size=32, threads=1, **changes)


def test_batches_are_those_of_the_reference(shards: Path):
    config = config_for(shards / "train")
    reader = ShardReader(config.shards)
    plan = open_plan(reader, config, SEED)
    (batch,) = batches(config, epochs=(3, 4), start_step=2, count=1)
    samples = plan.batch(3, 2, 0, 1)
    assert batch.long is not None
    assert batch.short.shape == (4, 2, 16, 32, 32, 3)
    assert batch.long.shape == (4, 32, 32, 32, 3)
    np.testing.assert_array_equal(batch.samples, samples)
    draws = uniforms(SEED, Stream.WINDOW, 3, samples, 0, 2)
    windows = training_window(reader.num_frames[samples], config.clips, draws)
    cuts = (ViewSlice(0, 16), ViewSlice(16, 16), ViewSlice(0, 32))
    for view, cut in enumerate(cuts):
        parameters = draw_view(
            config.views,
            height=HEIGHT,
            width=WIDTH,
            size=32,
            frames=cut.num_frames,
            seed=SEED,
            epoch=3,
            samples=samples,
            view=view,
        )
        for row, sample in enumerate(samples):
            frames = decode_strip(reader.strip(int(sample), windows[row]), HEIGHT)
            want = reference_view(frames, cut, parameters, row, 32, photometric=True)
            got = batch.short[row, view] if view < 2 else batch.long[row]
            gap = np.abs(got.numpy().astype(int) - want.astype(int))
            # Colour enlarges a difference of 1 in the resize.
            assert gap.max() <= 4
            assert (gap > 1).mean() <= 0.03
            assert gap.mean() <= 0.3


def same(one: Batch, two: Batch) -> bool:
    longs = (one.long is None) == (two.long is None)
    if one.long is not None and two.long is not None:
        longs = torch.equal(one.long, two.long)
    return (
        longs
        and torch.equal(one.short, two.short)
        and np.array_equal(one.samples, two.samples)
        and (one.epoch, one.step) == (two.epoch, two.step)
    )


def test_two_runs_are_the_same_and_epochs_differ(shards: Path):
    config = config_for(shards / "train")
    one, two = batches(config), batches(config)
    assert len(one) == 12
    assert all(map(same, one, two))
    assert not torch.equal(one[0].short, one[6].short)


@pytest.mark.parametrize("stop", [1, 6, 8])
def test_a_resumed_stream_equals_an_uninterrupted_one(shards: Path, stop: int):
    config = config_for(shards / "train")
    full = batches(config)
    rest = batches(config, epochs=(stop // 6, 2), start_step=stop % 6)
    assert len(rest) == 12 - stop
    assert all(map(same, full[stop:], rest))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_rank_is_the_union_of_several(shards: Path, num_ranks: int):
    config = config_for(shards / "train")
    full = batches(config, count=3)
    worlds = [World(rank=r, size=num_ranks) for r in range(num_ranks)]
    parts = [batches(config, world=w, count=3) for w in worlds]
    for step, batch in enumerate(full):
        assert torch.equal(batch.short, torch.cat([p[step].short for p in parts]))
        joined = torch.cat([p[step].long for p in parts])  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert batch.long is not None
        assert torch.equal(batch.long, joined)


def test_a_stream_resumes_on_another_number_of_ranks(shards: Path):
    config = config_for(shards / "train")
    full = batches(config, epochs=(0, 1))
    two = [
        batches(config, world=World(rank=r, size=2), epochs=(0, 1), start_step=2, count=2)
        for r in range(2)
    ]
    rest = batches(config, epochs=(0, 1), start_step=4)
    assert len(rest) == 2
    for step in (0, 1):
        assert torch.equal(full[2 + step].short, torch.cat([r[step].short for r in two]))
    assert all(map(same, full[4:], rest))


def test_three_epochs_show_every_sample_once_each(shards: Path):
    stream = batches(config_for(shards / "train"), epochs=(0, 3), wants_long=lambda _: False)
    assert len(stream) == 18
    for epoch in range(3):
        seen = np.concatenate([b.samples for b in stream if b.epoch == epoch])
        assert sorted(seen.tolist()) == list(range(24))


def test_threads_live_from_the_start_to_the_close(shards: Path):
    reader = ShardReader(shards / "train")
    config = config_for(shards / "train")
    before = threading.active_count()
    loader = TrainLoader(
        reader,
        config,
        open_plan(reader, config, SEED),
        world=World(),
        device=CPU,
        epochs=(0, 1000),
    )
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        next(iter(loader))
    with loader:
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_the_long_sequence_comes_where_it_is_wanted(shards: Path):
    config = config_for(shards / "train", clips=ClipSpec(long_stride=2))
    stream = batches(config, wants_long=lambda epoch: epoch == 1)
    assert [b.long is not None for b in stream] == [False] * 6 + [True] * 6
    long = stream[6].long
    assert long is not None
    assert long.shape == (4, 16, 32, 32, 3)


def test_evaluation_takes_every_sample_once_on_any_number_of_ranks(shards: Path):
    reader = ShardReader(shards / "test")
    config = config_for(shards / "test")

    def clips(rank: int, size: int) -> dict[int, torch.Tensor]:
        loader = EvaluationLoader(
            reader,
            config,
            world=World(rank=rank, size=size),
            device=CPU,
            videos_per_batch=5,
            num_clips=3,
            stride=1,
        )
        found = {}
        with loader:
            for batch in loader:
                for row in np.flatnonzero(batch.valid):
                    assert int(batch.samples[row]) not in found
                    found[int(batch.samples[row])] = batch.clips[row]
        return found

    alone, first, second = clips(0, 1), clips(0, 2), clips(1, 2)
    assert sorted(alone) == list(range(12))
    assert sorted([*first, *second]) == list(range(12))
    for sample, seen in (first | second).items():
        assert seen.shape == (3, 16, 32, 32, 3)
        assert torch.equal(seen, alone[sample])


def test_videos_shorter_than_the_window_are_in_no_batch(shards: Path):
    # Videos have 33 to 37 frames, and the window 36.
    config = config_for(shards / "train", clips=ClipSpec(clip_frames=18))
    reader = ShardReader(shards / "train")
    short = np.flatnonzero(reader.num_frames < 36)
    assert open_plan(reader, config, SEED).left_out == tuple(short.tolist())
    seen = np.concatenate([batch.samples for batch in batches(config)])
    assert len(seen)
    assert not np.isin(seen, short).any()
    config = config_for(shards / "train", clips=ClipSpec(clip_frames=20))
    with pytest.raises(ConfigError, match="hold 0 samples and 24 too short ones"):
        batches(config)


def test_a_missing_gpu_is_rejected(shards: Path):
    config = dataclasses.replace(config_for(shards / "train"), decode="gpu")
    with pytest.raises(ConfigError, match=r"data\.decode is gpu, but this rank has no GPU"):
        batches(config)


def test_a_late_batch_ends_the_run_with_stacks(capfd: pytest.CaptureFixture[str]):
    let_go = threading.Event()

    def stuck() -> Iterator[int]:
        yield 1
        let_go.wait(30)

    prefetcher = Prefetcher(stuck(), depth=1, stall_s=0.5).start()
    assert next(prefetcher) == 1
    with pytest.raises(StallError, match=r"no batch for 0\.5 s") as found:
        next(prefetcher)
    assert found.value.exit_code == EXIT_LOST_PEER
    let_go.set()
    prefetcher.close()
    assert "stuck" in capfd.readouterr().err


@pytest.mark.parametrize("cache", ["none", "host"])
def test_storage_that_hangs_ends_the_run(
    shards: Path, cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    let_go = threading.Event()

    def hang(*_: object) -> list[np.ndarray]:
        let_go.wait(30)
        raise ShardError("let go")

    monkeypatch.setattr(ShardReader, "strips", hang)
    with pytest.raises(StallError, match=r"no batch for 0\.3 s.*raise data\.stall_s"):
        batches(config_for(shards / "train", stall_s=0.3, cache=cache))
    let_go.set()
    assert "in hang" in capfd.readouterr().err


def test_an_error_of_the_source_reaches_the_consumer():
    def failing() -> Iterator[int]:
        yield 1
        raise ShardError("sample x: broken")

    prefetcher = Prefetcher(failing(), depth=1, stall_s=5).start()
    assert next(prefetcher) == 1
    with pytest.raises(ShardError, match="sample x: broken"):
        next(prefetcher)


def test_closing_early_ends_the_thread():
    prefetcher = Prefetcher(iter(range(1000)), depth=2, stall_s=5).start()
    assert next(prefetcher) == 0
    before = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - before < 4
    assert not any(t.name == "strata-loader" and t.is_alive() for t in threading.enumerate())
