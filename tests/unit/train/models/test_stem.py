"""The folded stem is the plain convolution: values, gradients and names."""

import pytest
import torch

from strata.errors import ConfigError
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.models.stem import FoldedStem

SHAPE = {"kernel_size": 7, "stride": (1, 2, 2), "padding": 3, "bias": False}


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(8, 8), (14, 10), (2, 2), (9, 8), (8, 7)])
def test_values_and_gradients_are_those_of_the_convolution(channels: int, size: tuple[int, int]):
    torch.manual_seed(0)
    plain = torch.nn.Conv3d(channels, 5, **SHAPE).double()
    folded = FoldedStem(channels, 5, **SHAPE).double()
    folded.load_state_dict(plain.state_dict(), strict=True)
    clips = torch.randn(2, channels, 4, *size, dtype=torch.float64)
    results = []
    for convolution in (plain, folded):
        given = clips.clone().requires_grad_()
        out = convolution(given)
        out.square().sum().backward()
        results.append((out.detach(), given.grad, convolution.weight.grad))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_channels_last_clips_give_the_same():
    torch.manual_seed(0)
    folded = FoldedStem(4, 5, **SHAPE)
    clips = torch.randn(2, 4, 4, 8, 8)
    last = clips.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(folded(last), folded(clips))


@pytest.mark.parametrize("in_channels", [3, 4])
def test_the_encoder_is_the_same_with_it(in_channels):
    networks = []
    for fold in (False, True):
        torch.manual_seed(3)
        config = BackboneConfig(width=8, in_channels=in_channels, fold_stem=fold)
        networks.append(build_backbone(config).eval())
    plain, folded = networks
    assert plain.state_dict().keys() == folded.state_dict().keys()
    clips = torch.randn(2, 3, 16, 32, 32)
    if in_channels == 4:
        clips = torch.nn.functional.pad(clips, (0, 0, 0, 0, 0, 0, 0, 1))
    for want, got in zip(plain(clips), folded(clips), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_s3d_has_no_such_stem():
    with pytest.raises(ConfigError, match="fold_stem is for r3d18"):
        BackboneConfig(name="s3d", fold_stem=True)
