"""All eight orientations of a display matrix, in every container that has one, in both readers."""

import gc
import io
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from strata.format.ffmpeg_filters import Orientation
from strata.format.schema import NormalForm
from strata.format.source_video import decode_frames
from strata.preprocess.datasets.folder import Source
from strata.preprocess.sample import Sample
from strata.preprocess.settings import ShardSettings
from strata.preprocess.transcode import FrameSource
from tests.support.source_videos import write_video
from tests.unit.preprocess.test_transcode import transcode

ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), "RGBW", False, 0),
    "clockwise": ((0, 1, -1, 0), "BRWG", False, 270),
    "half turn": ((-1, 0, 0, -1), "WBGR", False, 180),
    "counter-clockwise": ((0, -1, 1, 0), "GWRB", False, 90),
    "left-right": ((-1, 0, 0, 1), "GRWB", True, 0),
    "up-down": ((1, 0, 0, -1), "BWRG", True, 180),
    "transpose": ((0, 1, 1, 0), "RBGW", True, 90),
    "anti-transpose": ((0, -1, -1, 0), "WGBR", True, 270),
}
"""The matrix, what is shown (top left, top right, bottom left, bottom right), and the facts."""

FORM = NormalForm(width=64, height=48, min_frames=1)


def quarters() -> np.ndarray:
    """A red, a green, a blue and a white quarter: `[48, 64, 3]`, uint8."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32, 0] = picture[:24, 32:, 1] = picture[24:, :32, 2] = 255
    picture[24:, 32:] = 255
    return picture


def letters(picture: np.ndarray) -> str:
    high, wide = picture.shape[:2]
    places = [(high // 4, wide // 4), (high // 4, -wide // 4), (-high // 4, wide // 4)]
    names: dict[tuple[int, ...], str] = {
        (1, 0, 0): "R",
        (0, 1, 0): "G",
        (0, 0, 1): "B",
        (1, 1, 1): "W",
    }
    colours = [picture[place] for place in [*places, (-high // 4, -wide // 4)]]
    return "".join(names[tuple(int(v > 128) for v in colour)] for colour in colours)


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
def test_what_a_player_shows_is_stored(tmp_path: Path, suffix: str, name: str):
    matrix, shown, mirrored, degrees = ORIENTATIONS[name]
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = tmp_path / f"a.{suffix}"
    write_video(path, quarters()[None].repeat(3, 0), codec=codec, display_matrix=matrix)
    assert letters(transcode(path, FORM)[1]) == shown
    source = FrameSource(path, "a", FORM)
    list(source.segments())
    assert source.orientation == Orientation(mirrored, degrees)
    pictures, _ = decode_frames(path.read_bytes(), "a", 3, np.array([1]), FORM)
    assert letters(pictures[0]) == shown


@pytest.mark.parametrize("name", ["upright", "up-down"])
def test_facts_mention_a_mirrored_video_only(tmp_path: Path, name: str):
    path = tmp_path / "a.mp4"
    matrix = ORIENTATIONS[name][0]
    write_video(path, quarters()[None].repeat(3, 0), codec="libx264", display_matrix=matrix)
    settings = ShardSettings(form=FORM, read_back="all")
    facts = dict(Sample(Source(name="a", path=path), (), settings).members())["json"]
    assert (b'"mirrored":true' in facts) == (name == "up-down")
    assert (b"mirrored" in facts) == (name == "up-down")


def test_other_angles_are_rounded_with_a_note(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", quarters()[None].repeat(3, 0), codec="libx264")
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    for offset, value in ((0, 0.5), (4, 0.866), (12, -0.866), (16, 0.5)):  # 60 degrees clockwise
        number = round(value * (1 << 16)).to_bytes(4, "big", signed=True)
        content[place + offset : place + offset + 4] = number
    path.write_bytes(content)
    source = FrameSource(path, "a", FORM)
    list(source.segments())
    assert source.orientation == Orientation(mirrored=False, degrees=270, is_exact=False)
    assert source.notes == ["turned by 270 degrees, the nearest quarter turn"]


def test_the_exif_of_a_camera(tmp_path: Path):
    """Motion JPEG has it in every frame, and PyAV has no name for this kind of side data."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 2  # mirrored
    Image.fromarray(quarters()).save(buffer, "JPEG", exif=exif, subsampling=0)
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj444p"
        for number in range(3):
            packet = av.Packet(buffer.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    assert letters(transcode(path, FORM)[1]) == "GRWB"
    pictures, _ = decode_frames(path.read_bytes(), "a", 3, np.array([1]), FORM)
    assert letters(pictures[0]) == "GRWB"


def test_pictures_are_given_back_without_the_garbage_collector():
    """Training collects garbage at chosen steps only; 60 of these pictures are 180 MB."""
    Orientation.of(VideoFrame(1920, 1080, "yuv420p"))
    gc.disable()
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(60):
            frame = VideoFrame(1920, 1080, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            Orientation.of(frame)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    finally:
        gc.enable()
