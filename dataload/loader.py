"""Loaders of training and evaluation batches: prefetched, in a deterministic order."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from strata import launch
from strata.counter_random import Stream, uniforms
from strata.dataload.augment import (
    AugmentSpec,
    ViewParameters,
    centre_crop,
    draw_view,
    ten_crops,
)
from strata.dataload.clips import ClipSpec, evaluation_clips, training_window
from strata.dataload.decode_windows import CodedWindows, choose_decoder, read_windows
from strata.dataload.faults import (
    Fault,
    FaultLog,
    SampleFaultError,
    replace_faulty,
)
from strata.dataload.frame_cache import CacheChoice, FrameCache
from strata.dataload.pipeline import ClipPipeline, GraphSpec, ViewSlice, find_undecodable
from strata.dataload.plan import Plan, evaluation_slots
from strata.dataload.prefetch import Prefetcher
from strata.dataload.reader import ShardReader
from strata.dataload.storage import DownloadConfig
from strata.distributed import World
from strata.errors import ConfigError
from strata.format.schema import Payload
from strata.limits import usable_cpus

__all__ = [
    "Batch",
    "ClipBatch",
    "DataConfig",
    "EvaluationLoader",
    "TrainLoader",
    "open_plan",
]

DeviceChoice = Literal["cpu", "gpu", "auto"]

_CODED: dict[Payload, Literal["strip", "video", "frames"]] = {
    "jpeg": "strip",
    "mp4": "video",
    "foreign": "frames",
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the training data: shards, batch size, clips and augmentation."""

    shards: str | Path
    """A folder that tools/shard.py wrote, or its URL (s3://, gs://, http://)."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """The local cache of shards at a URL."""
    batch_size: int = 256
    """Samples in a global batch, over all ranks. TEXT: 256."""
    size: int = 112
    """Rows and columns of a view, in pixels. TEXT: 112."""
    clips: ClipSpec = field(default_factory=ClipSpec)
    """The window and its views."""
    views: AugmentSpec = field(default_factory=AugmentSpec)
    """Augmentation of each view."""
    decode: DeviceChoice = "auto"
    """Where frames are decoded; auto is the GPU if this rank trains on one that can decode."""
    augment: DeviceChoice = "auto"
    """Where views are augmented; auto is the GPU if this rank trains on one."""
    cache: CacheChoice = "none"
    """Where decoded frames are cached, see dataload/frame_cache.py: host is memory that the ranks
    of a node share, device is each rank's GPU. Batches are bit-identical to those of decode cpu."""
    threads: int = 0
    """DALI threads of a rank; 0 divides the machine's cores equally among its ranks."""
    prefetch: int = 2
    """Batches to prefetch."""
    pool_samples: int = 16_384
    """Samples shuffled together, see dataload/plan.py."""
    check: Literal["size", "hash"] = "size"
    """Whether shards are checked at start by size or by SHA-256."""
    max_faults: int = 0
    """Distinct samples that may fail to decode on a rank before the run stops; dataload/faults.py
    describes their replacement. Evaluation replaces none: any fault stops it."""
    stall_s: float = 600.0
    """Seconds to wait for a batch before the run stops with the stacks of all threads."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        for name in ("batch_size", "size", "prefetch", "pool_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; use 1 or more")
        if self.max_faults < 0:
            raise ConfigError(f"data.max_faults is {self.max_faults}; use 0 or more")
        if self.threads < 0 or self.stall_s <= 0:
            raise ConfigError("data.threads must be 0 or more and data.stall_s above 0")
        if self.decode == "gpu" and self.augment == "cpu":
            raise ConfigError("data.augment cpu cannot follow data.decode gpu; decode on the cpu")
        if self.decode == "gpu" and self.cache != "none":
            raise ConfigError(
                f"data.cache {self.cache} keeps what the CPU decodes, but data.decode is gpu; use "
                "data.decode auto or cpu, or data.cache none"
            )
        if self.augment == "cpu" and self.cache == "device":
            raise ConfigError(
                "data.cache device is for augmenting on the GPU, but data.augment is cpu; use "
                "data.augment auto or gpu, or data.cache host"
            )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's share of one global training batch, on the device.

    b samples, T frames a short clip, L frames of the long sequence, S rows and columns.
    """

    short: Tensor
    """uint8 `[b, 2, T, S, S, 3]`: two consecutive clips of each video."""
    long: Tensor | None
    """uint8 `[b, L, S, S, 3]`: the long sequence; None if the epoch's stage has none."""
    samples: np.ndarray
    """int64 `[b]`: indices of the samples in the batch, replacements included."""
    faults: tuple[Fault, ...]
    """Samples found faulty since the previous batch."""
    epoch: int
    step: int
    """Step within the epoch."""
    frames_decoded: int
    """Shard bytes read; with a cache, only those read to fill it."""
    bytes_read: int
    read_s: float = 0.0
    """Seconds of the loader's thread to read the coded bytes or the cached frames."""
    graph_s: float = 0.0
    """Seconds of the loader's thread to decode and augment."""


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """A rank's batch of an evaluation pass, on the device."""

    clips: Tensor
    """uint8 `[n, clips per video, T, S, S, 3]`; ten crops of a clip are consecutive."""
    samples: np.ndarray
    """int64 `[n]`: sample indices."""
    valid: np.ndarray
    """bool `[n]`: False where a sample is repeated to fill the batch."""
    frames_decoded: int
    bytes_read: int


def open_plan(reader: ShardReader, config: DataConfig, seed: int) -> Plan:
    """Make the order of samples for pretraining, without videos shorter than the window.

    Raises:
        ConfigError: Fewer videos are long enough than a batch needs.
    """
    _check_room(reader, config)
    too_short = np.flatnonzero(reader.num_frames < config.clips.window_frames)
    return Plan(
        shard_sizes=tuple(s.num_samples for s in reader.manifest.shards),
        batch_size=config.batch_size,
        seed=seed,
        pool_samples=config.pool_samples,
        left_out=tuple(too_short.tolist()),
    )


def _check_room(reader: ShardReader, config: DataConfig) -> None:
    """Reject a download cache that is too small for the shards of one shuffle pool."""
    entries = reader.manifest.shards
    total = sum(e.num_bytes for e in entries)
    share = min(1.0, config.pool_samples / max(reader.num_samples, 1))
    needed = min(total, int(total * share) + 2 * max((e.num_bytes for e in entries), default=0))
    if reader.limit_bytes is not None and needed > reader.limit_bytes:
        raise ConfigError(
            f"data.download.gigabytes is {config.download.gigabytes:g}, but data.pool_samples "
            f"{config.pool_samples} of {reader.location} are up to {needed / 1e9:.3g} GB at a "
            "time; allow that much, or use smaller pools"
        )


class _GraphMaker:
    """Builds and runs the DALI graphs of a rank; holds the settings that they share."""

    def __init__(self, reader: ShardReader, config: DataConfig, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        for name in ("decode", "augment"):
            if getattr(config, name) == "gpu" and not on_gpu:
                raise ConfigError(
                    f"data.{name} is gpu, but this rank has no GPU; use data.{name} auto or cpu"
                )
        if config.cache == "device" and not on_gpu:
            raise ConfigError(
                "data.cache is device, but this rank has no GPU; use data.cache host or none"
            )
        self.reader = reader
        self.decode: Literal["cpu", "gpu"] = "gpu" if on_gpu and config.decode != "cpu" else "cpu"
        self.augment: Literal["cpu", "gpu"] = "gpu" if on_gpu and config.augment != "cpu" else "cpu"
        self.cached = config.cache != "none"
        if self.augment == "cpu" or self.cached:
            self.decode = "cpu"
        self.decode = choose_decoder(reader, config.decode, device, self.decode)
        self.device = device
        self.size = config.size
        self.colour_maps = config.views.per_frame or config.views.gray > 0
        self.threads = config.threads or max(1, usable_cpus() // launch.ranks_of_node())

    def build(
        self, *, batch_size: int, strip_frames: int, views: Sequence[ViewSlice], photometric: bool
    ) -> ClipPipeline:
        form = self.reader.manifest.form
        return ClipPipeline(
            GraphSpec(
                batch_size=batch_size,
                strip_frames=strip_frames,
                coded="frames" if self.cached else _CODED[form.payload],
                frames_on=self.augment if self.cached else "cpu",
                height=form.height,
                width=form.width,
                size=self.size,
                views=tuple(views),
                photometric=photometric,
                colour_maps=self.colour_maps,
                decode=self.decode,
                augment=self.augment,
                device_id=self.device.index if self.device.type == "cuda" else None,
                num_threads=self.threads,
            )
        )

    def run(
        self,
        pipeline: ClipPipeline,
        samples: Sequence[int],
        windows: CodedWindows,
        views: Sequence[ViewParameters],
    ) -> list[Tensor]:
        """Run a graph; if it fails, raise an error with the faulty samples."""
        try:
            made = pipeline.run(windows.coded, views, windows.places)
            return [v.to(self.device, non_blocking=True) for v in made]
        except RuntimeError as error:
            if pipeline.spec.coded == "frames" or isinstance(windows.coded, Tensor):
                raise  # Cached frames were decoded before, so no sample is at fault.
            found = find_undecodable(pipeline.spec, windows.coded, views, windows.places)
            if not found:
                raise
            raise SampleFaultError(
                [self.reader.fault(samples[place], why) for place, why in found]
            ) from error


class _Stream:
    """The CUDA side stream of a GPU loader, so that its work does not queue behind training."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def produce(self, items: Iterator[Any]) -> Iterator[tuple[Any, torch.cuda.Event | None]]:
        """Make items on the side stream, each with an event that marks its completion."""
        if self._stream is None:
            for item in items:
                yield item, None
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            for item in items:
                event = torch.cuda.Event()
                event.record(self._stream)
                yield item, event

    @staticmethod
    def hand_over(event: torch.cuda.Event | None, tensors: Sequence[Tensor | None]) -> None:
        """Make the consumer's stream wait for the item without blocking the host."""
        if event is None:
            return
        current = torch.cuda.current_stream()
        current.wait_event(event)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(current)


class TrainLoader:
    """Training batches of one rank, from a position to the end of an epoch range.

    The only state is the position, which every batch carries.

    Args:
        reader: The data set.
        config: Settings of the batches.
        plan: The order of samples.
        world: This rank and its peers.
        device: Where batches go.
        epochs: First epoch and the one after the last.
        start_step: Step within the first epoch to start at.
        wants_long: Whether an epoch's batches carry the long sequence.
    """

    def __init__(
        self,
        reader: ShardReader,
        config: DataConfig,
        plan: Plan,
        *,
        world: World,
        device: torch.device,
        epochs: tuple[int, int],
        start_step: int = 0,
        wants_long: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._reader, self._config, self._plan, self._world = reader, config, plan, world
        self._maker = _GraphMaker(reader, config, device)
        self._graphs: dict[bool, ClipPipeline] = {}
        self._faults = FaultLog(config.max_faults)
        self._epochs, self._start_step, self._wants_long = epochs, start_step, wants_long
        self._stream = _Stream(device)
        plan.batch(epochs[0], 0, world.rank, world.size)  # rejects an indivisible batch size
        self._cache: FrameCache | None = None
        if config.cache != "none":
            on = device if self._maker.augment == "gpu" else torch.device("cpu")
            self._cache = FrameCache(reader, config.cache, on, self._maker.threads)
        self._prefetcher: Prefetcher[tuple[Batch, torch.cuda.Event | None]] = Prefetcher(
            self._stream.produce(self._batches()), depth=config.prefetch, stall_s=config.stall_s
        )

    def _graph(self, with_long: bool) -> ClipPipeline:
        if with_long not in self._graphs:
            clips = self._config.clips
            views = [
                ViewSlice(0, clips.clip_frames),
                ViewSlice(clips.clip_frames, clips.clip_frames),
            ]
            if with_long:
                views.append(ViewSlice(0, clips.long_frames, clips.long_stride))
            self._graphs[with_long] = self._maker.build(
                batch_size=self._config.batch_size // self._world.size,
                strip_frames=clips.window_frames,
                views=views,
                photometric=True,
            )
        return self._graphs[with_long]

    def _batches(self) -> Iterator[Batch]:
        start = self._start_step
        for epoch in range(*self._epochs):
            for step in range(start, self._plan.steps_per_epoch):
                self._fetch_ahead(epoch, step)
                yield self._make(epoch, step)
            start = 0

    def _fetch_ahead(self, epoch: int, step: int) -> None:
        """Request the samples of the next pool, so that remote shards arrive in time."""
        if self._reader.limit_bytes is not None:
            start = step * self._plan.batch_size
            coming = self._plan.epoch_order(epoch)[start : start + self._plan.pool_samples]
            self._reader.fetch_ahead(coming if self._cache is None else self._cache.missing(coming))

    def _windows(self, samples: np.ndarray, windows: np.ndarray) -> CodedWindows:
        """The windows of several samples, as coded bytes or as cached frames."""
        if self._cache is None:
            return read_windows(self._reader, samples, windows, self._maker.threads)
        return self._cache.windows(samples, windows)

    def _make(self, epoch: int, step: int) -> Batch:
        """Make a batch; after a fault within the limit, make it again with replacements."""
        while True:
            try:
                return self._try(epoch, step)
            except SampleFaultError as error:
                self._faults.add(error.faults)
                # A DALI graph cannot be used after an error.
                graph = self._graphs.pop(self._wants_long(epoch), None)
                if graph is not None:
                    graph.close()

    def _try(self, epoch: int, step: int) -> Batch:
        plan, reader, config = self._plan, self._reader, self._config
        places = plan.batch(epoch, step, self._world.rank, self._world.size)
        samples = replace_faulty(
            places,
            plan.epoch_order(epoch)[: plan.steps_per_epoch * plan.batch_size],
            step * plan.batch_size + self._world.rank * len(places),
            plan.batch_size,
            self._faults.known,
        )
        draws = uniforms(plan.seed, Stream.WINDOW, epoch, places, 0, 2)
        windows = training_window(reader.num_frames[samples], config.clips, draws)
        start = time.perf_counter()
        coded = self._windows(samples, windows)
        read_s = time.perf_counter() - start
        graph = self._graph(self._wants_long(epoch))
        form = reader.manifest.form
        parameters = [
            draw_view(
                config.views,
                height=form.height,
                width=form.width,
                size=config.size,
                frames=graph.spec.views[view].num_frames,
                seed=plan.seed,
                epoch=epoch,
                samples=places,
                view=view,
            )
            for view in range(len(graph.spec.views))
        ]
        start = time.perf_counter()
        views = self._maker.run(graph, samples.tolist(), coded, parameters)
        graph_s = time.perf_counter() - start
        return Batch(
            short=torch.stack(views[:2], dim=1),
            long=views[2] if len(views) > 2 else None,
            samples=samples,
            faults=self._faults.take_new(),
            epoch=epoch,
            step=step,
            frames_decoded=coded.num_frames,
            bytes_read=coded.num_bytes,
            read_s=read_s,
            graph_s=graph_s,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over batches in the plan's order."""
        for batch, event in self._prefetcher:
            self._stream.hand_over(event, [batch.short, batch.long])
            yield batch

    @property
    def queue_depth(self) -> int:
        """Number of batches that are ready."""
        return self._prefetcher.depth

    def close(self) -> None:
        """Stop the loader's thread and free its graphs and the cache."""
        self._prefetcher.close()
        for graph in self._graphs.values():
            graph.close()
        if self._cache is not None:
            self._cache.close()


class EvaluationLoader:
    """Evaluation batches of one rank: every sample exactly once, decoded as in training.

    Args:
        reader: The data set.
        config: Sizes and devices; batch size and cache are not used.
        world: This rank and its peers.
        device: Where batches go.
        videos_per_batch: Samples a rank takes at a time.
        num_clips: Clips per video.
        stride: Distance of neighbouring frames of a clip, in source frames.
        crop: Side of a crop over the shorter side of the frame.
        num_crops: 1 for the centre; or 10, see `ten_crops`: each clip is then repeated ten times.
        samples: Which samples; all of them by default.
    """

    def __init__(
        self,
        reader: ShardReader,
        config: DataConfig,
        *,
        world: World,
        device: torch.device,
        videos_per_batch: int,
        num_clips: int,
        stride: int,
        crop: float = 1.0,
        num_crops: Literal[1, 10] = 1,
        samples: Sequence[int] | None = None,
    ) -> None:
        # Each video is read once, so a cache is of no use.
        config = dataclasses.replace(config, cache="none")
        self._reader, self._config = reader, config
        self._maker = _GraphMaker(reader, config, device)
        chosen = np.arange(reader.num_samples) if samples is None else np.asarray(samples)
        slots, self._valid = evaluation_slots(len(chosen), videos_per_batch, world.rank, world.size)
        self._slots = chosen[slots]
        self._num_clips, self._stride = num_clips, stride
        self._crop, self._num_crops = crop, num_crops
        self._side = _Stream(device)
        self._graph = self._maker.build(
            batch_size=videos_per_batch * num_clips,
            strip_frames=config.clips.clip_frames,
            views=[ViewSlice(0, config.clips.clip_frames)] * num_crops,
            photometric=False,
        )
        self._prefetcher: Prefetcher[tuple[ClipBatch, torch.cuda.Event | None]] = Prefetcher(
            self._side.produce(self._batches()), depth=config.prefetch, stall_s=config.stall_s
        )

    def __len__(self) -> int:
        """Number of batches of this rank; the same on every rank."""
        return len(self._slots)

    def frames_of(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Frame numbers of the clips of samples: int64 `[N, clips per video, T]`."""
        return evaluation_clips(
            self._reader.num_frames[samples],
            num_clips=self._num_clips,
            clip_frames=self._config.clips.clip_frames,
            stride=self._stride,
        )

    def _batches(self) -> Iterator[ClipBatch]:
        form = self._reader.manifest.form
        for samples, valid in zip(self._slots, self._valid, strict=True):
            frames = self.frames_of(samples)
            pairs = [
                (int(s), clip) for s, clips in zip(samples, frames, strict=True) for clip in clips
            ]
            coded = read_windows(
                self._reader, [s for s, _ in pairs], [c for _, c in pairs], self._maker.threads
            )
            place = {"height": form.height, "width": form.width, "share": self._crop}
            one = self._num_crops == 1
            crops = [centre_crop(len(pairs), **place)] if one else ten_crops(len(pairs), **place)
            shown = self._maker.run(self._graph, [sample for sample, _ in pairs], coded, crops)
            clips = torch.stack(shown, dim=1).flatten(0, 1)
            yield ClipBatch(
                clips=clips.unflatten(0, (len(samples), self._num_clips * self._num_crops)),
                samples=samples,
                valid=valid,
                frames_decoded=coded.num_frames,
                bytes_read=coded.num_bytes,
            )

    def __iter__(self) -> Iterator[ClipBatch]:
        """Iterate over batches in the order of samples."""
        for batch, event in self._prefetcher:
            self._side.hand_over(event, [batch.clips])
            yield batch

    def close(self) -> None:
        """Stop the loader's thread and free its graph."""
        self._prefetcher.close()
        self._graph.close()
