"""What a pipeline makes of a batch: the windows, and the views cut from them."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CPU_VIDEO_CODECS", "GraphSpec", "ViewSlice"]

CPU_VIDEO_CODECS = ("vp9", "mjpeg")
"""Codecs of shards that DALI decodes without a GPU."""


@dataclass(frozen=True)
class ViewSlice:
    """The frames of a strip that are a view: `num_frames` from `start` at distance `step`."""

    start: int
    num_frames: int
    step: int = 1

    @property
    def frames(self) -> slice:
        """The view's frames among those of the strip."""
        return slice(self.start, self.start + (self.num_frames - 1) * self.step + 1, self.step)


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """Settings of a pipeline: the views of each batch."""

    batch_size: int
    """Samples of a batch."""
    strip_frames: int
    """Frames of each sample's window."""
    coded: Literal["strip", "video", "frames"] = "strip"
    """Whether a sample is a tall JPEG, a video, or decoded frames."""
    frames_on: Literal["cpu", "gpu"] = "cpu"
    """Device of decoded frames at the input; if a GPU, the one that augments."""
    height: int
    """Rows of a stored frame."""
    width: int
    """Columns of a stored frame."""
    size: int
    """Rows and columns of a view."""
    views: tuple[ViewSlice, ...]
    joined: int = 1
    """How many of the views, from the first, are one tensor; they have the same length."""
    photometric: bool
    """Whether views have colour and blur; in evaluation they do not."""
    colour_maps: bool = False
    """Whether colour has gray or differs between frames, so that a GPU needs an affine map per
    frame instead of one colour twist per clip."""
    decode: Literal["cpu", "gpu"]
    augment: Literal["cpu", "gpu"]
    device_id: int | None
    """CUDA device that gets the batch, or None without a GPU."""
    num_threads: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of a batch's tensors, all uint8: the joined views, then each other one.

        `[batch_size, joined, T, size, size, 3]`, then `[batch_size, T, size, size, 3]`.
        """
        one = [(cut.num_frames, self.size, self.size, 3) for cut in self.views]
        rest = [(self.batch_size, *shape) for shape in one[self.joined :]]
        return [(self.batch_size, self.joined, *one[0]), *rest]
