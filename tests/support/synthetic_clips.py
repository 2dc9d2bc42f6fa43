"""Synthetic clips for tests of the method, without files or a decoder."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["smooth_videos"]


def smooth_videos(num_videos: int, *, size: int = 16, frames: int = 32, seed: int = 0) -> Tensor:
    """Random clips, smooth in space and time: uint8 `[B, frames, size, size, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_videos, 3, 6, 4, 4, generator=generator) * 255
    smooth = functional.interpolate(coarse, (frames, size, size), mode="trilinear")
    return smooth.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
