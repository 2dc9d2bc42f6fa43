"""The folded stem and the pooling of frames are the plain ones: values, gradients and names."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strata.train.models import stem
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.models.stem import FOLDS, FramePool, StemConvolution, folded_channels

SHAPE = {"stride": (1, 2, 2), "bias": False}


def results(layer: nn.Module, clips: Tensor, given: Tensor) -> list[Tensor]:
    """Output and gradients of a layer."""
    clips = clips.clone().requires_grad_()
    out = layer(clips)
    parameters = list(layer.parameters())
    return [out.detach(), *torch.autograd.grad(out, [clips, *parameters], given)]


@pytest.mark.parametrize("fold", FOLDS[1:])
@pytest.mark.parametrize("frames", [3, 7])
@pytest.mark.parametrize("size", [(8, 8), (14, 10), (2, 2), (9, 8), (8, 7)])
def test_values_and_gradients_are_those_of_the_convolution(
    monkeypatch: pytest.MonkeyPatch, fold: stem.Fold, frames: int, size: tuple[int, int]
):
    # Three clips in chunks of two and one.
    num_elements = 4 * (size[0] // 2 + 3) * (size[1] // 2 + 3) * folded_channels(fold, frames)
    monkeypatch.setattr(stem, "_LARGEST", 2 * num_elements)
    torch.manual_seed(0)
    shape: Any = SHAPE | {"kernel_size": (frames, 7, 7), "padding": (frames // 2, 3, 3)}
    plain = nn.Conv3d(4, 5, **shape).double()
    folded = StemConvolution(4, 5, **shape).double()
    folded.fold = fold
    folded.load_state_dict(plain.state_dict(), strict=True)
    clips = torch.randn(3, 4, 4, *size, dtype=torch.float64)
    clips[:, 3] = 0
    given = torch.randn_like(plain(clips))
    want, got = results(plain, clips, given), results(folded, clips, given)
    # The fourth plane is zero, and nobody asks for the gradient of clips.
    want[1][:, 3] = got[1][:, 3] = 0
    for right, mine in zip(want, got, strict=True):
        torch.testing.assert_close(mine, right, rtol=5e-13, atol=5e-13)


def test_chunks_stay_below_the_limit(monkeypatch: pytest.MonkeyPatch):
    clips = torch.arange(512)
    elements = 16 * 59 * 59 * folded_channels("frames8", 7)
    assert folded_channels("frames8", 7) == 88
    assert 2**31 // elements == 438
    assert [len(part) for part in stem._chunks(clips, elements)] == [256, 256]
    # A clip that is too large alone is left to the convolution.
    assert [len(part) for part in stem._chunks(clips[:2], 2**32)] == [1, 1]


@pytest.mark.parametrize("fold", FOLDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_is_the_same_with_it(fold: stem.Fold, dtype: torch.dtype):
    torch.manual_seed(3)
    network = build_backbone(BackboneConfig(width=8)).eval()
    network.channels_last()
    clips = torch.randn(2, 3, 16, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain = network(clips)
        network.fold_stem(fold)
        folded = network(clips)
    bound = 1e-4 if dtype == torch.float32 else 0.1
    for want, got in zip(plain, folded, strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
        assert got.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_frames_gives_the_same_bits(layout: torch.memory_format, dtype: torch.dtype):
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 4, 9, 8).to(dtype).contiguous(memory_format=layout)
    plain = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
    given = torch.randn_like(plain(maps))
    want, got = results(plain, maps, given), results(FramePool(), maps, given)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert got[0].is_contiguous(memory_format=layout)
