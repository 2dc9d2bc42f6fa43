"""Self-test: check that this machine computes 3D convolutions correctly in low precision.

Torch 2.14's conv3d on CPUs leaves parts of a bfloat16 weight gradient unwritten (`convolutions.py`
is a workaround), and releases around 2.9 with cuDNN 9.10 to 9.14 use an implementation on GPUs that
is many times slower than float32. Neither raises an error, so both could be unnoticed for days.
"""

import time

import torch
from torch import Tensor
from torch.nn import functional

from strata.errors import ConfigError
from strata.logs import get_logger, warn_once
from strata.train.convolutions import sound_convolutions

__all__ = ["check_conv3d"]

logger = get_logger(__name__)

# Input and output channels, kernel, stride, frames, rows: a stem, a first, a middle and a last
# stage, and the factored kernels of S3D.
_SHAPES = (
    (4, 8, (7, 7, 7), 2, 8, 32),
    (8, 16, (3, 3, 3), 2, 4, 8),
    (32, 32, (3, 3, 3), 1, 4, 14),
    (16, 64, (3, 3, 3), 1, 2, 7),
    (8, 16, (1, 3, 3), 1, 4, 8),
    (16, 16, (3, 1, 1), 1, 4, 8),
)
_TOLERANCE = 0.05
"""Largest allowed relative error; bfloat16 has about 0.01 here, a fault 0.1 to NaN."""


def check_conv3d(device: torch.device, dtype: torch.dtype) -> float:
    """Compare forward and backward of conv3d, as training computes it, with float32.

    Args:
        device: The device to test.
        dtype: float16 or bfloat16.

    Returns:
        The largest relative error.

    Raises:
        ConfigError: A result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for c_in, c_out, kernel, stride, frames, rows in _SHAPES:
        clip = torch.randn(2, c_in, frames, rows, rows, generator=generator)
        weight = torch.randn(c_out, c_in, *kernel, generator=generator)
        weight /= (c_in * kernel[0] * kernel[1] * kernel[2]) ** 0.5
        if device.type == "cpu":
            # Fill freed memory with NaN, so that unwritten results are detected.
            for size in (weight.numel(), clip.numel(), 1 << 20):
                torch.full((size,), torch.nan)
        right = _conv3d(clip, weight, stride, device, None)
        mine = _conv3d(clip, weight, stride, device, dtype)
        names = ("output", "gradient of the input", "gradient of the weight")
        for name, a, b in zip(names, right, mine, strict=True):
            error = float((a - b).norm() / a.norm())
            worst = max(worst, error)
            if not error < _TOLERANCE:
                raise ConfigError(
                    f"torch {torch.__version__} computes conv3d wrongly in {dtype} on "
                    f"{device.type}: relative error {error:.2g} in the {name} of {c_in} to {c_out} "
                    f"channels, kernel {kernel}; use --engine.precision fp32 or another torch"
                )
    if device.type == "cuda":
        _warn_if_slow(device, dtype)
    return worst


def _conv3d(
    clip: Tensor, weight: Tensor, stride: int, device: torch.device, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    layout = {"memory_format": torch.channels_last_3d}
    x = clip.to(device).contiguous(**layout).requires_grad_()
    w = weight.to(device).contiguous(**layout).requires_grad_()
    padding = tuple(k // 2 for k in weight.shape[2:])
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    with sound_convolutions(device), autocast:
        y = functional.conv3d(x, w, stride=stride, padding=padding)
    of_clip, of_weight = torch.autograd.grad(y.float().square().mean(), (x, w))
    return y.detach().float(), of_clip, of_weight


def _warn_if_slow(device: torch.device, dtype: torch.dtype) -> None:
    def seconds(kind: torch.dtype | None) -> float:
        generator = torch.Generator().manual_seed(0)
        clip = torch.randn(16, 64, 8, 28, 28, generator=generator)
        weight = torch.randn(64, 64, 3, 3, 3, generator=generator)
        _conv3d(clip, weight, 1, device, kind)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        _conv3d(clip, weight, 1, device, kind)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    low, full = seconds(dtype), seconds(None)
    if low > 2 * full:
        warn_once(
            logger,
            f"conv3d in {dtype} takes {low / full:.1f} times as long as in float32 with torch "
            f"{torch.__version__} and cuDNN {torch.backends.cudnn.version()}; "
            "--engine.precision fp32 or another torch will train faster",
        )
