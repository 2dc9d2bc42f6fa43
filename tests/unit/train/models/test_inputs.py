"""Inputs of an encoder: RGB or frame differences."""

from typing import Any

import pytest
import torch
from torch import nn

from strata.errors import ConfigError
from strata.train.method.model import VideoModel
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.models.inputs import IMAGENET_STD, frame_differences, normalise

PHASE = Phase(stage=1, lr_factor=1.0, queue=False, prototypes_frozen=False)


def some_clips(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


def test_differences_as_loops_over_pixels():
    clips = some_clips(2, 5, 4, 6)
    found = frame_differences(normalise(clips, 3))
    for n in range(2):
        for t in range(5):
            first = min(t, 3)  # the last one is repeated
            for channel in range(3):
                change = clips[n, first + 1, ..., channel].float() - clips[n, first, ..., channel]
                expected = 3 * change / 255 / IMAGENET_STD[channel]
                torch.testing.assert_close(found[n, channel, t], expected, atol=1e-5, rtol=1e-5)


def test_static_pixels_are_zero_and_one_frame_gives_zeros():
    still = normalise(some_clips(1, 1, 8, 8).expand(2, 4, 8, 8, 3), 3)
    assert not frame_differences(still).any()
    assert not frame_differences(still[:, :, :1]).any()


def test_the_memory_keeps_channels_last():
    seen = normalise(some_clips(2, 4, 8, 8), 4)
    assert frame_differences(seen).stride() == seen.stride()


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
def test_an_encoder_of_differences_takes_rgb_clips(name: Any):
    torch.manual_seed(0)
    plain = build_backbone(BackboneConfig(name=name, width=8)).eval()
    torch.manual_seed(0)
    other = build_backbone(BackboneConfig(name=name, width=8, input="difference")).eval()
    clips = normalise(some_clips(1, 8, 32, 32), 3)
    with torch.no_grad():
        for mine, theirs, rgb in zip(
            other(clips), plain(frame_differences(clips)), plain(clips), strict=True
        ):
            assert torch.equal(mine, theirs)
            assert not torch.allclose(mine, rgb)


class _Recorder(nn.Module):
    """Records the input of the first convolution."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[torch.Tensor] = []

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        self.seen.append(clips.detach().clone())
        return self.inner(clips)


@pytest.mark.parametrize("long_frames", [8, 16])
def test_both_sees_the_second_short_clip_as_differences(long_frames: int):
    """With a long sequence of a short clip's length in the same pass, and in one of its own."""
    config = MethodConfig(temporal_from_stage=1, shuffle=False, num_prototypes=4, queue_length=4)
    torch.manual_seed(0)
    model = VideoModel(BackboneConfig(width=8, input="both"), config, clip_frames=8)
    recorder = _Recorder(model.backbone.stem)  # pyright: ignore[reportArgumentType]
    model.backbone.stem = recorder
    short, long = some_clips(2, 2, 8, 32, 32), some_clips(2, long_frames, 32, 32, seed=1)
    model.backbone.input_conv = lambda: recorder.inner[0]  # type: ignore[method-assign,index]
    orders = model.orders(torch.arange(2).numpy(), 0, 0, 8)
    model(short, long, *orders, PHASE)
    seen = recorder.seen[0].unflatten(0, (2, -1))
    for video in range(2):
        first, second = normalise(short[video], 3)
        assert torch.equal(seen[video, 0], first)
        assert torch.equal(seen[video, 1], frame_differences(second[None])[0])
        longs = recorder.seen[1][video] if long_frames == 16 else seen[video, 2]
        assert torch.equal(longs, normalise(long[video][None], 3)[0])
    # Afterwards it takes RGB.
    assert not build_backbone(BackboneConfig(width=8, input="both")).differences


def test_another_input_is_refused():
    with pytest.raises(ConfigError, match="input is 'flow'; use rgb, difference, both"):
        BackboneConfig(input="flow")  # pyright: ignore[reportArgumentType]
