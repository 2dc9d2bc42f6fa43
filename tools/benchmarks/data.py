"""Speed of loading compared with other loaders: `python tools/bench.py data --help`.

First Strata's parts alone: reading (cutting coded frames out of shards), decoding, augmenting, and
the complete loader, also with more threads. Then complete loaders in turns, on the same clips,
with the same recipe and as many workers as cores: Strata, webdataset in a torch DataLoader over
H.264 and over our JPEGs, and DALI's own reader and random operators. Every loader makes the same
views: two clips of 16 and the sequence of 32 frames, uint8. Before anything is timed, a batch of
each is compared with Strata's.

A ratio is taken within a round, in which all loaders run one after the other; the table gives its
median and range over the rounds.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strata.dataload.config import DataConfig
from strata.dataload.reader import ShardReader
from strata.format.schema import NormalForm
from strata.limits import usable_cpus
from strata.preprocess.run import ShardSettings, shard_set
from strata.ranges import check_range
from strata.tools.benchmarks.contenders import (
    Contender,
    StrataContender,
    check_equal_work,
    measure_round,
)
from strata.tools.benchmarks.dali_loader import DaliPeer
from strata.tools.benchmarks.loader_parts import (
    measure_parts,
    measure_threads,
    parts_table,
    threads_table,
)
from strata.tools.benchmarks.measure import (
    best_device,
    find_videos,
    in_turns,
    machine,
    machine_line,
    parse_options,
    require_known,
    source_set_of,
    table,
    write_record,
)
from strata.tools.benchmarks.webdataset_loaders import DECODERS, TorchPeer
from strata.tools.synthetic_videos import VideoSettings, make_videos

__all__ = ["main"]

_MP4_SEGMENT_FRAMES = 511
"""A video is one mp4, as other projects store it."""
_PEERS = {
    "mp4-pyav": "webdataset, H.264, PyAV, torchvision v2",
    "jpeg-pil": "webdataset, our JPEGs, PIL, torchvision v2",
    "jpeg-torchvision": "webdataset, our JPEGs, decode_jpeg, torchvision v2",
    "jpeg-complete": "webdataset, our JPEGs decoded completely, torchvision v2",
    "dali": "fn.readers.webdataset, our JPEGs, DALI's random operators",
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The parts of Strata's loader, then complete loaders of the same views in turns."""

    videos: Path | None = None
    """Folder of videos; by default videos are generated."""
    limit: int = 96
    """Videos, evenly spaced in the order of their names."""
    batch: int = 16
    """Samples in a batch."""
    size: int = 112
    """Rows and columns of a view."""
    rounds: int = 5
    """Turns of each loader."""
    seconds: float = 6.0
    """The least that a turn, or the measurement of a part, lasts."""
    workers: int = 0
    """Processes or threads; 0 is one for each CPU."""
    peers: tuple[str, ...] = tuple(_PEERS)
    """Loaders to compare with."""
    work: Path | None = None
    """Folder in which the shards are kept and used again."""
    out: Path | None = None
    """JSON file to write."""
    quick: bool = False
    """Small and short, to see that it runs."""

    def __post_init__(self) -> None:
        check_range(self, "limit", "batch", "size", "rounds", at_least=1)
        require_known("peer", self.peers, list(_PEERS))


def summarize(rounds: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Median and range of each contender's rate, and of the first one's rate over it by round."""
    first = next(iter(rounds[0]))
    rows = []
    for name in rounds[0]:
        rates = np.array([r[name]["samples_per_s"] for r in rounds])
        cpu = np.array([r[name]["cpu_ms_per_sample"] for r in rounds])
        clock = np.array([r[first]["samples_per_s"] / r[name]["samples_per_s"] for r in rounds])
        by_cpu = np.array(
            [r[name]["cpu_ms_per_sample"] / r[first]["cpu_ms_per_sample"] for r in rounds]
        )
        rows.append(
            {
                "name": name,
                "samples_per_s": float(np.median(rates)),
                "cpu_ms_per_sample": float(np.median(cpu)),
                "ratio": float(np.median(clock)),
                "ratio_low": float(clock.min()),
                "ratio_high": float(clock.max()),
                "ratio_by_cpu": float(np.median(by_cpu)),
            }
        )
    return rows


def _summary_table(rows: Sequence[dict[str, Any]], window_frames: int) -> str:
    first = rows[0]["name"]
    ratio = f"{first} / it (lowest to highest)"
    head = ("loader", "samples/s", "frames/s", "CPU ms a sample", ratio, "by CPU time")
    lines = [
        (
            row["name"],
            f"{row['samples_per_s']:.1f}",
            f"{row['samples_per_s'] * window_frames:,.0f}",
            f"{row['cpu_ms_per_sample']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            f"{row['ratio_by_cpu']:.2f}",
        )
        for row in rows
    ]
    return table(head, lines)


def _shard(videos: Path, chosen: Sequence[Path], folder: Path, workers: int) -> dict[str, Path]:
    """The same clips as strips, H.264 and MJPEG, in shards small enough for all workers."""
    source_set = source_set_of(videos, chosen)
    made = {}
    forms = {
        "jpeg": NormalForm(),
        "mp4": NormalForm(payload="mp4", segment_frames=_MP4_SEGMENT_FRAMES),
        "mjpeg": NormalForm(payload="mp4", codec="mjpeg", quantizer=3),
    }
    for name, form in forms.items():
        made[name] = folder / name
        settings = ShardSettings(
            form=form, workers=workers, samples_per_shard=max(1, len(chosen) // (4 * workers))
        )
        shard_set(source_set, made[name], settings)
    return made


def _find(options: DataOptions, folder: Path, workers: int) -> tuple[Path, list[Path]]:
    """The videos that were asked for, or generated ones."""
    videos = options.videos
    if videos is None:
        videos = folder / "videos"
        settings = VideoSettings(
            videos_per_class=max(1, options.limit // 8), classes=8, width=320, height=240
        )
        make_videos(videos, settings, workers=workers, progress=False)
    return videos, find_videos(videos, options.limit)


def _contenders(
    peers: Sequence[str], made: dict[str, Path], config: DataConfig, device: torch.device
) -> list[Contender]:
    reader = ShardReader(made["jpeg"])
    workers = config.threads
    contenders: list[Contender] = [StrataContender("strata", reader, config, device)]
    for name in peers:
        payload = name.partition("-")[0] if name in DECODERS else "jpeg"
        shards = sorted(made[payload].glob("*.tar"))
        if name in DECODERS:
            contenders.append(
                TorchPeer(
                    name,
                    shards,
                    batch_size=config.batch_size,
                    workers=workers,
                    views=config.views,
                    clips=config.clips,
                    size=config.size,
                )
            )
        else:
            contenders.append(
                DaliPeer(
                    shards,
                    reader.manifest.form,
                    batch_size=config.batch_size,
                    threads=workers,
                    views=config.views,
                    clips=config.clips,
                    size=config.size,
                    device="gpu" if device.type == "cuda" else "cpu",
                )
            )
    return contenders


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: An option is out of its range, or there are no videos.
    """
    options = parse_options(DataOptions, argv, "data")
    if options.quick:
        options = dataclasses.replace(
            options, limit=min(options.limit, 8), batch=2, rounds=2, seconds=0.2
        )
    workers = options.workers or usable_cpus()
    device = best_device()
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        videos, chosen = _find(options, folder, workers)
        made = _shard(videos, chosen, folder, workers)
        config = DataConfig(
            shards=made["jpeg"],
            batch_size=min(options.batch, len(chosen)),
            size=options.size,
            threads=workers,
        )
        facts = machine(device)
        print(machine_line(facts))
        print(f"{len(chosen)} videos, batch {config.batch_size}, {workers} workers")
        parts = []
        # DALI decodes H.264 only on a GPU.
        for name in ("jpeg", "mp4" if device.type == "cuda" else "mjpeg"):
            each = dataclasses.replace(config, shards=made[name])
            parts += measure_parts(ShardReader(made[name]), each, device, options.seconds)
        print(parts_table(parts))
        threads = measure_threads(ShardReader(made["jpeg"]), config, device, options.seconds)
        print(threads_table(threads))
        contenders = _contenders(options.peers, made, config, device)
        for contender in contenders:
            stack.callback(contender.close)
        check_equal_work({c.name: c.next() for c in contenders})
        print("a batch of each: the same shapes, uint8, with pictures in it")
        runs = {c.name: partial(measure_round, c, options.seconds, device) for c in contenders}
        rounds = in_turns(runs, options.rounds)
        summary = summarize(rounds)
        print(_summary_table(summary, config.clips.window_frames))
        measured = {"parts": parts, "threads": threads, "rounds": rounds, "summary": summary}
        record = {"machine": facts, **measured}
        write_record(options.out, record)
