"""Clips made from numbers, for tests of the method: no files, no decoder."""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["slowing_videos", "smooth_videos"]


def smooth_videos(num_videos: int, *, size: int = 16, frames: int = 32, seed: int = 0) -> Tensor:
    """`[B, frames, size, size, 3]`, uint8: random, smooth in space and time, all different."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_videos, 3, 6, 4, 4, generator=generator) * 255
    smooth = functional.interpolate(coarse, (frames, size, size), mode="trilinear")
    return smooth.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def slowing_videos(
    num_videos: int, *, size: int = 24, frames: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A spot that slows down on a still background: time has a direction, and so has the motion.

    Returns:
        `[B, frames, size, size, 3]`, uint8, and `[B]`, which of four ways the spot goes.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    coarse = uniform(num_videos, 3, 4, 4) * 0.6
    background = functional.interpolate(coarse, (size, size), mode="bilinear")
    colour = 0.4 + 0.6 * uniform(num_videos, 3)
    way = torch.randint(0, 4, (num_videos,), generator=generator)
    angle = way * math.pi / 2 + 0.6 * (uniform(num_videos) - 0.5)
    heading = torch.stack([angle.sin(), angle.cos()], dim=1)
    reach = 0.5 + 0.3 * uniform(num_videos)
    centre = 0.35 + 0.3 * uniform(num_videos, 2)
    decay = torch.exp(-3 * torch.linspace(0, 1, frames))
    travel = (1 - decay) / (1 - math.exp(-3)) - 0.5
    place = centre[:, None] + (heading * reach[:, None])[:, None] * travel[None, :, None]
    at = torch.linspace(0, 1, size)
    rows = (at - place[:, :, 0, None]).square()
    columns = (at - place[:, :, 1, None]).square()
    spot = torch.exp(-(rows[:, :, :, None] + columns[:, :, None, :]) / (2 * 0.12**2))[:, :, None]
    clips = background[:, None] * (1 - spot) + colour[:, None, :, None, None] * spot
    clips = clips + 0.02 * torch.randn(clips.shape, generator=generator)
    pixels = (clips.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 1, 3, 4, 2).contiguous(), way
