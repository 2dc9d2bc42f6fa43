"""Inputs of the first convolution: RGB frames, or differences of consecutive frames."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["DIFFERENCE_SCALE", "INPUTS", "InputChoice", "frame_differences"]

InputChoice = Literal["rgb", "difference", "both"]
INPUTS: tuple[InputChoice, ...] = ("rgb", "difference", "both")

DIFFERENCE_SCALE = 3.0
"""Scale of the small differences of consecutive frames, for a variance closer to one."""


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
