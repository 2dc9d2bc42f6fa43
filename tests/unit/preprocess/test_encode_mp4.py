import io
from fractions import Fraction

import av
import numpy as np
import pytest

from strata.errors import FaultKind, ShardError, VideoFault
from strata.format.schema import NormalForm
from strata.preprocess.encode_mp4 import encode_mp4, verify_mp4
from tests.support.source_videos import moving_scene


def planes_of(count: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Full-range BT.601 planes of a scene, by PIL-free arithmetic of JFIF."""
    rgb = moving_scene(count, width, height, seed=1).astype(np.float64)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = [128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402]
    halves = [c.reshape(count, height // 2, 2, width // 2, 2).mean((2, 4)) for c in chroma]
    stacked = np.stack(halves, 1).reshape(count, height // 2, width)
    return np.clip(np.concatenate([luma, stacked], 1).round(), 0, 255).astype(np.uint8)


def form_of(codec: str, quantizer: int, gop: int = 16) -> NormalForm:
    settings = {"payload": "mp4", "codec": codec, "quantizer": quantizer, "gop": gop}
    return NormalForm(width=96, height=64, min_frames=1, **settings)  # pyright: ignore[reportArgumentType]


CODECS = [("h264", 18), ("vp9", 20), ("mjpeg", 3)]


@pytest.mark.parametrize(("codec", "quantizer"), CODECS)
def test_pictures_and_structure(codec: str, quantizer: int) -> None:
    form, planes = form_of(codec, quantizer), planes_of(40)
    content = encode_mp4(planes, form, Fraction(30000, 1001))
    assert content == encode_mp4(planes, form, Fraction(30000, 1001))
    offsets, lengths = verify_mp4(content, planes, form, "a")
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in (codec, f"lib{codec}")
        assert stream.average_rate == Fraction(30000, 1001)
        packets = [p for p in container.demux(stream) if p.size]
    assert [p.pts for p in packets] == [p.dts for p in packets]
    keys = [k for k, p in enumerate(packets) if p.is_keyframe]
    assert keys == ([0, 16, 32] if codec != "mjpeg" else list(range(40)))
    for packet, offset, length in zip(packets, offsets, lengths, strict=True):
        assert content[offset : offset + length] == bytes(packet)
    with av.open(io.BytesIO(content), "r") as container:
        found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    error = found.astype(np.float64) - moving_scene(40, 96, 64, seed=1)
    # A wrong range or matrix shifts the means by 5 levels and more.
    assert np.abs(error.mean((0, 1, 2))).max() < 1.5
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 28


@pytest.mark.parametrize("gop", [1, 16])
def test_groups_are_closed(gop: int) -> None:
    """Every group decodes alone to the same pictures as in the whole."""
    form, planes = form_of("h264", 20, gop), planes_of(33)
    content = encode_mp4(planes, form, Fraction(25))
    with av.open(io.BytesIO(content), "r") as container:
        whole = [f.to_ndarray() for f in container.decode(video=0)]
        container.seek(32 * 512, stream=container.streams.video[0])
        last = next(container.decode(video=0))
        assert last.pts == 32 * 512
        assert np.array_equal(last.to_ndarray(), whole[32])


@pytest.mark.parametrize(
    ("codec", "quantizer"), [*CODECS, ("h264", 40), ("vp9", 55), ("mjpeg", 31)]
)
def test_verify_accepts_noise(codec: str, quantizer: int) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (17, 96, 96), dtype=np.uint8)
    form = form_of(codec, quantizer)
    verify_mp4(encode_mp4(planes, form, Fraction(25)), planes, form, "a")


@pytest.mark.parametrize(("codec", "quantizer"), CODECS)
def test_verify_finds_other_pictures_and_counts(codec: str, quantizer: int) -> None:
    form, planes = form_of(codec, quantizer), planes_of(20)
    other = planes.copy()
    other[7, :32] = 255 - other[7, :32]
    content = encode_mp4(other, form, Fraction(25))
    with pytest.raises(VideoFault, match="frame 7: block means of luma are off") as caught:
        verify_mp4(content, planes, form, "a")
    assert caught.value.kind is FaultKind.UNLIKE
    content = encode_mp4(planes[:19], form, Fraction(25))
    with pytest.raises(VideoFault, match="20 frames in, 19 packets and 19 frames out"):
        verify_mp4(content, planes, form, "a")
    with pytest.raises(VideoFault, match="does not read"):
        verify_mp4(content[: len(content) // 2], planes, form, "a")


def test_verify_finds_another_group_size() -> None:
    planes = planes_of(20)
    content = encode_mp4(planes, form_of("h264", 20, 8), Fraction(25))
    with pytest.raises(VideoFault, match="frame 8: an unexpected key frame or order"):
        verify_mp4(content, planes, form_of("h264", 20, 16), "a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantizer": 52}, "quantizer is 52; h264 has 0 to 51"),
        ({"codec": "mjpeg", "quantizer": 0}, "quantizer is 0; mjpeg has 1 to 31"),
        ({"gop": 0}, "gop is 0; use 1 to"),
        ({"segment_frames": -1}, "segment_frames is -1"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        NormalForm(payload="mp4", **settings)
