"""Inputs of the first convolution: RGB frames, or differences of consecutive frames."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "DIFFERENCE_SCALE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INPUTS",
    "InputChoice",
    "frame_differences",
    "mean_and_scale",
    "normalise",
    "scaled",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

InputChoice = Literal["rgb", "difference", "both"]
INPUTS: tuple[InputChoice, ...] = ("rgb", "difference", "both")

DIFFERENCE_SCALE = 3.0
"""Scale of the small differences of consecutive frames, for a variance closer to one."""


@cache
def mean_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Constants of `scaled`, kept on the device: a copy in every step would wait each time."""
    mean = torch.tensor(IMAGENET_MEAN, device=device) * 255
    return mean, 1 / (torch.tensor(IMAGENET_STD, device=device) * 255)


def normalise(clips: Tensor, in_channels: int) -> Tensor:
    """Convert decoded clips to the input of the first convolution.

    Args:
        clips: `[N, T, H, W, 3]`, uint8.
        in_channels: 3, or 4 to add a plane of zeros.

    Returns:
        `[N, in_channels, T, H, W]`, float32, normalised by ImageNet's mean and deviation; channels
        stay last in memory, so nothing is transposed.
    """
    return scaled(clips, *mean_and_scale(clips.device), in_channels, torch.float32)


def scaled(
    clips: Tensor, mean: Tensor, scale: Tensor, in_channels: int, dtype: torch.dtype
) -> Tensor:
    """`normalise` with given constants; a compiled function cannot keep them itself."""
    values = ((clips - mean) * scale).to(dtype)
    if in_channels > 3:
        values = functional.pad(values, (0, in_channels - 3))
    return values.permute(0, 4, 1, 2, 3)


def frame_differences(clips_NCTHW: Tensor) -> Tensor:
    """Differences of consecutive frames times `DIFFERENCE_SCALE`; the last one is repeated.

    For clips normalised by ImageNet's mean and deviation this is the difference over the deviation:
    the mean cancels. Static pixels are zero, so most of the background and colour, by which a
    network could distinguish videos, is removed. Source: residual frames, Tao et al., IIC, ACM MM
    2020 (arXiv 2008.02531), there without the scale.

    Args:
        clips_NCTHW: `[N, C, T, H, W]`.

    Returns:
        `[N, C, T, H, W]`; a clip of one frame gives zeros. Strides are kept.
    """
    num_frames = clips_NCTHW.shape[2]
    result = torch.zeros_like(clips_NCTHW)
    if num_frames > 1:
        change = DIFFERENCE_SCALE * clips_NCTHW.diff(dim=2)
        result[:, :, :-1] = change
        result[:, :, -1] = change[:, :, -1]
    return result
