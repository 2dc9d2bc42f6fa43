"""16-bit conv3d on a CPU whose weight gradient is computed in float32.

oneDNN's weight gradient in bfloat16 is wrong (torch 2.14.1, AVX-512 BF16): it leaves memory
unwritten and writes out of bounds, so that values are NaN or the process aborts; a kernel of 3 over
two time steps is enough. Its forward pass and input gradient were correct in all experiments, and
float32 is correct for everything that the encoders compute (docs/log.md). Without oneDNN everything
is correct, but 15 to 50 times as slow.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["Float32WeightGradient", "sound_convolutions"]


def sound_convolutions(
    device: torch.device, dtype: torch.dtype | None
) -> AbstractContextManager[object]:
    """Context manager for a forward pass that makes its backward pass correct; reusable.

    Args:
        device: The device of the computation.
        dtype: The dtype of autocast; None without autocast.
    """
    if device.type == "cpu" and dtype is not None:
        return Float32WeightGradient()
    return nullcontext()


class Float32WeightGradient(TorchFunctionMode):
    """Function mode in which conv3d under CPU autocast gets its weight gradient in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or the replacement of conv3d."""
        if func is functional.conv3d and torch.is_autocast_enabled("cpu"):
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
        backward = torch.ops.aten.convolution_backward
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            low = weight.to(x.dtype)
            of_input = backward(grad, x, low, None, *ctx.settings, mask)[0].to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            mask = [False, True, False]
            wide = (grad.float(), x.float(), weight.to(x.dtype).float())
            of_weight = backward(*wide, None, *ctx.settings, mask)[1].to(weight.dtype)
        return of_input, of_weight, None
