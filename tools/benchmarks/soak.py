"""Whether memory stays constant over a long run: `python tools/bench.py soak --help`.

Makes many batches of small samples with the training loader, and reads at even intervals the
process's resident memory, shared memory, file descriptors and threads. Then it opens and closes
many loaders.
"""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from strata.dataload.clips import ClipSpec
from strata.dataload.config import DataConfig
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.format.schema import NormalForm
from strata.preprocess.datasets.folder import find_folder
from strata.preprocess.run import ShardSettings, shard_set
from strata.ranges import check_range
from strata.tools.benchmarks.measure import (
    best_device,
    machine,
    machine_line,
    parse_options,
    status_bytes,
    table,
    write_record,
)
from strata.tools.synthetic_videos import VideoSettings, make_videos

__all__ = ["Reading", "growth", "main", "soak"]

_SEED = 0
_FOREVER = 1_000_000


@dataclass(frozen=True)
class Reading:
    """The process's memory, descriptors and threads after `count` batches or loaders."""

    count: int
    rss_mib: float
    shm_mib: float
    fds: int
    threads: int

    @classmethod
    def now(cls, count: int) -> "Reading":
        """Read it from /proc."""
        return cls(
            count,
            status_bytes("VmRSS") / 2**20,
            status_bytes("RssShmem") / 2**20,
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
        )


def small_shards(folder: Path) -> Path:
    """Shards of 32 generated videos of 40 frames at 64x48."""
    videos = folder / "videos"
    settings = VideoSettings(videos_per_class=4, classes=8, frames=40, width=64, height=48)
    make_videos(videos, settings, workers=0, progress=False)
    (source_set,) = find_folder([videos])
    form = NormalForm(width=64, height=48)
    shard_set(
        source_set,
        folder / "shards",
        ShardSettings(form=form, workers=1, samples_per_shard=8),
    )
    return folder / "shards"


def _loader(shards: Path, batch: int, clip_frames: int) -> TrainLoader:
    reader = ShardReader(shards)
    config = DataConfig(
        shards=shards, batch_size=batch, size=32, clips=ClipSpec(clip_frames=clip_frames)
    )
    return TrainLoader(
        reader,
        config,
        open_plan(reader, config, _SEED),
        world=World(),
        device=best_device(),
        epochs=(0, _FOREVER),
    )


def soak(shards: Path, *, batches: int, every: int, batch: int, frames: int) -> Iterator[Reading]:
    """Take a reading after each `every` of `batches` batches."""
    with _loader(shards, batch, frames) as loader:
        for count, _ in enumerate(loader, start=1):
            if count % every == 0:
                yield Reading.now(count)
            if count == batches:
                return


def reopen(shards: Path, *, loaders: int, every: int, batch: int, frames: int) -> Iterator[Reading]:
    """Take a reading after each `every` of `loaders` that are opened, used and closed."""
    for count in range(1, loaders + 1):
        with _loader(shards, batch, frames) as loader:
            next(iter(loader))
        if count % every == 0:
            yield Reading.now(count)


def growth(readings: Sequence[Reading]) -> dict[str, float]:
    """Increase over 1,000 batches, from a straight line through the second half of the readings."""
    late = readings[len(readings) // 2 :]
    counts = np.array([r.count for r in late]) / 1000
    return {
        name: float(np.polyfit(counts, [getattr(r, name) for r in late], 1)[0])
        for name in ("rss_mib", "shm_mib", "fds", "threads")
    }


def _readings_table(title: str, readings: Sequence[Reading]) -> str:
    head = (title, "RSS MiB", "shm MiB", "descriptors", "threads")
    rows = [
        (f"{r.count:,}", f"{r.rss_mib:.1f}", f"{r.shm_mib:.1f}", r.fds, r.threads) for r in readings
    ]
    return table(head, rows)


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """Memory over many batches of one loader, then over many loaders."""

    shards: Path | None = None
    """A folder of shards; by default it is made from generated videos."""
    batches: int = 20_000
    """Batches to make."""
    loaders: int = 100
    """Loaders to open and close."""
    batch: int = 4
    """Samples in a batch."""
    frames: int = 4
    """Frames of a short clip."""
    readings: int = 10
    """Number of readings, evenly spaced."""
    out: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_range(self, "batches", "loaders", "readings", at_least=1)


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: An option is out of its range.
    """
    options = parse_options(SoakOptions, argv, "soak")
    facts = machine(best_device())
    print(machine_line(facts))
    with tempfile.TemporaryDirectory() as folder:
        shards = options.shards or small_shards(Path(folder))
        sizes = {"batch": options.batch, "frames": options.frames}
        start = time.perf_counter()
        every = max(1, options.batches // options.readings)
        running = list(soak(shards, batches=options.batches, every=every, **sizes))
        batches_per_s = options.batches / (time.perf_counter() - start)
        every = max(1, options.loaders // options.readings)
        opening = list(reopen(shards, loaders=options.loaders, every=every, **sizes))
    print(_readings_table("batches", running))
    slope = growth(running)
    print(
        f"{batches_per_s:.0f} batches/s; by a line through the second half, 1,000 batches add "
        f"{slope['rss_mib'] * 1024:.0f} KiB of RSS, {slope['shm_mib'] * 1024:.0f} KiB of shared "
        f"memory, {slope['fds']:.2f} descriptors, {slope['threads']:.2f} threads"
    )
    print(_readings_table("loaders", opening))
    readings = {"batches": [asdict(r) for r in running], "loaders": [asdict(r) for r in opening]}
    write_record(options.out, {"machine": facts, **readings, "slope": slope})
