"""The stem's convolution computed in other ways, which are faster, and its pooling of frames.

A convolution over 3 channels leaves most of a matrix unit idle, so pixels and frames are folded
into channels. Parameters, their names and the results are those of the plain convolution. Shape
suffixes: N clips, C channels, T frames, H rows, W columns, O output channels.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FOLDS", "Fold", "FramePool", "StemConvolution", "folded_channels"]

Fold = Literal["off", "pixels", "frames", "frames8"]
"""How the stem is computed: as it is; with 2x2 pixels folded into channels; with the kernel's
frames folded too, into a 2D convolution, and channels padded to a multiple of 32, or of 8."""
FOLDS: tuple[Fold, ...] = ("off", "pixels", "frames", "frames8")

_MULTIPLE = {"frames": 32, "frames8": 8}
_COLOURS = 3
"""A fourth plane of a clip is zero, so it is left out."""
_FOLD = 2
# Taps -2..1 of the folded kernel, in steps of two pixels: what is left of -3..3 with one zero tap.
_BEFORE, _AFTER = 2, 1
_LARGEST = 2**31 - 1
"""Elements that a tensor of cuDNN's 32-bit kernels may have."""


def folded_channels(fold: Fold, frames: int) -> int:
    """Channels of the folded input of a kernel of so many frames."""
    channels = _COLOURS * _FOLD**2
    if fold not in _MULTIPLE:
        return channels
    return -(-channels * frames // _MULTIPLE[fold]) * _MULTIPLE[fold]


def _fold_pixels(clips_NCTHW: Tensor) -> Tensor:
    """Fold 2x2 pixels into channels, `[N, T, H / 2 + 3, W / 2 + 3, 12]`, padded for the kernel."""
    pixels = clips_NCTHW[:, :_COLOURS].permute(0, 2, 3, 4, 1)
    pixels = pixels.unflatten(3, (-1, _FOLD)).unflatten(2, (-1, _FOLD))
    # [N, T, H/2, 2, W/2, 2, C] -> [N, T, H/2, W/2, 4 C]
    folded = pixels.permute(0, 1, 2, 4, 3, 5, 6).flatten(4)
    return functional.pad(folded, (0, 0, _BEFORE, _AFTER, _BEFORE, _AFTER))


def _fold_weight(weight_OCTHW: Tensor) -> Tensor:
    """The kernel for folded pixels, `[O, T, 12, 4, 4]`."""
    # A zero tap before the first makes the size even: pixel 2 p + r uses tap p of phase r.
    even = functional.pad(weight_OCTHW[:, :_COLOURS], (1, 0, 1, 0))
    split = even.unflatten(4, (-1, _FOLD)).unflatten(3, (-1, _FOLD))
    # [O, C, T, 4, 2, 4, 2] -> [O, T, 4 C, 4, 4]
    return split.permute(0, 2, 4, 6, 1, 3, 5).flatten(2, 4)


def _fold_frames(folded: Tensor, frames: int, channels: int) -> Tensor:
    """Join each frame's channels with those of its neighbours, `[N, T, H', W', channels]`."""
    num_frames, half = folded.shape[1], frames // 2
    padded = functional.pad(folded, (0, 0, 0, 0, 0, 0, half, half))
    taps = [padded[:, tap : tap + num_frames] for tap in range(frames)]
    spare = channels - frames * folded.shape[4]
    return torch.cat([*taps, folded.new_zeros(()).expand(*folded.shape[:4], spare)], dim=4)


class StemConvolution(nn.Conv3d):
    """A convolution of 7x7 pixels with stride (1, 2, 2) and padding 3 that keeps time.

    Clips with an odd number of rows or columns are never folded.

    Attributes:
        fold: How it is computed.
    """

    fold: Fold = "off"

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[N, C, T, H, W]`."""
        if self.fold == "off" or input.shape[3] % _FOLD or input.shape[4] % _FOLD:
            return super().forward(input)
        device = input.device.type
        if torch.is_autocast_enabled(device):
            # As the convolution would: folding then moves half of the bytes.
            input = input.to(torch.get_autocast_dtype(device))
        folded, weight = _fold_pixels(input), _fold_weight(self.weight)
        frames = self.kernel_size[0]
        if self.fold == "pixels":
            weight = weight.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
            return functional.conv3d(
                folded.permute(0, 4, 1, 2, 3), weight, padding=(frames // 2, 0, 0)
            )
        channels = folded_channels(self.fold, frames)
        weight = weight.flatten(1, 2)
        weight = functional.pad(weight, (0, 0, 0, 0, 0, channels - weight.shape[1]))
        weight = weight.contiguous(memory_format=torch.channels_last)
        parts = [
            _convolve_frames(_fold_frames(part, frames, channels), weight)
            for part in _chunks(folded, folded[0, ..., 0].numel() * channels)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(clips: Tensor, elements: int) -> Sequence[Tensor]:
    """Parts of about equal size in which `elements` a clip stay below the limit of a tensor."""
    return clips.chunk(-(-len(clips) // max(_LARGEST // elements, 1)))


def _convolve_frames(folded: Tensor, weight: Tensor) -> Tensor:
    """Convolve `[N, T, H', W', C]` to `[N, O, T, H, W]`, channels last."""
    frames = folded.flatten(0, 1).permute(0, 3, 1, 2)
    maps = functional.conv2d(frames, weight)
    return maps.unflatten(0, folded.shape[:2]).transpose(1, 2)


class FramePool(nn.Module):
    """`MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))` as 2D pooling of a view: the same bits.

    With channels last the frames are the images, else the channels are, so nothing is copied.
    """

    def forward(self, maps_NCTHW: Tensor) -> Tensor:
        """Pool rows and columns."""
        if maps_NCTHW.is_contiguous():
            return _pool(maps_NCTHW.flatten(0, 1)).unflatten(0, maps_NCTHW.shape[:2])
        frames = maps_NCTHW.transpose(1, 2)
        return _pool(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def _pool(images: Tensor) -> Tensor:
    return functional.max_pool2d(images, kernel_size=3, stride=2, padding=1)
