"""Full precision for the losses under any autocast: similarities over tau need over 8 bits."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from strata.errors import ConfigError

__all__ = ["EPSILON", "full_precision", "require_pairs", "unit_length", "widen"]

P = ParamSpec("P")
R = TypeVar("R")

EPSILON = 1e-6
"""Vectors shorter than this are not scaled to unit length: it bounds the gradient of a zero vector
by 1/EPSILON; with torch's default 1e-12 one dead clip would dominate the batch."""

_HALF = (torch.float16, torch.bfloat16)


def widen(tensor: Tensor) -> Tensor:
    """Convert a half-precision tensor to float32; others, also float64, are unchanged."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _widen(value: Any) -> Any:
    return widen(value) if isinstance(value, Tensor) else value


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off and its half-precision tensors widened to float32.

    Float64 is unchanged, so that `gradcheck` works. At tau = 0.07 a rounding of 2^-9 in
    a cosine (bfloat16) is 0.03 in a logit, and exp(1/0.07) overflows float16.

    Args:
        function: A function with at least one tensor as a direct argument.

    Returns:
        The same function, with the same signature.
    """
    call: Callable[..., R] = function

    @functools.wraps(function)
    def wide(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        with torch.autocast(next(tensors).device.type, enabled=False):
            return call(*(_widen(a) for a in args), **{k: _widen(v) for k, v in kwargs.items()})

    return wide


def unit_length(vectors: Tensor) -> Tensor:
    """Normalise vectors along the last dimension; those below `EPSILON` stay shorter than 1."""
    return functional.normalize(vectors, dim=-1, eps=EPSILON)


def require_pairs(num_videos: int, what: str) -> None:
    """Check that the global batch has at least two videos to contrast.

    Raises:
        ConfigError: Fewer than two videos.
    """
    if num_videos < 2:
        raise ConfigError(
            f"{what} contrasts a video with others, but the global batch has {num_videos}; "
            "use a global batch of at least 2"
        )
