"""conv3d on a CPU with a weight gradient that is correct and fast.

oneDNN's weight gradient of conv3d in bfloat16 is wrong (torch 2.14.1, AVX-512 BF16): it leaves
memory unwritten and writes out of bounds, so that values are NaN or the process aborts. And where
weights are many and positions few, as in a last stage, it takes most of a step in float32 too. So
it is computed by other means that were correct in all experiments (docs/log.md):

* few positions: as one matrix product with the pixels below each tap;
* else in bfloat16, with stride 1 along rows and columns: as a 2D convolution, taps of time as
  channels;
* else in float32.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["SoundConvolutions", "sound_convolutions"]


_MANY_WEIGHTS = 1 << 20
"""Weights from which a matrix product is considered in float32 too: those that do not fit a core's
cache."""
_FEW_POSITIONS = {torch.float32: 4, torch.bfloat16: 16}
"""Output positions per input channel up to which the matrix product is the faster."""
_FRAMES_CHANNELS = 32
"""Input channels from which the 2D convolution is faster than float32."""


def sound_convolutions(device: torch.device) -> AbstractContextManager[object]:
    """Context manager for a forward pass that makes its backward pass correct; reusable.

    Args:
        device: The device of the computation.
    """
    return SoundConvolutions() if device.type == "cpu" else nullcontext()


class SoundConvolutions(TorchFunctionMode):
    """Function mode in which conv3d on a CPU gets another weight gradient."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or the replacement of conv3d."""
        if func is functional.conv3d:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if torch.is_autocast_enabled("cpu") or weight.numel() >= _MANY_WEIGHTS:
                return _conv3d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    settings = (_triple(stride), _triple(padding), _triple(dilation), False, (0, 0, 0), groups)
    y = _Conv3d.apply(input, weight, settings)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1, 1)


def _triple(value: Any) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)


class _Conv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
        dtype = input.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        ctx.settings = settings
        x = input.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.input_dtype = input.dtype
        return torch.convolution(x, weight.to(dtype), None, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            low = weight.to(x.dtype)
            found = _backward(grad, x, low, None, *ctx.settings, mask)[0]
            of_input = found.to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(grad, x, weight, ctx.settings).to(weight.dtype)
        return of_input, of_weight, None


_backward = torch.ops.aten.convolution_backward


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
    stride, padding, dilation, groups = *settings[:3], settings[-1]
    if groups == 1 and dilation == (1, 1, 1):
        taps = _Taps(tuple(weight.shape[2:]), stride, padding)
        channels, few = x.shape[1], _FEW_POSITIONS.get(x.dtype, 0)
        if grad[:, 0].numel() <= few * channels:
            return taps.by_product(grad, x)
        if x.dtype == torch.bfloat16 and stride[1:] == (1, 1) and channels >= _FRAMES_CHANNELS:
            return taps.by_frames(grad, x)
    wide = (grad.float(), x.float(), weight.to(x.dtype).float())
    return _backward(*wide, None, *settings, [False, True, False])[1]


class _Taps:
    """Weight gradients by other means, of a kernel with these sizes, stride and padding."""

    def __init__(self, kernel: tuple[int, ...], stride: Any, padding: Any) -> None:
        self._kernel, self._stride, self._padding = kernel, stride, padding

    def by_product(self, grad: Tensor, x: Tensor) -> Tensor:
        """As one matrix product with the inputs below each tap."""
        pads = [size for size in self._padding[::-1] for _ in (0, 1)]
        padded = functional.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *pads)).contiguous()
        steps = padded.stride()
        places = (*grad.shape[:1], *grad.shape[2:])
        strides = (steps[0], *(a * b for a, b in zip(steps[1:4], self._stride, strict=True)))
        view = padded.as_strided((*places, *self._kernel, x.shape[1]), (*strides, *steps[1:]))
        below = view.reshape(math.prod(places), -1)
        above = grad.permute(1, 0, 2, 3, 4).flatten(1)
        return (above @ below).unflatten(1, (*self._kernel, -1)).permute(0, 4, 1, 2, 3)

    def by_frames(self, grad: Tensor, x: Tensor) -> Tensor:
        """As a 2D convolution of frames, whose channels are those of all taps of time."""
        taps, step, pad = self._kernel[0], self._stride[0], self._padding[0]
        frames = functional.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, pad, pad))
        last = (grad.shape[2] - 1) * step + 1
        joined = torch.cat([frames[:, tap : tap + last : step] for tap in range(taps)], dim=4)
        images = joined.flatten(0, 1).permute(0, 3, 1, 2)
        # Its values are not used.
        weight = images.new_empty(grad.shape[1], images.shape[1], *self._kernel[1:])
        weight = weight.contiguous(memory_format=torch.channels_last)
        settings = ((1, 1), self._padding[1:], (1, 1), False, (0, 0), 1)
        above = grad.transpose(1, 2).flatten(0, 1)
        found = _backward(above, images, weight, None, *settings, [False, True, False])[1]
        return found.unflatten(1, (taps, -1)).transpose(1, 2)
