"""Loaders of training and evaluation batches: prefetched, in a deterministic order."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from strata.dataload.augment import centre_crop, draw_view, ten_crops
from strata.dataload.clips import evaluation_clips
from strata.dataload.config import DataConfig
from strata.dataload.decode_windows import CodedWindows, read_windows
from strata.dataload.faults import Fault, FaultLog, SampleFaultError, replace_faulty
from strata.dataload.frame_cache import FrameCache
from strata.dataload.graph_spec import ViewSlice
from strata.dataload.graphs import GraphMaker, Pipeline, one_ahead
from strata.dataload.plan import Plan, evaluation_slots
from strata.dataload.prefetch import Loader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import BatchRecipe, PretrainingRecipe
from strata.distributed import World

__all__ = ["Batch", "ClipBatch", "EvaluationLoader", "TrainLoader"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's share of one global training batch, on the device.

    b samples, T frames a short clip, L frames of the long sequence, S rows and columns.
    """

    short: Tensor
    """uint8 `[b, V, T, S, S, 3]`: V short clips of each video; two in pretraining, else one."""
    long: Tensor | None
    """uint8 `[b, L, S, S, 3]`: the long sequence; None if the epoch has none."""
    samples: np.ndarray
    """int64 `[b]`: indices of the samples in the batch, replacements included."""
    faults: tuple[Fault, ...]
    """Samples found faulty since the previous batch."""
    epoch: int
    step: int
    """Step within the epoch."""
    frames_decoded: int
    bytes_read: int
    """Bytes read from shards; with a cache, only those read to fill it."""
    read_s: float = 0.0
    """Seconds of the loader's thread to read the coded bytes or the cached frames."""
    graph_s: float = 0.0
    """Seconds that the loader's thread waits for decoding and augmentation."""

    def tensors(self) -> list[Tensor]:
        """Its tensors on the device."""
        return [self.short] if self.long is None else [self.short, self.long]


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

    def tensors(self) -> list[Tensor]:
        """Its tensors on the device."""
        return [self.clips]


class TrainLoader(Loader[Batch]):
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
        recipe: What a batch has of each video; by default pretraining with `config.clips`.

    Raises:
        ConfigError: The batch does not divide by the ranks, or the device does not support a
            setting.
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
        recipe: BatchRecipe | None = None,
    ) -> None:
        super().__init__(device, depth=config.prefetch, stall_s=config.stall_s)
        self._reader, self._config, self._plan, self._world = reader, config, plan, world
        self._recipe = recipe or PretrainingRecipe(config.clips)
        self._maker = GraphMaker(reader, config, device)
        self._graphs: dict[tuple[ViewSlice, ...], Pipeline] = {}
        self._faults = FaultLog(config.max_faults)
        self._epochs, self._start_step = epochs, start_step
        plan.batch(epochs[0], 0, world.rank, world.size)  # rejects an indivisible batch size
        self._cache: FrameCache | None = None

    @property
    def ahead(self) -> int:
        """Batches that may be ready or begun when nobody asks for one."""
        return self._config.prefetch + 2

    def start(self) -> Self:
        """Start to make batches; a cache shared by the ranks of a node needs all of them.

        Raises:
            ConfigError: The cache does not fit into memory.
        """
        choice = self._config.cache
        if choice != "none" and self._cache is None:
            on = self._config.augments_on(self._device)
            self._cache = FrameCache(self._reader, choice, on, self._maker.threads)
        return super().start()

    def _graph(self, views: tuple[ViewSlice, ...]) -> Pipeline:
        if views not in self._graphs:
            self._graphs[views] = self._maker.build(
                batch_size=self._config.batch_size // self._world.size,
                strip_frames=self._recipe.window_frames,
                views=views,
                joined=self._recipe.num_short,
                photometric=True,
            )
        return self._graphs[views]

    def _batches(self) -> Iterator[Batch]:
        return one_ahead(self._begun())

    def _begun(self) -> Iterator[Callable[[], Batch]]:
        start = self._start_step
        for epoch in range(*self._epochs):
            for step in range(start, self._plan.steps_per_epoch):
                self._fetch_ahead(epoch, step)
                yield self._begin(epoch, step)
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

    def _begin(self, epoch: int, step: int) -> Callable[[], Batch]:
        """Begin a batch; after a fault within the limit, it is made again with replacements."""
        views = self._recipe.views(epoch)
        begun = self._try(epoch, step, views)

        def finish() -> Batch:
            made = begun
            while True:
                try:
                    return made()
                except SampleFaultError as error:
                    self._faults.add(error.faults)
                    made = self._try(epoch, step, views)

        return finish

    def _try(self, epoch: int, step: int, views: tuple[ViewSlice, ...]) -> Callable[[], Batch]:
        """Begin a batch with the samples known to be good; its end raises `SampleFaultError`."""
        plan, reader, recipe = self._plan, self._reader, self._recipe
        places = plan.batch(epoch, step, self._world.rank, self._world.size)
        samples = replace_faulty(
            places,
            plan.epoch_order(epoch)[: plan.steps_per_epoch * plan.batch_size],
            step * plan.batch_size + self._world.rank * len(places),
            plan.batch_size,
            self._faults.known,
        )
        lengths = reader.num_frames[samples]
        windows = recipe.windows(lengths, seed=plan.seed, epoch=epoch, places=places)
        start = time.perf_counter()
        try:
            coded = self._windows(samples, windows)
        except SampleFaultError as error:
            return _failing(error)
        read_s = time.perf_counter() - start
        form = reader.manifest.form
        parameters = [
            draw_view(
                self._config.views,
                height=form.height,
                width=form.width,
                size=self._config.size,
                frames=view.num_frames,
                seed=plan.seed,
                epoch=epoch,
                samples=places,
                view=number,
            )
            for number, view in enumerate(views)
        ]
        finish = self._maker.start(self._graph(views), samples.tolist(), coded, parameters)

        def made() -> Batch:
            start = time.perf_counter()
            short, *long = finish()
            return Batch(
                short=short,
                long=long[0] if long else None,
                samples=samples,
                faults=self._faults.take_new(),
                epoch=epoch,
                step=step,
                frames_decoded=coded.num_frames,
                bytes_read=coded.num_bytes,
                read_s=read_s,
                graph_s=time.perf_counter() - start,
            )

        return made

    def _free(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        if self._cache is not None:
            self._cache.close()


def _failing(error: SampleFaultError) -> Callable[[], Batch]:
    def fail() -> Batch:
        raise error

    return fail


class EvaluationLoader(Loader[ClipBatch]):
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
        super().__init__(device, depth=config.prefetch, stall_s=config.stall_s)
        # Each video is read once, so a cache is of no use.
        config = dataclasses.replace(config, cache="none")
        self._reader, self._config = reader, config
        self._maker = GraphMaker(reader, config, device)
        chosen = np.arange(reader.num_samples) if samples is None else np.asarray(samples)
        slots, self._valid = evaluation_slots(len(chosen), videos_per_batch, world.rank, world.size)
        self._slots = chosen[slots]
        self._num_clips, self._stride = num_clips, stride
        self._crop, self._num_crops = crop, num_crops
        self._graph: Pipeline | None = None

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
        return one_ahead(self._begun())

    def _begun(self) -> Iterator[Callable[[], ClipBatch]]:
        form, clip_frames = self._reader.manifest.form, self._config.clips.clip_frames
        self._graph = self._maker.build(
            batch_size=self._slots.shape[1] * self._num_clips,
            strip_frames=clip_frames,
            views=[ViewSlice(0, clip_frames)] * self._num_crops,
            joined=self._num_crops,
            photometric=False,
        )
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
            finish = self._maker.start(self._graph, [sample for sample, _ in pairs], coded, crops)
            yield partial(self._made, finish, samples, valid, coded)

    def _made(
        self,
        finish: Callable[[], list[Tensor]],
        samples: np.ndarray,
        valid: np.ndarray,
        coded: CodedWindows,
    ) -> ClipBatch:
        (crops,) = finish()
        num_clips = self._num_clips * self._num_crops
        return ClipBatch(
            clips=crops.flatten(0, 1).unflatten(0, (len(samples), num_clips)),
            samples=samples,
            valid=valid,
            frames_decoded=coded.num_frames,
            bytes_read=coded.num_bytes,
        )

    def _free(self) -> None:
        if self._graph is not None:
            self._graph.close()
