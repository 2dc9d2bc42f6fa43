"""How fast batches are made, beside what others would use: `python tools/bench.py dataload --help`.

First Strata's parts alone: reading (cutting coded frames out of shards), decoding, augmenting, and
the whole loader. Then whole loaders in turns, on the same clips, with the same recipe and as many
workers as cores: Strata, webdataset in a torch DataLoader over H.264 and over our JPEGs, and DALI's
own reader and random operators. Every contender makes the same views: two clips of 16 and the
sequence of 32 frames, uint8. Before anything is timed, a batch of each is compared with Strata's.

A ratio is taken within a round, in which all contenders had the machine one after the other; the
table gives its median and range over the rounds.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from strata.counter_random import Stream, uniforms
from strata.dataload.clips import training_window
from strata.dataload.loader import DataConfig, TrainLoader, open_plan
from strata.dataload.reader import ShardReader
from strata.dataload.videos import CodedWindows, read_windows
from strata.distributed import World
from strata.errors import ConfigError
from strata.preprocess.run import ShardSettings, shard_set
from strata.preprocess.sources import VIDEO_SUFFIXES, Source, SourceSet
from strata.schema import NormalForm
from strata.tools.benchmarks.dali_loader import DaliPeer
from strata.tools.benchmarks.webdataset_loaders import DECODERS, TorchPeer
from strata.tools.make_videos import VideoSettings, make_videos

__all__ = ["main"]

_SEED = 0
_FOREVER = 1_000_000
_SETTLE_S, _IDLE_SHARE = 0.3, 0.05
_MP4_SEGMENT_FRAMES = 511
"""A video is one mp4, as others store it."""
_PEERS = {
    "mp4-pyav": "webdataset, H.264, PyAV, torchvision v2",
    "jpeg-pil": "webdataset, our JPEGs, PIL, torchvision v2",
    "jpeg-torchvision": "webdataset, our JPEGs, decode_jpeg, torchvision v2",
    "jpeg-whole": "webdataset, our JPEGs decoded whole, torchvision v2",
    "dali": "fn.readers.webdataset, our JPEGs, DALI's random operators",
}


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
        )
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
    """Wait until a contender has made all it makes ahead, or the next one would pay for it."""
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


def _round(contender: Contender, seconds: float, synchronize: Callable[[], None]) -> dict[str, Any]:
    """One turn: skip what was made ahead, then count batches for at least `seconds`."""
    for _ in range(contender.ahead):
        contender.next()
    synchronize()
    cpu = _cpu_seconds(contender.pids)
    start, samples, count = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds or count % contender.granularity:
        samples += len(contender.next()[0])
        count += 1
    synchronize()
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
        """What a function costs that makes batch `k`."""
        run(0)
        start, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < self._seconds:
            count += 1
            run(count)
        samples = count * self._config.batch_size
        return _Cost((time.perf_counter() - start) / samples, (time.process_time() - cpu) / samples)

    def _coded(self, number: int) -> CodedWindows:
        """The coded windows of a batch, cut out as the loader does."""
        epoch, step = divmod(number, self._plan.steps_per_epoch)
        samples = self._plan.batch(epoch, step, 0, 1)
        draws = uniforms(_SEED, Stream.WINDOW, epoch, samples, 0, 2)
        windows = training_window(self._reader.num_frames[samples], self._config.clips, draws)
        return read_windows(self._reader, samples, windows)

    def read(self) -> _Cost:
        """Reading and cutting in one thread."""
        return self._cost(self._coded)

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


def _print_parts(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'payload':<9}{'decode':<8}{'augment':<9}{'part':<9}{'samples/s':>11}{'frames/s':>11}"
        f"{'CPU ms':>9}"
    )
    for row in rows:
        rate = row["samples_per_s"]
        told = f"{rate:>11.1f}{row['frames_per_s']:>11,.0f}" if rate else f"{'hidden':>22}"
        told += f"{row['cpu_ms_per_sample']:>9.2f}"
        names = f"{row['payload']:<9}{row['decode']:<8}{row['augment']:<9}{row['part']:<9}"
        print(names + told, flush=True)


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


def _print_summary(rows: Sequence[dict[str, Any]], window_frames: int) -> None:
    first = rows[0]["name"]
    print(
        f"{'loader':<18}{'samples/s':>10}{'frames/s':>10}{'CPU ms':>8}  "
        f"{f'{first} / it':>11} {'lowest to highest':>18}{'by CPU':>8}"
    )
    for row in rows:
        spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        print(
            f"{row['name']:<18}{row['samples_per_s']:>10.1f}"
            f"{row['samples_per_s'] * window_frames:>10,.0f}{row['cpu_ms_per_sample']:>8.1f}  "
            f"{row['ratio']:>11.2f} {spread:>18}{row['ratio_by_cpu']:>8.2f}"
        )


def _shard(videos: Path, chosen: Sequence[Path], folder: Path, workers: int) -> dict[str, Path]:
    """The same clips as strips, H.264 and MJPEG, in shards small enough for all workers."""
    sources = tuple(
        Source(name=p.relative_to(videos).as_posix(), path=p, label=0, num_bytes=p.stat().st_size)
        for p in chosen
    )
    source_set = SourceSet(dataset="bench", split="all", classes=("any",), sources=sources)
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
        shard_set(source_set, videos, made[name], settings)
    return made


def _find(args: argparse.Namespace, folder: Path, workers: int) -> tuple[Path, list[Path]]:
    """The videos that were asked for, or drawn ones."""
    videos = args.videos
    if videos is None:
        videos = folder / "videos"
        settings = VideoSettings(
            videos_per_class=max(1, args.limit // 8), classes=8, width=320, height=240
        )
        make_videos(videos, settings, workers=workers, progress=False)
    found = sorted(p for p in videos.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ConfigError(f"no videos in {videos}; mend --videos")
    return videos, found[:: max(len(found) // args.limit, 1)][: args.limit]


def _contenders(
    args: argparse.Namespace, made: dict[str, Path], config: DataConfig, device: torch.device
) -> list[Contender]:
    reader = ShardReader(made["jpeg"])
    workers = config.threads
    contenders: list[Contender] = [StrataContender("strata", reader, config, device)]
    for name in args.peers:
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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench.py dataload", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    say = parser.add_argument
    say("--videos", type=Path, default=None, help="folder of videos; without it they are drawn")
    say("--limit", type=int, default=96, help="videos, evenly chosen")
    say("--batch", type=int, default=16, help="samples in a batch")
    say("--size", type=int, default=112, help="rows and columns of a view")
    say("--rounds", type=int, default=5, help="turns of each loader")
    say("--seconds", type=float, default=6.0, help="of a turn, and of a part, at least")
    say("--workers", type=int, default=0, help="processes or threads; 0: one for each CPU")
    known = ", ".join(f"{name} ({told})" for name, told in _PEERS.items())
    say("--peers", nargs="*", default=list(_PEERS), help=f"whom to compare with: {known}")
    say("--work", type=Path, default=None, help="keep and reuse the shards here")
    say("--out", type=Path, default=None, help="JSON file to write")
    say("--quick", action="store_true", help="small and short, to see that it runs")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.peers) - set(_PEERS))
    if unknown:
        raise ConfigError(f"--peers has no {unknown[0]}; use {', '.join(_PEERS)}")
    if args.quick:
        args.limit, args.batch, args.rounds, args.seconds = min(args.limit, 8), 2, 2, 0.2
    for name in ("limit", "batch", "size", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; use 1 or more")
    return args


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: An option is out of its range, or there are no videos.
    """
    args = _parse(argv)
    workers = args.workers or len(os.sched_getaffinity(0))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with ExitStack() as stack:
        folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        videos, chosen = _find(args, folder, workers)
        made = _shard(videos, chosen, folder, workers)
        config = DataConfig(
            shards=made["jpeg"],
            batch_size=min(args.batch, len(chosen)),
            size=args.size,
            threads=workers,
        )
        machine = {
            "cores": len(os.sched_getaffinity(0)),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
        }
        print(
            f"{len(chosen)} videos, batch {config.batch_size}, {workers} workers, on "
            f"{machine['device']} with {machine['cores']} cores, load {machine['load']:.1f}"
        )
        parts = []
        # DALI decodes H.264 on a GPU alone.
        for name in ("jpeg", "mp4" if device.type == "cuda" else "mjpeg"):
            each = dataclasses.replace(config, shards=made[name])
            parts += measure_parts(ShardReader(made[name]), each, device, args.seconds)
        _print_parts(parts)
        contenders = _contenders(args, made, config, device)
        for contender in contenders:
            stack.callback(contender.close)
        check_equal_work({c.name: c.next() for c in contenders})
        print("a batch of each: the same shapes, uint8, pictures in it")
        rounds = []
        for number in range(args.rounds):
            # Another order each round, so that nobody always comes after the same neighbour.
            first = number % len(contenders)
            order = contenders[first:] + contenders[:first]
            turn = {c.name: _round(c, args.seconds, synchronize) for c in order}
            rounds.append({c.name: turn[c.name] for c in contenders})
        summary = summarize(rounds)
        _print_summary(summary, config.clips.window_frames)
        if args.out is not None:
            found = {"machine": machine, "parts": parts, "rounds": rounds, "summary": summary}
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
