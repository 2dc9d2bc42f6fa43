"""Views of a clip on the CPU: torch resizes, OpenCV mixes colours and blurs.

A view is a crop, its antialiased resize, a mirror image, one affine map of colours, and a Gaussian
blur, each rounded to uint8. Both libraries have vectorised loops for uint8, which DALI has not on a
CPU, and release the interpreter's lock, so that threads run side by side. Each thread has its own
`ViewMaker`, whose buffers serve all clips: new memory for each would cost page faults.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from strata.dataload.augment import ViewParameters, blur_taps, colour_transforms

__all__ = ["ClipParameters", "ViewMaker", "clip_parameters"]

# Threads take samples, so OpenCV must not divide a clip among threads of its own.
cv2.setNumThreads(1)

_LEAST_BYTES = 8 << 20
"""Of a buffer: from 4 MiB on numpy asks for huge pages, which saved 4 % of a sample's time."""

_Pass = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class ClipParameters:
    """The parameters of one view of one sample, as the operations need them."""

    box: tuple[int, int, int, int]
    """Top, left, bottom and right of the crop, in stored pixels."""
    flip: bool
    maps: np.ndarray | None
    """Affine maps of colours `[P, 3, 4]`, float32, for all frames (P is 1) or for each; or None."""
    taps: np.ndarray | None
    """Weights of the Gaussian, float32; None without blur."""


def clip_parameters(view: ViewParameters, *, photometric: bool) -> list[ClipParameters]:
    """Prepare the parameters of N views.

    Args:
        view: The parameters as they were drawn.
        photometric: Whether colour and blur apply.
    """
    maps = colour_transforms(view) if photometric else [None] * len(view)
    taps = blur_taps(view.sigma) if photometric else [None] * len(view)
    return [
        ClipParameters(
            (box[0], box[1], box[2], box[3]),
            flip,
            own_maps,
            None if own_taps is None or len(own_taps) == 1 else own_taps,
        )
        for box, flip, own_maps, own_taps in zip(
            view.box.astype(int).tolist(), view.flip.tolist(), maps, taps, strict=True
        )
    ]


class ViewMaker:
    """Makes one view after another, in buffers that all of them use.

    Args:
        size: Rows and columns of a view.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffer = np.empty(_LEAST_BYTES, np.uint8)

    def make(self, frames: np.ndarray, clip: ClipParameters, out: np.ndarray) -> None:
        """Make a view.

        Args:
            frames: Shape `[T, H, W, 3]`, uint8; rows and columns of pixels must be contiguous.
            clip: The parameters.
            out: Shape `[T, size, size, 3]`, uint8, contiguous; receives the view.
        """
        passes: list[_Pass] = []
        if clip.flip:
            passes.append(_mirror)
        if clip.maps is not None:
            passes.append(partial(_colour, clip.maps))
        if clip.taps is not None:
            passes.append(partial(_blur, clip.taps))
        top, left, bottom, right = clip.box
        region = frames[:, top:bottom, left:right]
        crop, turns = self._room(region.shape, out.shape)
        # Intermediate results alternate between two places; the last pass writes the view.
        targets = [turns[number % 2] for number in range(len(passes))] + [out]
        # torch would copy the region into new memory.
        np.copyto(crop, region)
        self._resize(crop, targets[0])
        for number, do in enumerate(passes):
            do(targets[number], targets[number + 1])

    def _room(
        self, crop: tuple[int, ...], view: tuple[int, ...]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Arrays in the buffer: a crop, and two of a view's shape."""
        size, end = math.prod(view), 2 * math.prod(view) + math.prod(crop)
        if self._buffer.size < end:
            self._buffer = np.empty(end, np.uint8)
        turns = [self._buffer[:size], self._buffer[size : 2 * size]]
        return self._buffer[2 * size : end].reshape(crop), [turn.reshape(view) for turn in turns]

    def _resize(self, crop: np.ndarray, out: np.ndarray) -> None:
        """Resize a crop linearly; antialiased, with weights only for pixels of the crop."""
        # What torch.nn.functional.interpolate calls; that has no `out`.
        torch.ops.aten._upsample_bilinear2d_aa.out(
            _channels_first(crop), [self._size, self._size], False, out=_channels_first(out)
        )


def _channels_first(clip: np.ndarray) -> torch.Tensor:
    """A clip as torch's `[T, 3, H, W]` in the same memory, which is its channels-last form."""
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def _rows(clip: np.ndarray) -> np.ndarray:
    """All frames as one tall picture."""
    return clip.reshape(-1, *clip.shape[2:])


def _mirror(clip: np.ndarray, out: np.ndarray) -> None:
    cv2.flip(_rows(clip), 1, _rows(out))


def _colour(maps: np.ndarray, clip: np.ndarray, out: np.ndarray) -> None:
    if len(maps) == 1:
        cv2.transform(_rows(clip), maps[0], _rows(out))
        return
    for frame, each, target in zip(clip, maps, out, strict=True):
        cv2.transform(frame, each, target)


def _blur(taps: np.ndarray, clip: np.ndarray, out: np.ndarray) -> None:
    """Blur rows and columns, mirrored at the border without repeating the edge pixel."""
    border: Any = cv2.BORDER_REFLECT_101
    for frame, target in zip(clip, out, strict=True):
        cv2.sepFilter2D(frame, -1, taps, taps, target, borderType=border)
