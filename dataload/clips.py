"""Choose the frames of a video for each view, as arithmetic on frame indices."""

from dataclasses import dataclass

import numpy as np

from strata.errors import ConfigError

__all__ = ["ClipSpec", "evaluation_clips", "training_clip", "training_window"]


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Settings of the window of a training sample and of the views cut from it."""

    clip_frames: int = 16
    """Frames of a short clip; the window contains two of them. TEXT: 16."""
    max_stride: float = 3.0
    """Largest distance of consecutive frames in source frames; drawn from [1, this]."""
    long_stride: int = 1
    """1: the long sequence is the window itself (TEXT). 2: every second frame (release)."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.clip_frames < 2 or self.clip_frames % 2:
            raise ConfigError(
                f"data.clips.clip_frames is {self.clip_frames}; use an even number from 2"
            )
        if self.max_stride < 1:
            raise ConfigError(f"data.clips.max_stride is {self.max_stride}; use 1 or more")
        if self.long_stride not in (1, 2):
            raise ConfigError(f"data.clips.long_stride is {self.long_stride}; use 1 or 2")

    @property
    def window_frames(self) -> int:
        """Frames of the window: 32 for clips of 16."""
        return 2 * self.clip_frames

    @property
    def long_frames(self) -> int:
        """Frames of the long sequence."""
        return self.window_frames // self.long_stride


def training_window(num_frames: np.ndarray, spec: ClipSpec, draws: np.ndarray) -> np.ndarray:
    """Choose a window at a random position and real stride in each video (method.md 1.2).

    The stride s is uniform in [1, min(max_stride, F / W)], the start t0 uniform among the integers
    0 to floor(F - W s), and frame k is min(round(t0 + s k), F - 1), halves rounded to even.

    Args:
        num_frames: Shape `[N]`: frames F of each video, at least the window's W.
        spec: The window.
        draws: Shape `[N, 2]`: uniform in [0, 1).

    Returns:
        Shape `[N, W]`, int64: frame indices, not decreasing.
    """
    window = spec.window_frames
    frames = np.asarray(num_frames, np.float64)
    if (frames < window).any():
        raise ValueError(f"a video of {frames.min():.0f} frames cannot hold a window of {window}")
    stride = 1.0 + draws[:, 0] * (np.minimum(spec.max_stride, frames / window) - 1.0)
    starts = np.floor(frames - window * stride) + 1.0
    start = np.minimum(np.floor(draws[:, 1] * starts), starts - 1.0)
    points = start[:, None] + stride[:, None] * np.arange(window)
    return np.minimum(np.rint(points), frames[:, None] - 1.0).astype(np.int64)


def training_clip(
    num_frames: np.ndarray, draws: np.ndarray, *, clip_frames: int, stride: int
) -> np.ndarray:
    """Choose one clip at a random position in each video.

    The start is uniform among the positions at which the clip fits the video; a video that is too
    short repeats its last frame, as in `evaluation_clips`.

    Args:
        num_frames: Shape `[N]`: frames of each video, at least 1.
        draws: Shape `[N]`: uniform in [0, 1).
        clip_frames: Frames of a clip.
        stride: Distance of consecutive frames of a clip, in source frames.

    Returns:
        Shape `[N, clip_frames]`, int64.
    """
    frames = np.asarray(num_frames, np.int64)
    room = np.maximum(frames - ((clip_frames - 1) * stride + 1), 0)
    starts = np.minimum(np.floor(draws * (room + 1)).astype(np.int64), room)
    points = starts[:, None] + stride * np.arange(clip_frames)
    return np.minimum(points, frames[:, None] - 1)


def evaluation_clips(
    num_frames: np.ndarray, *, num_clips: int, clip_frames: int, stride: int
) -> np.ndarray:
    """Place clips uniformly along each video, the first at its start and the last at its end.

    A video too short for one clip repeats its last frame.

    Args:
        num_frames: Shape `[N]`: frames of each video, at least 1.
        num_clips: Clips per video. TEXT: 10.
        clip_frames: Frames per clip. TEXT: 16.
        stride: Distance of consecutive frames of a clip, in source frames.

    Returns:
        Shape `[N, num_clips, clip_frames]`, int64.
    """
    frames = np.asarray(num_frames, np.int64)
    span = (clip_frames - 1) * stride + 1
    room = np.maximum(frames - span, 0)
    place = np.linspace(0.0, 1.0, num_clips) if num_clips > 1 else np.array([0.5])
    starts = np.rint(room[:, None] * place[None, :]).astype(np.int64)
    points = starts[:, :, None] + stride * np.arange(clip_frames)
    return np.minimum(points, frames[:, None, None] - 1)
