"""Sources from the wild against references: rotation, fields, rate, pixel shape, lost ends."""

import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from strata.errors import FaultKind
from strata.format.schema import NormalForm, segment_ext
from strata.preprocess.datasets.folder import Source
from strata.preprocess.sample import Sample
from strata.preprocess.settings import ShardSettings
from strata.preprocess.transcode import FrameSource
from tests.support.source_videos import moving_scene, write_video
from tests.unit.preprocess.test_transcode import FORM, expected_frames, fault_of, psnr, transcode

ONE = 1 << 16
MATRICES = {0: (ONE, 0, 0, ONE), 90: (0, ONE, -ONE, 0), 180: (-ONE, 0, 0, -ONE)}
MATRICES |= {270: (0, -ONE, ONE, 0)}
"""a, b, c, d of ISO/IEC 14496-12, 8.3.2, which turn the picture clockwise when it is shown."""


def turn(path: Path, clockwise_degrees: int) -> None:
    """Write a display matrix into the track header of an mp4."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = MATRICES[clockwise_degrees]
    numbers = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    assert content[place : place + 4] == ONE.to_bytes(4, "big")
    content[place : place + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)
    path.write_bytes(content)


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(tmp_path: Path, degrees: int, fit: str) -> None:
    frames = moving_scene(3, 192, 128)
    path = write_video(tmp_path / "a.mp4", frames, codec="libx264", options={"crf": "8"})
    turn(path, degrees)
    upright = np.rot90(frames, -degrees // 90, axes=(1, 2))
    if fit == "crop" and degrees != 180:  # 128 x 192 to 3 : 2 leaves 128 x 85.3
        upright = upright[:, 53:139]
    form = NormalForm(width=96, height=64, quality=95, min_frames=1, fit=fit)  # pyright: ignore[reportArgumentType]
    found = transcode(path, form)
    assert psnr(found, expected_frames(upright, 96, 64)) > 29
    source = FrameSource(path, "a", form)
    list(source.segments())
    assert source.rotation_degrees == (360 - degrees) % 360


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_interlaced(tmp_path: Path, order: str) -> None:
    # Grey, as the conversion of the test's frames to 4:2:0 would mix the colours of both fields.
    scene = moving_scene(8, 96, 64).mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    # Two moments in one frame, as a camera of fields saw them; the square moves 12 pixels between.
    first, second = scene, np.roll(scene, 12, axis=2)
    woven = first.copy()
    later = slice(1, None, 2) if order == "tff" else slice(0, None, 2)
    woven[:, later] = second[:, later]
    options = {"crf": "4", "x264-params": f"{order}=1"}
    path = write_video(
        tmp_path / "a.mkv", woven, codec="libx264", options=options, field_order=order
    )
    source = FrameSource(path, "a", FORM)
    assert sum(len(p) for p in source.segments()) == 8
    assert source.deinterlaced
    found = transcode(path, FORM)[1:-1]
    assert psnr(found, first[1:-1]) > psnr(woven, first) + 6
    progressive = write_video(tmp_path / "b.mkv", woven, codec="libx264", options={"crf": "4"})
    source = FrameSource(progressive, "b", FORM)
    list(source.segments())
    assert not source.deinterlaced


def times_of(gaps: dict[int, int], count: int = 40, usual_ms: int = 40) -> list[int]:
    times = [0]
    for place in range(1, count):
        times.append(times[-1] + gaps.get(place, usual_ms))
    return times


def test_varying_rate_becomes_constant(tmp_path: Path) -> None:
    frames = moving_scene(40, 96, 64)
    times = times_of({5: 120, 11: 80, 20: 160})
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1", times_ms=times)
    source = FrameSource(path, "a", FORM)
    list(source.segments())
    assert source.resampled
    assert source.rate == 25
    # By hand: at each 1/25 s the frame that is shown then.
    shown = [max(k for k, t in enumerate(times) if t <= 40 * n) for n in range(times[-1] // 40 + 1)]
    assert source.num_frames == len(shown) == 46
    found = transcode(path, FORM)
    assert psnr(found, frames[shown]) > 30
    nearest = [int(np.argmin(np.square(frames.astype(int) - f).mean((1, 2, 3)))) for f in found]
    assert nearest == shown


@pytest.mark.parametrize(
    "times",
    [
        [round(k * 1001 / 30) for k in range(60)],  # constant, in a coarse clock
        times_of({30: 80}, 60),  # one lost frame of 60
        times_of({3: 900_000, 9: 900_000, 12: 900_000}),  # broken
    ],
    ids=["jitter", "one lost", "broken"],
)
def test_rate_is_left_alone(tmp_path: Path, times: list[int]) -> None:
    frames = moving_scene(len(times), 96, 64)
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1", times_ms=times)
    source = FrameSource(path, "a", FORM)
    list(source.segments())
    assert not source.resampled
    assert source.num_frames == len(times)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    form = NormalForm(width=96, height=64, fit="crop", quality=95, min_frames=1)
    frames = moving_scene(2, 96, 128)
    wide = tmp_path / "a.ts"  # Only the coded stream itself has the shape.
    settings = {"codec": "libx264", "options": {"crf": "8"}, "sample_aspect": Fraction(2)}
    write_video(wide, frames, **settings)
    assert psnr(transcode(wide, form), expected_frames(frames, 96, 64)) > 30
    square = write_video(tmp_path / "b.mkv", frames, codec="ffv1")
    assert psnr(transcode(square, form), frames[:, 32:96]) > 30


def add_sound(path: Path, seconds: int) -> None:
    """Copy a video into a container that also has sound, interleaved."""
    silent = path.rename(path.with_stem("silent"))
    with av.open(str(silent)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [p for p in given.demux(video=0) if p.size]
        sound = container.add_stream("mp2", rate=32000, layout="mono")
        for second in range(seconds):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 32000), np.int16), format="s16", layout="mono"
            )
            frame.sample_rate, frame.pts = 32000, 32000 * second
            for packet in packets:
                if second <= float((packet.pts or 0) * (packet.time_base or 0)) < second + 1:
                    packet.stream = stream
                    container.mux(packet)
            container.mux(sound.encode(frame))
    silent.unlink()


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_cut_off_without_a_frame_count(tmp_path: Path, suffix: str) -> None:
    codec, options = ("ffv1", {}) if suffix == "mkv" else ("libvpx-vp9", {"deadline": "realtime"})
    path = tmp_path / f"a.{suffix}"
    write_video(path, moving_scene(100, 96, 64), codec=codec, options=options, quality=400_000)
    whole = path.read_bytes()
    assert sum(len(p) for p in FrameSource(path, "a", FORM).segments()) == 100
    path.write_bytes(whole[: len(whole) * 6 // 10])
    fault = fault_of(path)
    assert fault.kind is FaultKind.TRUNCATED
    assert "declares" in fault.detail or "decode, then" in fault.detail


def test_sound_longer_than_the_video_is_not_a_cut(tmp_path: Path) -> None:
    # A transport stream has one duration for all, and no number of frames.
    path = write_video(tmp_path / "a.ts", moving_scene(50, 96, 64), codec="mpeg2video")
    add_sound(path, 6)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
        assert (container.duration or 0) > 4 * av.time_base
    assert sum(len(p) for p in FrameSource(path, "a", FORM).segments()) == 50


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """The bound for a film of ten hours, on something small: 254 and 1,270 frames of 512 rows."""
    form = NormalForm(width=32, height=512, min_frames=1)
    peaks = []
    for segments in (2, 10):
        frames = np.repeat(moving_scene(1, 32, 32), 127 * segments, axis=0)
        path = write_video(tmp_path / f"{segments}.avi", frames)
        settings = ShardSettings(form=form, read_back="all")
        tracemalloc.start()
        members = sum(1 for _ in Sample(Source(name="a", path=path), (), settings).members())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert members == segments + 2
    assert peaks[1] < 1.1 * peaks[0]


def test_member_names_of_a_very_long_video() -> None:
    assert segment_ext(7) == "007.jpg"
    assert segment_ext(2114) == "2114.jpg"  # ten hours at 30 frames/s
    assert segment_ext(3, "mp4") == "003.mp4"


def test_mp4_segments_of_a_sample(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", moving_scene(100, 96, 64))
    form = NormalForm(width=96, height=64, min_frames=1, payload="mp4", segment_frames=48)
    sample = Sample(Source(name="a", path=path), (), ShardSettings(form=form))
    names = [ext for ext, _ in sample.members()]
    assert names == ["000.mp4", "001.mp4", "002.mp4", "frames.i32", "json"]
    assert sample.num_frames == 100
