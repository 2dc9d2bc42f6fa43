"""Speed of loading compared with other loaders: `python tools/bench.py data --help`.

First Strata's parts alone: reading (cutting coded frames out of shards), decoding, augmenting, and
the complete loader. Then complete loaders in turns, on the same clips, with the same recipe and as
many workers as cores: Strata, webdataset in a torch DataLoader over H.264 and over our JPEGs, and
DALI's own reader and random operators. Every loader makes the same views: two clips of 16 and the
sequence of 32 frames, uint8. Before anything is timed, a batch of each is compared with Strata's.

A ratio is taken within a round, in which all loaders run one after the other; the table gives its
median and range over the rounds.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from strata.counter_random import Stream, uniforms
from strata.dataload.clips import training_window
from strata.dataload.config import DataConfig
from strata.dataload.decode_windows import CodedWindows, read_windows
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.format.schema import NormalForm, checksum, segment_ext
from strata.limits import usable_cpus
from strata.preprocess.run import ShardSettings, shard_set
from strata.tools.benchmarks.dali_loader import DaliPeer
from strata.tools.benchmarks.measure import (
    best_device,
    find_videos,
    in_turns,
    machine,
    machine_line,
    parse_options,
    require_known,
    require_positive,
    source_set_of,
    table,
    wait_for,
    write_record,
)
from strata.tools.benchmarks.webdataset_loaders import DECODERS, TorchPeer
from strata.tools.synthetic_videos import VideoSettings, make_videos

__all__ = ["main"]

_SEED = 0
_FOREVER = 1_000_000
_SETTLE_S, _IDLE_SHARE = 0.3, 0.05
_MP4_SEGMENT_FRAMES = 511
"""A video is one mp4, as other projects store it."""
_PEERS = {
    "mp4-pyav": "webdataset, H.264, PyAV, torchvision v2",
    "jpeg-pil": "webdataset, our JPEGs, PIL, torchvision v2",
    "jpeg-torchvision": "webdataset, our JPEGs, decode_jpeg, torchvision v2",
    "jpeg-whole": "webdataset, our JPEGs decoded completely, torchvision v2",
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
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        require_positive(self, "limit", "batch", "size", "rounds")
        require_known("peer", self.peers, list(_PEERS))


class Contender(Protocol):
    """Something that makes batches."""

    @property
    def name(self) -> str:
        """As in the table."""
        ...

    @property
    def granularity(self) -> int:
        """Batches that arrive together."""
        ...

    @property
    def ahead(self) -> int:
        """Batches that may be ready or under way when nobody asks."""
        ...

    @property
    def pids(self) -> Sequence[int]:
        """Processes of its own."""
        ...

    def next(self) -> tuple[Tensor, ...]:
        """Two short clips and the long sequence."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class StrataContender:
    """The training loader.

    Args:
        name: As in the table.
        reader: The shards.
        config: What batches look like.
        device: Where they go.
    """

    granularity = 1
    pids: tuple[int, ...] = ()

    def __init__(
        self, name: str, reader: ShardReader, config: DataConfig, device: torch.device
    ) -> None:
        self.name = name
        self.ahead = config.prefetch + 1
        self._loader = TrainLoader(
            reader,
            config,
            open_plan(reader, config, _SEED),
            world=World(),
            device=device,
            epochs=(0, _FOREVER),
        ).start()
        self._batches = iter(self._loader)

    def next(self) -> tuple[Tensor, ...]:
        """Two short clips and the long sequence, each uint8 `[b, T, S, S, 3]`."""
        batch = next(self._batches)
        if batch.long is None:
            raise AssertionError("the benchmark asks for the long sequence")
        return batch.short[:, 0], batch.short[:, 1], batch.long

    def close(self) -> None:
        """Stop the loader's thread."""
        self._loader.close()


def _cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of this process, all its threads, and the processes `pids`."""
    ticks = 0
    for pid in pids:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _settle(contender: Contender) -> None:
    """Wait until a contender has made all it makes ahead; otherwise it would slow the next one."""
    before, now = -1.0, _cpu_seconds(contender.pids)
    while now - before > _IDLE_SHARE * _SETTLE_S:
        time.sleep(_SETTLE_S)
        before, now = now, _cpu_seconds(contender.pids)


def _frames_in(batch: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    """The shape of each view with channels last, whatever the layout."""
    shapes = []
    for view in batch:
        last = view if view.shape[-1] == 3 else view.movedim(2, -1)
        shapes.append(tuple(last.shape))
    return shapes


def check_equal_work(batches: dict[str, tuple[Tensor, ...]]) -> None:
    """Compare a batch of every contender with the first's: shapes, type, and pictures in them.

    Raises:
        AssertionError: A contender makes something else, so its rate would mean nothing.
    """
    (first, expected), *_ = batches.items()
    for name, batch in batches.items():
        if _frames_in(batch) != _frames_in(expected):
            raise AssertionError(
                f"{name} makes {_frames_in(batch)}, {first} {_frames_in(expected)}"
            )
        for view in batch:
            spread = float(view.float().std())
            if view.dtype != torch.uint8 or spread < 5:
                raise AssertionError(f"{name}: {view.dtype}, standard deviation {spread:.1f}")


def _round(contender: Contender, seconds: float, device: torch.device) -> dict[str, Any]:
    """One turn: skip what was made ahead, then count batches for at least `seconds`."""
    for _ in range(contender.ahead):
        contender.next()
    wait_for(device)
    cpu = _cpu_seconds(contender.pids)
    start, samples, count = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds or count % contender.granularity:
        samples += len(contender.next()[0])
        count += 1
    wait_for(device)
    taken = time.perf_counter() - start
    cpu = _cpu_seconds(contender.pids) - cpu
    _settle(contender)
    return {
        "samples_per_s": samples / taken,
        "cpu_ms_per_sample": cpu / samples * 1e3,
        "samples": samples,
    }


@dataclass(frozen=True)
class _Cost:
    """Seconds for a sample, by the clock and of CPU time."""

    clock_s: float
    cpu_s: float

    def __sub__(self, part: "_Cost") -> "_Cost":
        return _Cost(self.clock_s - part.clock_s, self.cpu_s - part.cpu_s)


class _Parts:
    """Strata's loader taken apart.

    Args:
        reader: The shards.
        config: What batches look like.
        device: Where they go.
        seconds: Of each measurement.
    """

    def __init__(
        self, reader: ShardReader, config: DataConfig, device: torch.device, seconds: float
    ) -> None:
        self._reader, self._config, self._device = reader, config, device
        self._seconds = seconds
        self._threads = config.threads
        self._plan = open_plan(reader, config, _SEED)

    def _cost(self, run: Callable[[int], Any]) -> _Cost:
        """The cost of a function that makes batch `k`."""
        run(0)
        start, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < self._seconds:
            count += 1
            run(count)
        samples = count * self._config.batch_size
        return _Cost((time.perf_counter() - start) / samples, (time.process_time() - cpu) / samples)

    def _windows(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a batch and the frames of their windows."""
        epoch, step = divmod(number, self._plan.steps_per_epoch)
        samples = self._plan.batch(epoch, step, 0, 1)
        draws = uniforms(_SEED, Stream.WINDOW, epoch, samples, 0, 2)
        return samples, training_window(self._reader.num_frames[samples], self._config.clips, draws)

    def _coded(self, number: int) -> CodedWindows:
        """The coded windows of a batch, cut out as the loader does."""
        return read_windows(self._reader, *self._windows(number))

    def read(self) -> _Cost:
        """Reading and cutting in one thread."""
        return self._cost(self._coded)

    def checksums(self) -> _Cost:
        """The share of reading that checks checksums: of table, head and used frames."""
        batches = []
        for number in range(min(4, self._plan.steps_per_epoch)):
            samples, windows = self._windows(number)
            parts: list[bytes | memoryview] = []
            for sample, window in zip(samples.tolist(), windows, strict=True):
                table = self._reader.table(sample)
                segments = [
                    memoryview(self._reader.member(sample, segment_ext(k)))
                    for k in range(table.num_segments)
                ]
                parts += [table.to_bytes()[:-4], bytes(segments[0][: int(table.offsets[0])])]
                for frame in window.tolist():
                    start = int(table.offsets[frame])
                    segment = segments[frame // table.frames_per_segment]
                    parts.append(segment[start : start + int(table.lengths[frame])])
            batches.append(parts)

        def run(number: int) -> None:
            for part in batches[number % len(batches)]:
                checksum(part)

        return self._cost(run)

    def decode(self, device: Literal["cpu", "gpu"]) -> _Cost:
        """Decoding and nothing else."""
        on = "mixed" if device == "gpu" else "cpu"
        is_video = self._reader.manifest.form.payload == "mp4"

        @pipeline_def
        def graph() -> Any:
            coded = fn.external_source(name="coded")
            if is_video:
                return fn.decoders.video(coded, device=on, frames=fn.external_source(name="seen"))
            return fn.decoders.image(coded, device=on, output_type=types.DALIImageType.RGB)

        pipe: Any = graph(
            batch_size=self._config.batch_size,
            num_threads=self._threads,
            device_id=self._device.index if device == "gpu" else None,
            prefetch_queue_depth=1,
        )
        pipe.build()
        coded = [self._coded(k) for k in range(min(4, self._plan.steps_per_epoch))]

        def run(number: int) -> None:
            windows = coded[number % len(coded)]
            pipe.feed_input("coded", list(windows.coded))
            if is_video:
                pipe.feed_input("seen", [np.unique(p).astype(np.int32) for p in windows.places])
            pipe.run()

        return self._cost(run)

    def whole(self, config: DataConfig, skip: int = 0) -> _Cost:
        """The loader, after what it makes ahead and `skip` batches more."""
        contender = StrataContender("strata", self._reader, config, self._device)
        try:
            for _ in range(contender.ahead + skip):
                contender.next()
            return self._cost(lambda _: contender.next())
        finally:
            contender.close()

    def cached(self, config: DataConfig) -> _Cost:
        """The loader from a cache that is full."""
        full = dataclasses.replace(config, cache="host")
        return self.whole(full, skip=self._plan.steps_per_epoch)


def _devices(on_gpu: bool) -> list[tuple[Literal["cpu", "gpu"], Literal["cpu", "gpu"]]]:
    return [("cpu", "cpu"), ("cpu", "gpu"), ("gpu", "gpu")] if on_gpu else [("cpu", "cpu")]


def measure_parts(
    reader: ShardReader, config: DataConfig, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Read, decode, augment, whole and from a cache for each way of decoding and augmenting.

    Checksums are a part of reading, measured alone.

    The loader makes one batch after the other, so a sample's time is the sum of its parts' times:
    augmenting is what is left of the whole after reading and decoding, feeding and copying too.
    """
    parts = _Parts(reader, config, device, seconds)
    frames = config.clips.window_frames
    read = parts.read()
    rows = []
    for decode, augment in _devices(device.type == "cuda"):
        chosen = dataclasses.replace(config, decode=decode, augment=augment)
        decoded, whole = parts.decode(decode), parts.whole(chosen)
        costs = {"read": read, "decode": decoded, "augment": whole - decoded - read}
        costs["whole"] = whole
        form = reader.manifest.form
        if form.payload == "jpeg":
            costs["checksums"] = parts.checksums()
        if decode == "cpu" and form.payload == "jpeg":
            costs["cached"] = parts.cached(chosen)
        for part, cost in costs.items():
            rate = 1 / cost.clock_s if cost.clock_s > 0 else None
            rows.append(
                {
                    "payload": form.codec if form.payload == "mp4" else form.payload,
                    "decode": decode,
                    "augment": augment,
                    "part": part,
                    "samples_per_s": rate,
                    "frames_per_s": None if rate is None else rate * frames,
                    "cpu_ms_per_sample": cost.cpu_s * 1e3,
                }
            )
    return rows


def _parts_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("payload", "decode", "augment", "part", "samples/s", "frames/s", "CPU ms a sample")
    lines = []
    for row in rows:
        names = [row[n] for n in ("payload", "decode", "augment", "part")]
        rates = ["hidden", "hidden"]
        if row["samples_per_s"]:
            rates = [f"{row['samples_per_s']:.1f}", f"{row['frames_per_s']:,.0f}"]
        lines.append([*names, *rates, f"{row['cpu_ms_per_sample']:.2f}"])
    return table(head, lines)


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
        print(_parts_table(parts))
        contenders = _contenders(options.peers, made, config, device)
        for contender in contenders:
            stack.callback(contender.close)
        check_equal_work({c.name: c.next() for c in contenders})
        print("a batch of each: the same shapes, uint8, with pictures in it")
        runs = {c.name: partial(_round, c, options.seconds, device) for c in contenders}
        rounds = in_turns(runs, options.rounds)
        summary = summarize(rounds)
        print(_summary_table(summary, config.clips.window_frames))
        record = {"machine": facts, "parts": parts, "rounds": rounds, "summary": summary}
        write_record(options.out, record)
