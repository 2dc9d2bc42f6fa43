import itertools
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torchvision.models.video import r3d_18
from torchvision.models.video import s3d as torchvision_s3d

from strata.errors import ConfigError
from strata.train.models.backbones import (
    R3D18,
    S3D,
    BackboneConfig,
    LevelWidths,
    build_backbone,
)

PUBLISHED = {
    "r3d18": ((128, 8, 14, 14), (256, 4, 7, 7), (512, 2, 4, 4)),
    "s3d": ((480, 8, 14, 14), (832, 4, 7, 7), (1024, 2, 4, 4)),
}


def shapes(backbone: nn.Module, *size: int) -> tuple[tuple[int, ...], ...]:
    """Of the levels, without the batch; on the meta device, so that no arithmetic is done."""
    with torch.no_grad():
        levels = backbone.to("meta")(torch.zeros(2, *size, device="meta"))
    return tuple(tuple(level.shape[1:]) for level in levels)


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
def test_published_shapes_and_twice_the_time_for_32_frames(name):
    backbone = build_backbone(BackboneConfig(name=name))
    assert shapes(backbone, 3, 16, 112, 112) == PUBLISHED[name]
    long = tuple((c, 2 * t, h, w) for c, t, h, w in PUBLISHED[name])
    assert shapes(backbone, 3, 32, 112, 112) == long
    assert backbone.widths == LevelWidths(*(shape[0] for shape in PUBLISHED[name]))


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
@pytest.mark.parametrize("width", [8, 16, 24])
def test_narrow_backbones_and_other_sizes(name, width: int):
    backbone = build_backbone(BackboneConfig(name=name, width=width))
    for frames, side in itertools.product((8, 16), (48, 64, 80)):
        low, mid, high = shapes(backbone, 3, frames, side, side)
        assert (low[0], mid[0], high[0]) == backbone.widths
        assert low[1:] == (frames // 2, side // 8, side // 8)
        assert mid[1:] == (frames // 4, side // 16, side // 16)
        assert high[1:] == (frames // 8, -(-side // 32), -(-side // 32))


def test_published_number_of_parameters():
    assert sum(p.numel() for p in R3D18(BackboneConfig()).parameters()) == 33_203_904


def test_s3d_has_the_parameters_of_torchvision_s():
    ours, theirs = S3D(BackboneConfig(name="s3d")).state_dict(), torchvision_s3d().state_dict()
    theirs = {k: v for k, v in theirs.items() if not k.startswith("classifier")}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_s3d_computes_what_torchvision_s_does_where_no_pool_pads():
    torch.manual_seed(0)
    ours, theirs = S3D(BackboneConfig(name="s3d")).eval(), torchvision_s3d().eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    clip = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip).high, theirs.features(clip))


def test_r3d18_has_the_stages_of_torchvision_s():
    torch.manual_seed(0)
    ours, theirs = R3D18(BackboneConfig()).eval(), r3d_18().eval()
    stages = {k: v for k, v in theirs.state_dict().items() if k.startswith("layer")}
    missing, unexpected = ours.load_state_dict(stages, strict=False)
    assert not unexpected
    assert {k.split(".")[0] for k in missing} == {"stem"}
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        stem = ours.stem(clip)
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(stem))))
        torch.testing.assert_close(ours(clip).high, expected)


def tclr() -> nn.Module:
    """The network of TCLR's code, made from torchvision's."""
    network = r3d_18()
    first: Any = network.layer4[0]
    first.conv1[0] = nn.Conv3d(
        *(256, 512, 3), stride=(1, 2, 2), padding=(2, 1, 1), dilation=(2, 1, 1), bias=False
    )
    first.downsample[0] = nn.Conv3d(256, 512, 1, stride=(1, 2, 2), bias=False)
    return network


@pytest.mark.parametrize(
    ("stride", "theirs"), [(2, r3d_18), (1, tclr)], ids=["torchvision", "TCLR"]
)
def test_three_settings_give_the_r3d18_of_other_papers(stride: Literal[1, 2], theirs):
    torch.manual_seed(0)
    config = BackboneConfig(stem_pool=False, stem_frames=3, last_temporal_stride=stride)
    network = theirs().eval()
    ours = build_backbone(config).eval()
    weights = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(weights)
    assert sum(p.numel() for p in ours.parameters()) == 33_166_272
    clip = torch.randn(1, 3, 16, 32, 32)
    with torch.no_grad():
        maps = network.stem(clip)
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            maps = stage(maps)
        torch.testing.assert_close(ours(clip).high, maps)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"stem_pool": False}, ((128, 8, 28, 28), (256, 4, 14, 14), (512, 2, 7, 7))),
        ({"last_temporal_stride": 1}, ((128, 8, 14, 14), (256, 4, 7, 7), (512, 4, 4, 4))),
        ({"stem_frames": 3}, ((128, 8, 14, 14), (256, 4, 7, 7), (512, 2, 4, 4))),
        (
            {"stem_pool": False, "stem_frames": 3, "last_temporal_stride": 1},
            ((128, 8, 28, 28), (256, 4, 14, 14), (512, 4, 7, 7)),
        ),
    ],
    ids=["no pool", "last stage", "kernel", "TCLR"],
)
def test_shapes_and_strides_of_the_variants(settings: dict, want: tuple):
    config = BackboneConfig(**settings)
    assert config.is_variant
    assert not BackboneConfig().is_variant
    found = shapes(build_backbone(config), 3, 16, 112, 112)
    assert found == want
    assert tuple(16 // shape[1] for shape in found) == config.time_strides
    with pytest.raises(ConfigError, match="is for r3d18, not s3d"):
        BackboneConfig(name="s3d", **settings)


def test_stem_keeps_time_and_initialisation_is_by_fan_out():
    torch.manual_seed(0)
    backbone = R3D18(BackboneConfig(width=32))
    assert backbone.stem(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 32, 4, 8, 8)
    fan_out = 32 * 7**3
    assert backbone.input_conv().weight.std().item() == pytest.approx(
        (2 / fan_out) ** 0.5, rel=0.02
    )


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
def test_a_fourth_plane_of_zeros_changes_nothing_and_stays_zero(name):
    def build(in_channels):
        torch.manual_seed(0)
        config = BackboneConfig(name=name, width=8, in_channels=in_channels)
        return build_backbone(config).double()

    three, four = build(3), build(4)
    clips = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    padded = torch.cat([clips, clips.new_zeros(2, 1, 8, 32, 32)], dim=1)
    outputs = []
    for model, x in ((three, clips), (four, padded)):
        # Adam with L2 in the gradient, the method's, moves whatever has a gradient.
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-2)
        levels = model(x)
        outputs.append(levels)
        torch.stack([level.square().mean() for level in levels]).sum().backward()
        before = model.input_conv().weight.detach().clone()
        optimizer.step()
        assert (model.input_conv().weight - before)[:, :3].abs().min() > 0
    torch.testing.assert_close(outputs[1], outputs[0])
    wider = four.input_conv().weight
    for ours, theirs in zip(four.parameters(), three.parameters(), strict=True):
        assert ours.grad is not None
        gradient = ours.grad[:, :3] if ours is wider else ours.grad
        torch.testing.assert_close(gradient, theirs.grad)
    assert wider.grad is not None
    assert not wider.grad[:, 3].any()
    assert not wider[:, 3].any()


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
def test_levels_are_those_of_the_pass_and_channels_last_gives_the_same(name):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, width=8)).double()
    clips = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    levels = backbone(clips)
    copies = [level.detach().clone() for level in levels]
    torch.stack([level.mean() for level in levels]).sum().backward()
    # Nothing downstream wrote into the maps that the losses read.
    assert all(torch.equal(a, b) for a, b in zip(levels, copies, strict=True))
    backbone.to(memory_format=torch.channels_last_3d)
    again = backbone(clips.to(memory_format=torch.channels_last_3d))
    for ours, theirs in zip(again, levels, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_momentum_is_a_setting():
    backbone = build_backbone(BackboneConfig(name="s3d", width=8, bn_momentum=0.25))
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm3d)]
    assert norms
    assert {(n.momentum, n.eps) for n in norms} == {(0.25, 0.001)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "r3d34"}, "name is 'r3d34'; use r3d18 or s3d"),
        ({"width": 20}, "width is 20; use a multiple of 8"),
        ({"width": 0}, "width is 0"),
        ({"in_channels": 1}, "in_channels is 1; use 3 or 4"),
        ({"bn_momentum": 0.0}, "bn_momentum is 0.0; use more than 0, at most 1"),
        ({"stem_frames": 5}, "stem_frames is 5; use 7 or 3"),
        ({"last_temporal_stride": 4}, "last_temporal_stride is 4; use 2 or 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message: str):
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(**settings)
