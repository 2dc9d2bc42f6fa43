"""Strata's loader taken apart: the costs of reading, decoding, augmenting; and more threads."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from strata.counter_random import Stream, uniforms
from strata.dataload.clips import training_window
from strata.dataload.config import DataConfig
from strata.dataload.cpu_pipeline import window_decoder
from strata.dataload.decode_windows import CodedWindows, read_windows
from strata.dataload.graph_spec import GraphSpec
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.format.schema import checksum, segment_ext
from strata.limits import usable_cpus
from strata.tools.benchmarks.contenders import SEED, StrataContender
from strata.tools.benchmarks.measure import table

__all__ = ["measure_parts", "measure_threads", "parts_table", "threads_table"]


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
        self._plan = open_plan(reader, config, SEED)

    def _cost(self, run: Callable[[int], Any]) -> _Cost:
        """What a function costs that makes batch `k`."""
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
        draws = uniforms(SEED, Stream.WINDOW, epoch, samples, 0, 2)
        return samples, training_window(self._reader.num_frames[samples], self._config.clips, draws)

    def _coded(self, number: int) -> CodedWindows:
        """The coded windows of a batch, cut out as the loader does."""
        return read_windows(self._reader, *self._windows(number))

    def read(self) -> _Cost:
        """Reading and cutting in one thread."""
        return self._cost(self._coded)

    def checksums(self) -> _Cost:
        """What of reading is the comparison with checksums: of table, head and used frames."""
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
        coded = [self._coded(k) for k in range(min(4, self._plan.steps_per_epoch))]
        run = self._graph() if device == "gpu" else self._decoders()
        return self._cost(lambda number: run(coded[number % len(coded)]))

    def _decoders(self) -> Callable[[CodedWindows], Any]:
        """A function that decodes a batch as the loader does on a CPU."""
        form = self._reader.manifest.form
        spec = GraphSpec(
            batch_size=self._config.batch_size,
            strip_frames=self._config.clips.window_frames,
            coded="video" if form.payload == "mp4" else "strip",
            height=form.height,
            width=form.width,
            size=self._config.size,
            views=(),
            photometric=False,
            decode="cpu",
            augment="cpu",
            device_id=None,
            num_threads=self._threads,
        )
        own = threading.local()
        pool = ThreadPoolExecutor(
            self._threads, initializer=lambda: setattr(own, "decode", window_decoder(spec))
        )

        def run(windows: CodedWindows) -> None:
            places = windows.places or [None] * len(windows.coded)
            list(pool.map(lambda *window: own.decode(*window), windows.coded, places))

        return run

    def _graph(self) -> Callable[[CodedWindows], Any]:
        """A function that decodes a batch on the GPU."""
        is_video = self._reader.manifest.form.payload == "mp4"

        @pipeline_def
        def graph() -> Any:
            coded = fn.external_source(name="coded")
            if is_video:
                return fn.decoders.video(
                    coded, device="mixed", frames=fn.external_source(name="seen")
                )
            return fn.decoders.image(coded, device="mixed", output_type=types.DALIImageType.RGB)

        pipe: Any = graph(
            batch_size=self._config.batch_size,
            num_threads=self._threads,
            device_id=self._device.index,
            prefetch_queue_depth=1,
        )
        pipe.build()

        def run(windows: CodedWindows) -> None:
            pipe.feed_input("coded", list(windows.coded))
            if is_video:
                pipe.feed_input("seen", [np.unique(p).astype(np.int32) for p in windows.places])
            pipe.run()

        return run

    def total(self, config: DataConfig, skip: int = 0) -> _Cost:
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
        return self.total(full, skip=self._plan.steps_per_epoch)


def _devices(on_gpu: bool) -> list[tuple[Literal["cpu", "gpu"], Literal["cpu", "gpu"]]]:
    return [("cpu", "cpu"), ("cpu", "gpu"), ("gpu", "gpu")] if on_gpu else [("cpu", "cpu")]


def measure_parts(
    reader: ShardReader, config: DataConfig, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Read, decode, augment, total and from a cache for each way of decoding and augmenting.

    Checksums are a part of reading, measured alone.

    The loader makes one batch after the other, so a sample's time is the sum of its parts' times:
    augmenting is what is left of the total after reading and decoding, feeding and copying too.
    """
    parts = _Parts(reader, config, device, seconds)
    frames = config.clips.window_frames
    read = parts.read()
    rows = []
    for decode, augment in _devices(device.type == "cuda"):
        chosen = dataclasses.replace(config, decode=decode, augment=augment)
        decoded, total = parts.decode(decode), parts.total(chosen)
        costs = {"read": read, "decode": decoded, "augment": total - decoded - read}
        costs["total"] = total
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


def parts_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `measure_parts` in Markdown."""
    head = ("payload", "decode", "augment", "part", "samples/s", "frames/s", "CPU ms a sample")
    lines = []
    for row in rows:
        names = [row[n] for n in ("payload", "decode", "augment", "part")]
        rates = ["hidden", "hidden"]
        if row["samples_per_s"]:
            rates = [f"{row['samples_per_s']:.1f}", f"{row['frames_per_s']:,.0f}"]
        lines.append([*names, *rates, f"{row['cpu_ms_per_sample']:.2f}"])
    return table(head, lines)


def measure_threads(
    reader: ShardReader, config: DataConfig, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """The loader, decoding and augmenting on the CPU, with 1, 2, 4, ... threads up to the cores."""
    rows = []
    threads = 1
    while threads <= usable_cpus():
        chosen = dataclasses.replace(config, decode="cpu", augment="cpu", threads=threads)
        cost = _Parts(reader, chosen, device, seconds).total(chosen)
        rows.append(
            {
                "threads": threads,
                "samples_per_s": 1 / cost.clock_s,
                "cpu_ms_per_sample": cost.cpu_s * 1e3,
            }
        )
        threads *= 2
    return rows


def threads_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `measure_threads` in Markdown."""
    lines = [
        (row["threads"], f"{row['samples_per_s']:.1f}", f"{row['cpu_ms_per_sample']:.2f}")
        for row in rows
    ]
    return table(("threads", "samples/s", "CPU ms a sample"), lines)
