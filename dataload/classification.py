"""Training batches of a classifier: one augmented clip of each labelled video."""

from dataclasses import dataclass

import numpy as np
import torch

from strata.counter_random import Stream, uniforms
from strata.dataload.augment import draw_view
from strata.dataload.decode_windows import refuse_mixed_payloads
from strata.dataload.faults import replace_faulty
from strata.dataload.loader import Batch, DataConfig, TrainLoader
from strata.dataload.pipeline import ClipPipeline, ViewSlice
from strata.dataload.plan import Plan
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.errors import ConfigError, ShardError

__all__ = [
    "LabelledLoader",
    "LabelledSpec",
    "check_labels",
    "check_pair",
    "labelled_plan",
    "training_clip",
]

_PLACE_VIEW = 1
"""View number in Stream.WINDOW for classification; pretraining uses view 0."""


@dataclass(frozen=True, kw_only=True)
class LabelledSpec:
    """Length and stride of the clip that is cut from a video."""

    clip_frames: int
    """Frames of a clip."""
    stride: int
    """Distance of neighbouring frames, in source frames."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.clip_frames < 1 or self.stride < 1:
            raise ConfigError("clip_frames and stride must be 1 or more")


def check_labels(reader: ShardReader) -> None:
    """Check that a data set can be used for classification.

    Raises:
        ShardError: It is empty, or has samples without labels.
    """
    if not reader.num_samples:
        raise ShardError(f"{reader.location} has no samples; choose another set")
    if (reader.labels < 0).any():
        raise ShardError(
            f"{reader.location} has samples without labels; evaluate on a set with classes"
        )


def check_pair(train: ShardReader, test: ShardReader) -> None:
    """Check that a training and a test set have the same classes and payload.

    Raises:
        ConfigError: Their classes or payloads differ.
    """
    one, two = (r.manifest.classes for r in (train, test))
    if one != two:
        differing = ", ".join(sorted(set(one) ^ set(two))[:3]) or "another order"
        raise ConfigError(
            f"{train.location} and {test.location} have different classes ({len(one)} and "
            f"{len(two)}: {differing}); shard both from one data set"
        )
    refuse_mixed_payloads([train, test])


def labelled_plan(reader: ShardReader, config: DataConfig, seed: int) -> Plan:
    """Make the order of samples for classification; it has videos of every length.

    Raises:
        ConfigError: The set is smaller than a batch.
    """
    return Plan(
        shard_sizes=tuple(s.num_samples for s in reader.manifest.shards),
        batch_size=config.batch_size,
        seed=seed,
        pool_samples=config.pool_samples,
    )


def training_clip(num_frames: np.ndarray, spec: LabelledSpec, draws: np.ndarray) -> np.ndarray:
    """Choose one clip at a random position in each video.

    The start is uniform among the positions at which the clip fits the video; a video that is too
    short repeats its last frame, as in `evaluation_clips`.

    Args:
        num_frames: Shape `[N]`: frames of each video, at least 1.
        spec: Length and stride.
        draws: Shape `[N]`: uniform in [0, 1).

    Returns:
        Shape `[N, clip_frames]`, int64.
    """
    frames = np.asarray(num_frames, np.int64)
    room = np.maximum(frames - ((spec.clip_frames - 1) * spec.stride + 1), 0)
    starts = np.minimum(np.floor(draws * (room + 1)).astype(np.int64), room)
    points = starts[:, None] + spec.stride * np.arange(spec.clip_frames)
    return np.minimum(points, frames[:, None] - 1)


class LabelledLoader(TrainLoader):
    """Training batches with one augmented clip per video.

    `Batch.short` is `[b, 1, T, S, S, 3]`, and `Batch.long` is None. Faulty samples are logged and
    replaced up to `data.max_faults`, as in pretraining.

    Args:
        reader: The data set, all samples labelled.
        config: Batch size, size, augmentation and devices; its `clips` are not used.
        plan: The order of samples, see `labelled_plan`.
        spec: The clip.
        world: This rank and the world size.
        device: Where batches go.
        epochs: First epoch and the one after the last.
        start_step: Step within the first epoch to start at.
    """

    def __init__(
        self,
        reader: ShardReader,
        config: DataConfig,
        plan: Plan,
        spec: LabelledSpec,
        *,
        world: World,
        device: torch.device,
        epochs: tuple[int, int],
        start_step: int = 0,
    ) -> None:
        check_labels(reader)
        # Set before the parent's constructor, which starts a thread that makes batches.
        self._spec = spec
        super().__init__(
            reader,
            config,
            plan,
            world=world,
            device=device,
            epochs=epochs,
            start_step=start_step,
        )

    def _graph(self, with_long: bool) -> ClipPipeline:
        if with_long not in self._graphs:
            self._graphs[with_long] = self._maker.build(
                batch_size=self._config.batch_size // self._world.size,
                strip_frames=self._spec.clip_frames,
                views=[ViewSlice(0, self._spec.clip_frames)],
                photometric=True,
            )
        return self._graphs[with_long]

    def _try(self, epoch: int, step: int) -> Batch:
        plan, reader, config, spec = self._plan, self._reader, self._config, self._spec
        places = plan.batch(epoch, step, self._world.rank, self._world.size)
        samples = replace_faulty(
            places,
            plan.epoch_order(epoch)[: plan.steps_per_epoch * plan.batch_size],
            step * plan.batch_size + self._world.rank * len(places),
            plan.batch_size,
            self._faults.known,
        )
        draws = uniforms(plan.seed, Stream.WINDOW, epoch, places, _PLACE_VIEW, 1)
        frames = training_clip(reader.num_frames[samples], spec, draws[:, 0])
        coded = self._windows(samples, frames)
        form = reader.manifest.form
        drawn = draw_view(
            config.views,
            height=form.height,
            width=form.width,
            size=config.size,
            frames=spec.clip_frames,
            seed=plan.seed,
            epoch=epoch,
            samples=places,
            view=0,
        )
        (clips,) = self._maker.run(self._graph(True), samples.tolist(), coded, [drawn])
        return Batch(
            short=clips.unsqueeze(1),
            long=None,
            samples=samples,
            faults=self._faults.take_new(),
            epoch=epoch,
            step=step,
            frames_decoded=coded.num_frames,
            bytes_read=coded.num_bytes,
        )
