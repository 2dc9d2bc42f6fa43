"""The stem's convolution with 2x2 pixels folded into channels, which is faster on GPUs.

A convolution over 3 or 4 channels leaves most of a tensor core idle. Shape suffixes: N clips, C
channels, T frames, H rows, W columns, O output channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FoldedStem", "fold_pixels", "fold_weight"]

_FOLD = 2
# Taps -2..1 of the folded kernel, in steps of two pixels: what is left of -3..3 with one zero tap.
_BEFORE, _AFTER = 2, 1


def fold_pixels(clips_NCTHW: Tensor) -> Tensor:
    """Fold 2x2 pixels into channels, with padding for the folded kernel.

    Args:
        clips_NCTHW: `[N, C, T, H, W]`, H and W even.

    Returns:
        `[N, 4 C, T, H / 2 + 3, W / 2 + 3]`, channels last in memory.
    """
    pixels = clips_NCTHW.permute(0, 2, 3, 4, 1)
    pixels = pixels.unflatten(3, (-1, _FOLD)).unflatten(2, (-1, _FOLD))
    # [N, T, H/2, 2, W/2, 2, C] -> [N, T, H/2, W/2, 4 C]
    folded = pixels.permute(0, 1, 2, 4, 3, 5, 6).flatten(4)
    folded = functional.pad(folded, (0, 0, _BEFORE, _AFTER, _BEFORE, _AFTER))
    return folded.permute(0, 4, 1, 2, 3)


def fold_weight(weight_OCTHW: Tensor) -> Tensor:
    """Convert a 7x7 kernel to the kernel for folded pixels.

    Args:
        weight_OCTHW: `[O, C, T, 7, 7]`.

    Returns:
        `[O, 4 C, T, 4, 4]`, channels last in memory.
    """
    # A zero tap before the first makes the size even: pixel 2 p + r uses tap p of phase r.
    even = functional.pad(weight_OCTHW, (1, 0, 1, 0))
    split = even.unflatten(4, (-1, _FOLD)).unflatten(3, (-1, _FOLD))
    # [O, C, T, 4, 2, 4, 2] -> [O, 4 C, T, 4, 4]
    folded = split.permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)
    return folded.contiguous(memory_format=torch.channels_last_3d)


class FoldedStem(nn.Conv3d):
    """A convolution of 7x7 pixels with stride (1, 2, 2) and padding 3, computed on folded pixels.

    Parameters, names and results are those of the plain convolution, which is used for clips with
    an odd number of rows or columns.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[N, C, T, H, W]`."""
        if input.shape[3] % _FOLD or input.shape[4] % _FOLD:
            return super().forward(input)
        return functional.conv3d(
            fold_pixels(input), fold_weight(self.weight), padding=(self.kernel_size[0] // 2, 0, 0)
        )
