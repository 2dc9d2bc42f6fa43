"""Whether memory stays flat over a long run: `python tools/bench.py soak --help`.

Makes many batches of small samples with the training loader, and reads what the process holds at
even intervals: resident memory, shared memory, descriptors, threads. Then it opens and closes
loaders.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from strata.dataload.clips import ClipSpec
from strata.dataload.loader import DataConfig, TrainLoader, open_plan
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.errors import ConfigError
from strata.preprocess.run import ShardSettings, shard_set
from strata.preprocess.sources import find_folder
from strata.schema import NormalForm
from strata.tools.make_videos import VideoSettings, make_videos

__all__ = ["Reading", "growth", "main", "soak"]

_SEED = 0
_FOREVER = 1_000_000


@dataclass(frozen=True)
class Reading:
    """What the process holds after `count` batches, or loaders opened and closed."""

    count: int
    rss_mib: float
    shm_mib: float
    fds: int
    threads: int

    @classmethod
    def now(cls, count: int) -> "Reading":
        """Read it from /proc."""
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )

        def mib(name: str) -> float:
            return int(status[name].split()[0]) / 1024

        return cls(
            count,
            mib("VmRSS"),
            mib("RssShmem"),
            len(os.listdir("/proc/self/fd")),
            int(status["Threads"]),
        )


def small_shards(folder: Path) -> Path:
    """32 drawn videos of 40 frames at 64x48."""
    videos = folder / "videos"
    drawn = VideoSettings(videos_per_class=4, classes=8, frames=40, width=64, height=48)
    make_videos(videos, drawn, workers=0, progress=False)
    (source_set,) = find_folder(videos)
    form = NormalForm(width=64, height=48)
    shard_set(
        source_set,
        videos,
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
        device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
        epochs=(0, _FOREVER),
    )


def soak(shards: Path, *, batches: int, every: int, batch: int, frames: int) -> Iterator[Reading]:
    """Read what the process holds after each `every` of `batches` batches."""
    loader = _loader(shards, batch, frames)
    try:
        for count, _ in enumerate(loader, start=1):
            if count % every == 0:
                yield Reading.now(count)
            if count == batches:
                return
    finally:
        loader.close()


def reopen(shards: Path, *, loaders: int, every: int, batch: int, frames: int) -> Iterator[Reading]:
    """Read what the process holds after each `every` of `loaders` opened, used and closed."""
    for count in range(1, loaders + 1):
        loader = _loader(shards, batch, frames)
        next(iter(loader))
        loader.close()
        if count % every == 0:
            yield Reading.now(count)


def growth(readings: Sequence[Reading]) -> dict[str, float]:
    """What 1,000 more batches cost by a straight line through the second half of the readings."""
    late = readings[len(readings) // 2 :]
    counts = np.array([r.count for r in late]) / 1000
    return {
        name: float(np.polyfit(counts, [getattr(r, name) for r in late], 1)[0])
        for name in ("rss_mib", "shm_mib", "fds", "threads")
    }


def _print(title: str, readings: Sequence[Reading]) -> None:
    print(f"{title:>9}{'RSS MiB':>10}{'shm MiB':>9}{'fds':>6}{'threads':>9}")
    for r in readings:
        print(f"{r.count:>9,}{r.rss_mib:>10.1f}{r.shm_mib:>9.1f}{r.fds:>6}{r.threads:>9}")


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: An option is out of its range.
    """
    parser = argparse.ArgumentParser(
        prog="tools/bench.py soak", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    say = parser.add_argument
    say("--shards", type=Path, default=None, help="a folder of shards; without it they are drawn")
    say("--batches", type=int, default=20_000, help="batches to make")
    say("--loaders", type=int, default=100, help="loaders to open and close")
    say("--batch", type=int, default=4, help="samples in a batch")
    say("--frames", type=int, default=4, help="frames of a short clip")
    say("--readings", type=int, default=10, help="how often to read, evenly")
    say("--out", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    for name in ("batches", "loaders", "readings"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; use 1 or more")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shards = args.shards or small_shards(folder)
        sizes = {"batch": args.batch, "frames": args.frames}
        start = time.perf_counter()
        every = max(1, args.batches // args.readings)
        running = list(soak(shards, batches=args.batches, every=every, **sizes))
        rate = args.batches / (time.perf_counter() - start)
        every = max(1, args.loaders // args.readings)
        opening = list(reopen(shards, loaders=args.loaders, every=every, **sizes))
    _print("batches", running)
    slope = growth(running)
    print(
        f"{rate:.0f} batches/s; by a line through the second half, 1,000 batches add "
        f"{slope['rss_mib'] * 1024:.0f} KiB of RSS, {slope['shm_mib'] * 1024:.0f} KiB of shared "
        f"memory, {slope['fds']:.2f} descriptors, {slope['threads']:.2f} threads"
    )
    _print("loaders", opening)
    if args.out is not None:
        found = {"batches": [asdict(r) for r in running], "loaders": [asdict(r) for r in opening]}
        args.out.write_text(json.dumps({**found, "slope": slope}, indent=1) + "\n")
