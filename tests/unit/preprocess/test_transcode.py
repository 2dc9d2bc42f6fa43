import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strata.errors import FaultKind, VideoFault
from strata.format.schema import NormalForm
from strata.format.strip_jpeg import parse_strip
from strata.preprocess.read_back import verify_strip
from strata.preprocess.transcode import FrameSource, encode_strip
from tests.support.source_videos import moving_scene, write_video

FORM = NormalForm(width=96, height=64, quality=95, min_frames=1)


def decode(jpeg: bytes, form: NormalForm) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)))
    return pixels.reshape(-1, form.height, form.width, 3)


def transcode(path: Path, form: NormalForm) -> np.ndarray:
    """All frames as RGB, `[F, H, W, 3]`, after JPEG."""
    source = FrameSource(path, path.name, form)
    return np.concatenate([decode(encode_strip(p, form), form) for p in source.segments()])


def expected_frames(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    pictures = (
        Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC) for f in frames
    )
    return np.stack([np.asarray(p) for p in pictures])


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean(np.square(found.astype(np.float64) - expected))
    return float(10 * np.log10(255**2 / error))


CODECS = {
    "mpeg4": {},
    "h264-b-frames": {"codec": "libx264", "options": {"bf": "3", "crf": "12"}},
    "h264-10-bit": {
        "codec": "libx264",
        "pixel_format": "yuv420p10le",
        "colorspace": 1,
        "options": {"crf": "12"},
    },
    "h264-444": {"codec": "libx264", "pixel_format": "yuv444p", "options": {"crf": "12"}},
    "bt709": {"codec": "libx264", "colorspace": 1, "options": {"crf": "12"}},
    "bt601-full-range": {
        "codec": "libx264",
        "pixel_format": "yuvj420p",
        "colorspace": 5,
        "full_range": True,
        "options": {"crf": "12"},
    },
    "bt709-full-range": {
        "codec": "libx264",
        "pixel_format": "yuvj420p",
        "colorspace": 1,
        "full_range": True,
        "options": {"crf": "12"},
    },
}


@pytest.mark.parametrize("settings", CODECS.values(), ids=CODECS.keys())
def test_pictures_are_those_of_the_source(tmp_path: Path, settings: dict) -> None:
    frames = moving_scene(6, 192, 128)
    path = write_video(tmp_path / "a.mkv", frames, **settings)
    found = transcode(path, FORM)
    expected = expected_frames(frames, 96, 64)
    assert found.shape == expected.shape
    # A wrong matrix or range shifts whole areas: 25 dB and less.
    assert psnr(found, expected) > 32
    means = np.abs(found.mean((0, 1, 2)) - expected.mean((0, 1, 2)))
    assert means.max() < 1.5


@pytest.mark.parametrize(("width", "height"), [(320, 128), (100, 240), (191, 127)])
def test_centre_crop_keeps_shapes(tmp_path: Path, width: int, height: int) -> None:
    frames = moving_scene(3, width, height)
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    form = NormalForm(width=96, height=64, fit="crop", quality=95, min_frames=1)
    wide, high = min(width, round(height * 1.5)), min(height, round(width / 1.5))
    left, top = (width - wide) // 2, (height - high) // 2
    cut = frames[:, top : top + high, left : left + wide]
    assert psnr(transcode(path, form), expected_frames(cut, 96, 64)) > 30


def test_segments_of_a_long_video_join_without_a_gap(tmp_path: Path) -> None:
    form = NormalForm(width=32, height=16, min_frames=1)
    tall = 5000  # more than the 4093 frames of 16 rows that one JPEG holds
    frames = np.zeros((tall, 16, 32, 3), np.uint8)
    frames += (np.arange(tall) % 200).astype(np.uint8)[:, None, None, None]
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1")
    source = FrameSource(path, path.name, form)
    sizes, levels = [], []
    for planes in source.segments():
        sizes.append(len(planes))
        levels.append(planes[:, 0, 0].copy())
    assert sizes == [4093, 907]
    assert source.num_frames == tall
    found = np.concatenate(levels).astype(int)
    assert np.abs(found - np.arange(tall) % 200).max() <= 2


def test_strip_has_a_restart_at_each_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_scene(11, 64, 48))
    for planes in FrameSource(path, path.name, FORM).segments():
        offsets, lengths = parse_strip(encode_strip(planes, FORM))
        assert len(offsets) == len(lengths) == 11


@pytest.mark.parametrize("quality", [1, 50, 95])
def test_verify_accepts_noise_at_any_quality(quality: int) -> None:
    form = NormalForm(width=96, height=64, quality=quality)
    planes = np.random.default_rng(0).integers(0, 256, (20, 96, 96), dtype=np.uint8)
    offsets, _ = verify_strip(encode_strip(planes, form), planes, form, "a")
    assert len(offsets) == 20


def smooth_planes(count: int) -> np.ndarray:
    ramp = np.linspace(20, 200, 96)[None, None, :] + np.arange(count)[:, None, None] * 6
    return np.repeat(ramp, 96, axis=1).astype(np.uint8)


@pytest.mark.parametrize("damage", ["swap", "luma", "chroma", "shift"])
def test_verify_finds_other_pictures(damage: str) -> None:
    form = NormalForm(width=96, height=64)
    planes = smooth_planes(8)
    wrong = planes.copy()
    match damage:
        case "swap":
            wrong[[3, 4]] = wrong[[4, 3]]
        case "luma":
            wrong[5, :32] += 20
        case "chroma":
            wrong[5, 64:80] += 20
        case "shift":
            wrong[:, :64] = np.roll(wrong[:, :64], 8, axis=2)
    with pytest.raises(VideoFault, match=r"frame \d: .* are off by") as caught:
        verify_strip(encode_strip(wrong, form), planes, form, "a")
    assert caught.value.kind is FaultKind.UNLIKE


@pytest.mark.parametrize("every", [1, 8])
def test_verify_finds_a_missing_frame(every: int) -> None:
    form = NormalForm(width=96, height=64)
    planes = smooth_planes(8)
    with pytest.raises(VideoFault, match="8 frames in, 7") as caught:
        verify_strip(encode_strip(planes[:7], form), planes, form, "a", every=every)
    assert caught.value.kind is FaultKind.WRONG_COUNT


def test_sampled_verification_decodes_every_nth_frame_and_the_last() -> None:
    form = NormalForm(width=96, height=64)
    planes = smooth_planes(11)
    found = []
    for frame in range(11):
        wrong = planes.copy()
        wrong[frame, :32] += 40
        try:
            verify_strip(encode_strip(wrong, form), planes, form, "a", every=4)
        except VideoFault:
            found.append(frame)
    assert found == [0, 4, 8, 10]


def test_verify_finds_damaged_bytes() -> None:
    form = NormalForm(width=96, height=64)
    planes = smooth_planes(8)
    jpeg = bytearray(encode_strip(planes, form))
    offsets, lengths = parse_strip(jpeg)
    middle = int(offsets[4] + lengths[4] // 2)
    jpeg[middle : middle + 8] = bytes(8)
    with pytest.raises(VideoFault):
        verify_strip(bytes(jpeg), planes, form, "a")


def fault_of(path: Path, form: NormalForm = FORM) -> VideoFault:
    with pytest.raises(VideoFault) as caught:
        for _ in FrameSource(path, path.name, form).segments():
            pass
    return caught.value


def test_too_short_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_scene(32, 64, 48))
    fault = fault_of(path, NormalForm(min_frames=33))
    assert fault.kind is FaultKind.TOO_SHORT
    assert fault.detail == "32 frames, 33 asked for"


@pytest.mark.parametrize(
    ("content", "detail"), [(b"", "the file is empty"), (b"hello there\n", "Invalid data")]
)
def test_no_container_is_named(tmp_path: Path, content: bytes, detail: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    fault = fault_of(path)
    assert fault.kind is FaultKind.UNREADABLE
    assert detail in fault.detail


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "none.mp4").kind is FaultKind.UNREADABLE


def test_half_a_file_is_truncated(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", moving_scene(60, 192, 128))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fault = fault_of(path)
    assert fault.kind is FaultKind.TRUNCATED
    assert "declares 60 frames" in fault.detail


def test_sound_alone_is_named(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = np.zeros((1, 8000), np.int16)
        frame = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    fault = fault_of(path)
    assert fault.kind is FaultKind.NO_VIDEO_STREAM
    assert "holds audio" in fault.detail
