"""What the first convolution sees of a clip: its RGB frames, or what changes between them."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["DIFFERENCE_SCALE", "INPUTS", "InputChoice", "frame_differences"]

InputChoice = Literal["rgb", "difference", "both"]
INPUTS: tuple[InputChoice, ...] = ("rgb", "difference", "both")

DIFFERENCE_SCALE = 3.0
"""Differences of neighbouring frames are small; this brings them nearer to unit variance."""


def frame_differences(clips_NCTHW: Tensor) -> Tensor:
    """Frame t + 1 minus frame t, times `DIFFERENCE_SCALE`; the last difference is repeated.

    Of clips normalised by ImageNet's mean and deviation this is the difference over the deviation:
    the mean cancels. What stands still, and with it most of the background and of the colour by
    which a network could tell videos apart, is zero. Source: residual frames, Tao et al., IIC, ACM
    MM 2020 (arXiv 2008.02531), there without the scale.

    Args:
        clips_NCTHW: `[N, C, T, H, W]`.

    Returns:
        `[N, C, T, H, W]`; a clip of one frame has no change and gives zeros. Strides are kept.
    """
    num_frames = clips_NCTHW.shape[2]
    result = torch.zeros_like(clips_NCTHW)
    if num_frames > 1:
        change = DIFFERENCE_SCALE * clips_NCTHW.diff(dim=2)
        result[:, :, :-1] = change
        result[:, :, -1] = change[:, :, -1]
    return result
