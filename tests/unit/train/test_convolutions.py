"""conv3d in 16 bits on a CPU is correct and reproducible where oneDNN's gradient is wrong."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from strata.train.convolutions import sound_convolutions
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.models.stem import StemConvolution

CPU = torch.device("cpu")
# Kernel, stride, time steps, rows: of those in which oneDNN's gradient was NaN, wrong in every try,
# or ended the process; the last two have many positions.
FAULTY = [
    ((3, 3, 3), 1, 2, 7),
    ((3, 1, 1), 1, 2, 4),
    ((3, 3, 3), 2, 8, 4),
    ((1, 3, 3), 2, 5, 2),
    ((7, 7, 7), (1, 2, 2), 4, 7),
    ((7, 1, 1), 2, 4, 4),
    ((3, 3, 3), 1, 8, 14),
    ((3, 1, 1), 2, 9, 14),
]


def passes(x: Tensor, w: Tensor, stride: int, dtype: torch.dtype | None) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    padding = tuple(k // 2 for k in w.shape[2:])
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
    with sound_convolutions(CPU), autocast:
        y = functional.conv3d(x, w, stride=stride, padding=padding)
    assert y.dtype == (dtype or torch.float32)
    grads = torch.autograd.grad(y.float().square().mean(), (x, w))
    return [y.detach().float(), *grads]


@pytest.mark.parametrize(("kernel", "stride", "steps", "rows"), FAULTY)
def test_bf16_is_right_and_the_same_again_and_again(kernel, stride, steps: int, rows: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, steps, rows, rows, generator=generator)
    w = torch.randn(48, 32, *kernel, generator=generator) / 16
    x, w = (v.contiguous(memory_format=torch.channels_last_3d) for v in (x, w))
    exact = passes(x, w, stride, None)
    first = passes(x, w, stride, torch.bfloat16)
    for mine, right in zip(first, exact, strict=True):
        error = float((mine - right).norm() / right.norm())
        assert 1e-4 < error < 0.02
    for _ in range(10):
        # Fill freed memory with NaN, so that unwritten results are detected.
        for size in (w.numel(), x.numel(), 1 << 14):
            torch.full((size,), torch.nan)
        again = passes(x, w, stride, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize(("steps", "rows"), [(2, 2), (2, 7)])
def test_many_weights_in_float32_have_the_same_gradient(steps: int, rows: int):
    """Few positions by a matrix product, more by oneDNN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 256, steps, rows, rows, generator=generator)
    w = torch.randn(256, 256, 3, 3, 3, generator=generator)
    y = functional.conv3d(x, w.requires_grad_(), padding=1)
    given = torch.randn(y.shape, generator=generator)
    (right,) = torch.autograd.grad(y, w, given)
    with sound_convolutions(CPU):
        (mine,) = torch.autograd.grad(functional.conv3d(x, w, padding=1), w, given)
    assert float((mine - right).norm() / right.norm()) < 1e-5
    assert torch.equal(mine, right) == (rows == 7)


def test_all_kinds_of_convolutions_are_fixed():
    """In a module with a bias and in the folded stem; not if autocast is off."""
    torch.manual_seed(0)
    stem = StemConvolution(3, 8, 7, stride=(1, 2, 2), padding=3, bias=False)
    stem.fold = "pixels"
    layers = nn.Sequential(stem, nn.Conv3d(8, 4, 3, groups=2, padding=1))
    found: dict[str, list[Tensor]] = {}
    x = torch.randn(2, 3, 4, 8, 8)
    for name, autocast in (("exact", False), ("bf16", True)):
        layers.zero_grad()
        with sound_convolutions(CPU):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layers(x)
        nodes = str([y.grad_fn, *(n for n, _ in y.grad_fn.next_functions)])
        assert ("_Conv3dBackward" in nodes) == autocast
        y.float().square().mean().backward()
        grads = [p.grad for p in layers.parameters() if p.grad is not None]
        assert len(grads) == 3
        found[name] = grads
    for mine, right in zip(found["bf16"], found["exact"], strict=True):
        torch.testing.assert_close(mine, right, rtol=0.05, atol=0.05 * float(right.abs().max()))


def test_a_compiled_encoder_is_fixed_too():
    """Compiled as one graph by the eager backend, so bit-identical."""
    torch.manual_seed(0)
    encoder = build_backbone(BackboneConfig(width=8))
    found: list[Tensor] = []
    for _ in range(2):
        encoder.zero_grad()
        with sound_convolutions(CPU), torch.autocast("cpu", torch.bfloat16):
            levels = encoder(torch.ones(2, 3, 16, 32, 32).cumsum(4))
        torch.stack([level.float().square().mean() for level in levels]).sum().backward()
        found.append(
            torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        )
        encoder.compile(backend="eager", fullgraph=True)
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])


def test_a_frozen_encoder_has_no_gradient():
    conv = nn.Conv3d(3, 4, 3).requires_grad_(False)
    x = torch.randn(1, 3, 4, 8, 8, requires_grad=True)
    with sound_convolutions(CPU), torch.autocast("cpu", torch.bfloat16):
        conv(x).float().sum().backward()
        assert not conv(x.detach()).requires_grad
    assert conv.weight.grad is None
    assert x.grad is not None
