"""Recipes of training batches: which frames of a video a batch has, and the views cut from them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from strata.counter_random import Stream, uniforms
from strata.dataload.clips import ClipSpec, training_clip, training_window
from strata.dataload.config import DataConfig
from strata.dataload.graph_spec import ViewSlice
from strata.dataload.plan import Plan
from strata.dataload.reader import ShardReader
from strata.errors import ConfigError

__all__ = ["BatchRecipe", "ClassificationRecipe", "PretrainingRecipe", "open_plan"]


class BatchRecipe(ABC):
    """Recipes of batches: the window of frames of each video, and the views of it."""

    num_short: ClassVar[int]
    """Views that become `Batch.short`; one more becomes `Batch.long`."""

    @abstractmethod
    def views(self, epoch: int) -> tuple[ViewSlice, ...]:
        """The views of an epoch: `num_short` of equal length, and perhaps the long sequence."""

    @property
    @abstractmethod
    def window_frames(self) -> int:
        """W: frames of the window."""

    @property
    @abstractmethod
    def min_frames(self) -> int:
        """Frames of the shortest videos that are in batches."""

    @abstractmethod
    def windows(
        self, num_frames: np.ndarray, *, seed: int, epoch: int, places: np.ndarray
    ) -> np.ndarray:
        """Choose the window of each video, a function of seed, epoch and place in the plan.

        Args:
            num_frames: Shape `[b]`: frames of each video.
            seed: The plan's seed.
            epoch: From 0.
            places: Shape `[b]`: samples of the plan, which a replacement does not change.

        Returns:
            Shape `[b, W]`, int64: frame indices.
        """


@dataclass(frozen=True)
class PretrainingRecipe(BatchRecipe):
    """Two consecutive short clips, and the long sequence in the epochs that need it."""

    clips: ClipSpec
    wants_long: Callable[[int], bool] = lambda _: True
    """Whether the batches of an epoch have the long sequence."""
    num_short = 2

    @property
    def window_frames(self) -> int:
        """Frames of the two short clips."""
        return self.clips.window_frames

    @property
    def min_frames(self) -> int:
        """Frames of the window: a shorter video cannot hold one."""
        return self.clips.window_frames

    def views(self, epoch: int) -> tuple[ViewSlice, ...]:
        """The two short clips, and the long sequence where it is wanted."""
        clips = self.clips
        short = (ViewSlice(0, clips.clip_frames), ViewSlice(clips.clip_frames, clips.clip_frames))
        long = ViewSlice(0, clips.long_frames, clips.long_stride)
        return (*short, long) if self.wants_long(epoch) else short

    def windows(
        self, num_frames: np.ndarray, *, seed: int, epoch: int, places: np.ndarray
    ) -> np.ndarray:
        """A window at a random position and stride, see `training_window`."""
        draws = uniforms(seed, Stream.WINDOW, epoch, places, 0, 2)
        return training_window(num_frames, self.clips, draws)


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(BatchRecipe):
    """One clip of each video, at a random position; a short video repeats its last frame."""

    clip_frames: int
    """Frames of a clip."""
    stride: int
    """Distance of neighbouring frames, in source frames."""
    num_short = 1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.clip_frames < 1 or self.stride < 1:
            raise ConfigError("clip_frames and stride must be 1 or more")

    @property
    def window_frames(self) -> int:
        """Frames of the clip."""
        return self.clip_frames

    @property
    def min_frames(self) -> int:
        """Any video can be shown."""
        return 1

    def views(self, epoch: int) -> tuple[ViewSlice, ...]:
        """The clip."""
        return (ViewSlice(0, self.clip_frames),)

    def windows(
        self, num_frames: np.ndarray, *, seed: int, epoch: int, places: np.ndarray
    ) -> np.ndarray:
        """A clip at a random position, see `training_clip`."""
        # View 1 of the stream; pretraining draws view 0.
        draws = uniforms(seed, Stream.WINDOW, epoch, places, 1, 1)[:, 0]
        return training_clip(num_frames, draws, clip_frames=self.clip_frames, stride=self.stride)


def open_plan(
    reader: ShardReader, config: DataConfig, seed: int, recipe: BatchRecipe | None = None
) -> Plan:
    """Make the order of samples, without the videos that are too short for the recipe.

    Args:
        reader: The data set.
        config: Settings of the batches.
        seed: In [0, 2^64).
        recipe: By default pretraining with `config.clips`.

    Raises:
        ConfigError: Fewer videos are long enough than a batch needs.
    """
    recipe = recipe or PretrainingRecipe(config.clips)
    _check_room(reader, config)
    too_short = np.flatnonzero(reader.num_frames < recipe.min_frames)
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
