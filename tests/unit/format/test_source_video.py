"""Frames of any video by number: the same from a key frame on as from the beginning."""

from pathlib import Path

import numpy as np
import pytest

from strata.errors import FaultKind, VideoFault
from strata.format.schema import NormalForm
from strata.format.source_video import decode_frames, measure_video, video_ext
from tests.support.source_videos import moving_scene, write_video
from tests.unit.preprocess.test_odd_pictures import turn
from tests.unit.preprocess.test_transcode import CODECS, expected_frames, psnr

FORM = NormalForm(payload="foreign", width=96, height=64, min_frames=1)


def decode(content: bytes, frames: np.ndarray, form: NormalForm = FORM) -> tuple[np.ndarray, int]:
    return decode_frames(content, "a", measure_video(content, "a").num_frames, frames, form)


KINDS = {
    "a.mp4": {"codec": "libx264", "options": {"bf": "3", "g": "12"}},
    "b.mkv": {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none"}},
    "c.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8"}},
    "d.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "e.mov": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_by_number(tmp_path: Path, name: str, rng: np.random.Generator):
    content = write_video(tmp_path / name, moving_scene(60, 96, 64), **KINDS[name]).read_bytes()
    assert measure_video(content, name).num_frames == 60
    every, _ = decode(content, np.arange(60))
    for chosen in (np.array([59]), np.array([40, 41]), np.sort(rng.permutation(60)[:7])):
        found, num_decoded = decode(content, chosen)
        np.testing.assert_array_equal(found, every[chosen])
        # From the key frame before the first, where packets tell where that is.
        from_start = name == "d.avi"
        assert num_decoded <= chosen[-1] + 1 - (0 if from_start else chosen[0] // 12 * 12)
    # A table that promises other frames than the packets: only decoding shows it.
    found, num_decoded = decode_frames(content, name, 61, np.array([40]), FORM)
    np.testing.assert_array_equal(found, every[[40]])
    assert num_decoded == 41
    with pytest.raises(VideoFault, match="frames 60 to 60 asked for, 60 decode") as fault:
        decode_frames(content, name, 61, np.array([60]), FORM)
    assert fault.value.kind == FaultKind.WRONG_COUNT


@pytest.mark.parametrize("settings", CODECS.values(), ids=CODECS.keys())
def test_pictures_are_those_of_the_source(tmp_path: Path, settings: dict):
    frames = moving_scene(6, 192, 128)
    content = write_video(tmp_path / "a.mkv", frames, **settings).read_bytes()
    found, _ = decode(content, np.arange(6))
    expected = expected_frames(frames, 96, 64)
    assert psnr(found, expected) > 32
    assert np.abs(found.mean((0, 1, 2)) - expected.mean((0, 1, 2))).max() < 1.5


def test_brightness_is_kept(tmp_path: Path):
    levels = np.arange(20, 240, 10)
    frames = np.ones((len(levels), 64, 96, 3)) * levels[:, None, None, None]
    path = write_video(
        tmp_path / "a.mkv", frames.astype(np.uint8), codec="libx264", options={"crf": "0"}
    )
    found, _ = decode(path.read_bytes(), np.arange(len(levels)))
    gap = found.mean((1, 2)) - levels[:, None]
    assert np.abs(gap).max() <= 1.5
    assert abs(gap.mean()) < 0.7


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(tmp_path: Path, degrees: int, fit: str):
    frames = moving_scene(3, 192, 128)
    path = write_video(tmp_path / "a.mp4", frames, codec="libx264", options={"crf": "8"})
    turn(path, degrees)
    upright = np.rot90(frames, -degrees // 90, axes=(1, 2))
    if fit == "crop" and degrees != 180:  # 128 x 192 to 3 : 2 leaves 128 x 85.3
        upright = upright[:, 53:139]
    form = NormalForm(payload="foreign", width=96, height=64, min_frames=1, fit=fit)  # pyright: ignore[reportArgumentType]
    found, _ = decode(path.read_bytes(), np.arange(3), form)
    assert psnr(found, expected_frames(upright, 96, 64)) > 29


def test_faults_have_their_kind(tmp_path: Path):
    scene = moving_scene(60, 96, 64)
    mp4 = write_video(tmp_path / "a.mp4", scene, codec="libx264").read_bytes()
    avi = write_video(tmp_path / "a.avi", scene, quality=400_000).read_bytes()
    damaged = bytearray(mp4)
    damaged[len(mp4) // 3 : len(mp4) // 2] = bytes(len(mp4) // 2 - len(mp4) // 3)
    for content, kind in (
        (b"", FaultKind.UNREADABLE),
        (b"no video at all" * 40, FaultKind.UNREADABLE),
        (mp4[: len(mp4) // 2], FaultKind.UNREADABLE),
        (bytes(damaged), FaultKind.DAMAGED),
        (avi[: len(avi) // 2], FaultKind.TRUNCATED),  # It decodes, but the header declares 60.
    ):
        with pytest.raises(VideoFault) as fault:
            measure_video(content, "a")
        assert fault.value.kind == kind, fault.value


def test_the_video_among_the_members():
    assert video_ext(["json", "MP4", "cls"]) == "MP4"
    assert video_ext(["json", "000.jpg"]) is None
