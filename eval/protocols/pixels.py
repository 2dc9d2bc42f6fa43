"""Features without a network: small maps of a clip's pixels, as a baseline for encoders."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from strata.train.models.backbones import Backbone, Levels, LevelWidths

__all__ = ["PIXEL_MAPS", "PixelMaps", "PixelMapsChoice"]

PixelMapsChoice = Literal["thumbnails", "motion"]

_SIDE = 8
_COLOURS = 3
PIXEL_MAPS: dict[PixelMapsChoice, str] = {
    "thumbnails": f"{_SIDE}x{_SIDE} thumbnails of the mean frame, without a network",
    "motion": f"{_SIDE}x{_SIDE} maps of the mean absolute difference of neighbouring frames, "
    "without a network",
}
"""Each in words."""


class PixelMaps(Backbone):
    """Replaces an encoder: all three levels are the map, with its places as channels.

    Args:
        kind: thumbnails: the mean frame, in three colours. motion: the mean over time and colours
            of the absolute difference of neighbouring frames.
    """

    def __init__(self, kind: PixelMapsChoice) -> None:
        super().__init__()
        self.kind = kind
        width = _SIDE**2 * (_COLOURS if kind == "thumbnails" else 1)
        self.widths = LevelWidths(width, width, width)

    @property
    def in_channels(self) -> int:
        """See `Backbone.in_channels`."""
        return _COLOURS

    def forward(self, clips_NCTHW: Tensor) -> Levels:
        """See `Backbone.forward`; time, rows and columns are 1."""
        clips = clips_NCTHW.to(torch.float32)
        if self.kind == "motion":
            maps = clips.diff(dim=2).abs().mean(dim=(1, 2), keepdim=True).squeeze(2)
        else:
            maps = clips.mean(dim=2)
        small = functional.adaptive_avg_pool2d(maps, _SIDE).flatten(1)
        level = small[:, :, None, None, None]
        return Levels(level, level, level)
