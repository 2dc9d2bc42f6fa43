"""Which files are opened, which stream is taken, what is damaged, truncated or healthy."""

import io
import os
import re
import resource
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from strata.decoding import Damaged
from strata.errors import FaultKind, VideoFault
from strata.format.open_video import MAX_FRAMES, open_video
from strata.format.schema import NormalForm
from strata.format.source_video import ForeignFacts, decode_frames, measure_video
from strata.preprocess.transcode import FrameSource
from strata.structure import declared_frames, missing_bytes
from tests.support.source_videos import moving_scene, write_video
from tests.unit.preprocess.test_transcode import FORM, fault_of, psnr, transcode

FORMAT = NormalForm(payload="foreign", width=96, height=64, min_frames=1)


def sharded(path: Path, damaged: Damaged = "reject") -> tuple[int, list[str]]:
    """Number of frames and notes of the sharder; those of foreign shards must be the same."""
    source = FrameSource(path, "a", FORM, damaged=damaged)
    count = sum(len(planes) for planes in source.segments())
    if damaged == "reject" and not source.resampled:
        facts = measure_video(path.read_bytes(), "a")
        assert (facts.num_frames, list(facts.notes)) == (count, source.notes)
    return count, source.notes


def both_faults(path: Path) -> VideoFault:
    """The fault that the sharder finds; that of a foreign shard must be the same."""
    fault = fault_of(path)
    with pytest.raises(VideoFault) as caught:
        measure_video(path.read_bytes(), "a")
    assert (caught.value.kind, caught.value.detail) == (fault.kind, fault.detail)
    return fault


def remuxed(
    given: Path,
    path: Path,
    change: Callable[[int, av.Packet], bool] = lambda number, packet: True,
    **options: str,
) -> Path:
    """Copy the packets for which `change` is true into another container."""
    with av.open(str(given)) as source, av.open(str(path), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            if change(number, packet):
                packet.stream = stream
                container.mux(packet)
    return path


def h264(path: Path, count: int = 100, **options: str) -> Path:
    settings = {"g": "25", "bf": "2", **options}
    return write_video(path, moving_scene(count, 96, 64), codec="libx264", options=settings)


def without_a_packet(path: Path, number: int) -> None:
    """Leave out the bytes of a packet of a stream whose packets stand one behind the other."""
    with av.open(str(path)) as container:
        places = [p.pos or 0 for p in container.demux(video=0) if p.size]
    content = path.read_bytes()
    path.write_bytes(content[: places[number]] + content[places[number + 1] :])


# Which files are opened.


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"ffconcat version 1.0\nfile good.mp4\n", r"a list of other files \(ffconcat\)"),
        (b"\n  ffconcat version 1.0\nfile 'good.mp4'\n", r"a list of other files|Invalid data"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\ngood.mp4\n", r"a playlist \(m3u8\)"),
        (
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            r"a network stream \(SDP\)",
        ),
        (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', "XML text"),
        (b"[playlist]\nFile1=good.mp4\n", r"a playlist \(PLS\)"),
        (b"1\n00:00:00,000 --> 00:00:04,000\ntext\n", "no format that holds moving pictures"),
    ],
    ids=["concat", "concat after space", "hls", "sdp", "dash", "pls", "subtitles"],
)
def test_a_text_that_names_other_files_is_not_followed(tmp_path: Path, content: bytes, what: str):
    h264(tmp_path / "good.mp4")
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    fault = both_faults(path)
    assert fault.kind is FaultKind.UNREADABLE
    assert re.search(what, fault.detail), fault.detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_a_still_picture_is_no_video(tmp_path: Path, kind: str):
    path = tmp_path / "a.mp4"
    Image.new("RGB", (96, 64)).save(path, kind)
    fault = both_faults(path)
    assert fault.kind is FaultKind.UNREADABLE
    assert "picture" in fault.detail


@pytest.mark.parametrize(
    "name",
    ["a:b.mp4", "http:x.mp4", "file:x.mp4", "%03d.mp4", "café.mp4", b"caf\xe9.mp4", "a|b.mp4"],
)
def test_any_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | bytes):
    good = h264(tmp_path / "good.mp4", 10)
    path = Path(os.fsdecode(name))
    monkeypatch.chdir(tmp_path)
    good.rename(path)
    assert sharded(path) == (10, [])


# Which stream.


def two_streams(path: Path, streams: list[tuple[int, int, Disposition, int]]) -> Path:
    """Each of a width, a height, flags and a number of frames; grey of 60 times its number."""
    with av.open(str(path), "w") as container:
        made = []
        for width, height, flags, _ in streams:
            stream = container.add_stream("mjpeg", rate=25)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
            stream.disposition = flags
            made.append(stream)
        for number, (width, height, _, count) in enumerate(streams):
            picture = np.full((height, width, 3), 60 * (number + 1), np.uint8)
            for _ in range(count):
                container.mux(made[number].encode(VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(made[number].encode())
    return path


NONE, DEFAULT = Disposition(0), Disposition.default


@pytest.mark.parametrize(
    ("streams", "taken"),
    [
        ([(64, 48, NONE, 9), (128, 96, NONE, 9)], 1),
        ([(64, 48, DEFAULT, 9), (128, 96, NONE, 9)], 0),
        ([(128, 96, NONE, 9), (64, 48, DEFAULT, 9)], 1),
        ([(128, 96, DEFAULT, 9), (64, 48, DEFAULT, 9)], 0),
        ([(64, 48, NONE, 9), (64, 48, NONE, 9)], 0),
        ([(64, 48, NONE, 9), (128, 96, DEFAULT, 0)], 0),
    ],
    ids=["largest", "default", "default last", "both", "first", "empty"],
)
def test_the_stream_that_ffmpeg_takes(
    tmp_path: Path, streams: list[tuple[int, int, Disposition, int]], taken: int
):
    path = two_streams(tmp_path / "a.mkv", streams)
    with open_video(path, "a") as (_, stream):
        assert stream.index == taken
    pictures, _ = decode_frames(path.read_bytes(), "a", 9, np.array([3]), FORMAT)
    assert abs(float(pictures.mean()) - 60 * (taken + 1)) < 4
    (planes,) = FrameSource(path, "a", FORM).segments()
    assert len(planes) == 9
    assert abs(float(planes[:, :64].mean()) - 60 * (taken + 1)) < 4


def test_a_cover_is_no_video(tmp_path: Path):
    streams = [(640, 480, Disposition.attached_pic, 1), (64, 48, NONE, 9)]
    path = two_streams(tmp_path / "a.mp4", streams)
    assert len(av.open(str(path)).streams.video) == 2
    assert sharded(path) == (9, [])
    with open_video(path, "a") as (_, stream):
        assert (stream.codec_context.width, stream.codec_context.height) == (64, 48)


# What is healthy.


def test_a_cut_without_encoding_hides_what_is_before(tmp_path: Path):
    long = h264(tmp_path / "long.mp4")
    every = transcode(long, FORM)

    def earlier(number: int, packet: av.Packet) -> bool:
        shift = round(Fraction(33, 25) / (packet.time_base or 1))
        packet.pts, packet.dts = (packet.pts or 0) - shift, (packet.dts or 0) - shift
        return number >= 25  # From the key frame before on, as ffmpeg -ss 1.32 -c copy does.

    path = remuxed(long, tmp_path / "cut.mp4", earlier, avoid_negative_ts="disabled")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 75
        assert sum(p.is_discard for p in container.demux(video=0)) == 8
    assert sharded(path) == (67, [])
    assert psnr(transcode(path, FORM), every[33:]) > 40
    pictures, _ = decode_frames(path.read_bytes(), "a", 67, np.array([0, 66]), FORMAT)
    assert psnr(pictures, every[[33, 99]]) > 30


def test_dropped_frames_of_an_avi(tmp_path: Path):
    """The muxer writes an empty chunk where a time is left out, and the header counts it."""
    whole = write_video(tmp_path / "whole.avi", moving_scene(100, 96, 64))
    path = remuxed(whole, tmp_path / "a.avi", lambda number, _: number < 20 or number % 4 != 2)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 100
    source = FrameSource(path, "a", FORM)
    # Every one is shown until the next: the rate is the header's.
    assert sum(len(planes) for planes in source.segments()) == 100
    assert (source.resampled, source.rate) == (True, 25)
    assert source.notes == ["the header declares 100 frames, 80 decode"]
    facts = measure_video(path.read_bytes(), "a")
    assert (facts.num_frames, list(facts.notes)) == (80, source.notes)


def test_a_header_that_promises_too_much(tmp_path: Path):
    path = write_video(tmp_path / "a.avi", moving_scene(50, 96, 64))
    content = bytearray(path.read_bytes())
    for place in (content.index(b"avih") + 24, content.index(b"strh") + 40):
        assert int.from_bytes(content[place : place + 4], "little") == 50
        content[place : place + 4] = (10**9).to_bytes(4, "little")
    path.write_bytes(content)
    assert sharded(path) == (50, ["the header declares 1,000,000,000 frames, 50 decode"])


def test_the_duration_of_the_uncut_original(tmp_path: Path):
    path = h264(tmp_path / "a.mkv")
    content = path.read_bytes()
    assert content.count(b"00:00:04.0") == 1
    path.write_bytes(content.replace(b"00:00:04.0", b"00:00:40.0"))
    count, notes = sharded(path)
    assert count == 100
    assert notes == ["the last 90% of the duration that the header declares are missing"]


def test_a_capture_that_begins_inside_a_group(tmp_path: Path):
    path = h264(tmp_path / "a.ts")
    packets = remuxed(path, tmp_path / "b.ts", lambda number, _: number >= 7)
    count, notes = sharded(packets)
    assert count == 75
    assert notes == ["18 packets before the first key frame skipped"]


def test_size_and_pixels_change_on_the_way(tmp_path: Path):
    parts = [h264(tmp_path / "a.ts", 25)]
    wide = moving_scene(25, 160, 48)
    parts.append(write_video(tmp_path / "b.ts", wide, codec="libx264"))
    path = tmp_path / "c.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert sharded(path) == (50, [])


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "gray"])
@pytest.mark.parametrize(
    ("width", "height"), [(4320, 16), (16, 4320), (2000, 2), (6000, 14), (2, 2)]
)
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_strips_are_scaled(tmp_path: Path, width: int, height: int, fit: str, pixel_format: str):
    path = tmp_path / "a.mkv"
    level = np.arange(20, 220, 50, dtype=np.uint8)[:, None, None, None]
    frames = np.zeros((4, height, width, 3), np.uint8) + level
    write_video(path, frames, codec="ffv1", pixel_format=pixel_format)
    form = NormalForm(width=96, height=64, min_frames=1, fit=fit)  # pyright: ignore[reportArgumentType]
    means = transcode(path, form).mean((1, 2, 3))
    np.testing.assert_allclose(means, level.ravel(), atol=2)
    assert measure_video(path.read_bytes(), "a").num_frames == 4


# What is refused, and why.


@pytest.mark.parametrize(
    ("coded", "name"),
    [("YCgCo", "YCgCo"), ("ICtCp", "ICtCp"), ("bt2020c", "BT.2020 with constant luminance")],
)
def test_a_colour_matrix_that_is_not_supported(tmp_path: Path, coded: str, name: str):
    path = tmp_path / "a.mp4"
    params = {"x264-params": f"colormatrix={coded}"}
    write_video(path, moving_scene(5, 96, 64), codec="libx264", options=params)
    fault = both_faults(path)
    assert fault.kind is FaultKind.UNSUPPORTED
    assert f"the colour matrix {name} is not supported" in fault.detail


CUT = {
    "a.mp4": ({"movflags": "faststart"}, "the file ends before its last"),
    "b.mov": ({"movflags": "frag_keyframe+empty_moov"}, "the file ends before its last"),
    "c.mkv": ({}, "bytes before its structure does"),
    "d.avi": ({}, "the file ends inside a packet|bytes before its structure does"),
    "e.flv": ({}, "the file ends inside a packet"),
    "f.wmv": ({}, "bytes before its structure does|decode, then"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_whose_end_is_missing(tmp_path: Path, name: str):
    options, evidence = CUT[name]
    if name.endswith("avi"):
        path = write_video(tmp_path / name, moving_scene(100, 96, 64))
    else:
        path = remuxed(h264(tmp_path / "whole.mp4"), tmp_path / name, **options)
    assert sharded(path) == (100, [])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    fault = both_faults(path)
    assert fault.kind is FaultKind.TRUNCATED
    assert re.search(evidence, fault.detail), fault.detail
    count, (note,) = sharded(path, "keep")
    assert 40 < count < 75
    assert note == f"truncated: {fault.detail}"


def test_an_end_that_holds_no_frame_may_be_missing(tmp_path: Path):
    """The index of an AVI stands last, and all frames are before it."""
    path = write_video(tmp_path / "a.avi", moving_scene(60, 96, 64))
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"idx1") + 100])
    assert missing_bytes(path) > 0
    assert sharded(path) == (60, [])


def with_damage(path: Path, number: int, share: float = 1.0) -> int:
    """Zero a packet of a file from a share of it on; returns when it is shown."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        order = sorted(p.pts or 0 for p in packets)
        place, size = packets[number].pos or 0, packets[number].size
    content = bytearray(path.read_bytes())
    first = place + round(size * (1 - share))
    content[first : place + size] = bytes(place + size - first)
    path.write_bytes(content)
    return order.index(packets[number].pts or 0)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_a_damaged_packet(tmp_path: Path, name: str):
    path = remuxed(h264(tmp_path / "whole.mp4"), tmp_path / name)
    shown = with_damage(path, 37)
    fault = both_faults(path)
    assert fault.kind is FaultKind.DAMAGED
    assert f"of 100 frames damaged, first at frame {shown}: Invalid data" in fault.detail
    count, (note,) = sharded(path, "keep")
    assert 97 <= count < 100
    assert note == f"damaged: {fault.detail}"


def test_a_packet_that_is_lost_without_a_trace_leaves_a_gap(tmp_path: Path):
    path = h264(tmp_path / "a.flv", bf="0")
    without_a_packet(path, 37)
    note = "frames missing by the timestamps: 1, first before frame 37"
    assert sharded(path) == (99, [note])


def test_a_cluster_of_matroska_that_is_lost(tmp_path: Path):
    """FFmpeg reads on at the next cluster, and says nothing."""
    path = h264(tmp_path / "a.mkv", bf="0")
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    first, behind = packets[37].pos or 0, packets[38].pos or 0
    content[first:behind] = bytes(behind - first)
    path.write_bytes(content)
    count, (note,) = sharded(path)
    assert note == f"frames missing by the timestamps: {100 - count}, first before frame 37"


@pytest.mark.parametrize("num_lost", [1, 4])
def test_lost_packets_of_a_transport_stream(tmp_path: Path, num_lost: int):
    path = write_video(
        tmp_path / "a.ts", moving_scene(100, 96, 64), codec="libx264", options={"bf": "0"}
    )
    with av.open(str(path)) as container:
        place = [p.pos or 0 for p in container.demux(video=0) if p.size][37]
    content = path.read_bytes()
    path.write_bytes(content[:place] + content[place + 188 * num_lost :])
    fault = both_faults(path)
    assert fault.kind is FaultKind.DAMAGED
    assert re.fullmatch(
        r"frames missing by the timestamps: \d+, first before frame 3[67]; packets that the "
        r"container marks as incomplete: 1",
        fault.detail,
    )
    count, notes = sharded(path, "keep")
    assert count < 100
    assert notes == [f"damaged: {fault.detail}"]


def test_a_mark_of_the_container_alone_is_a_note(tmp_path: Path):
    """The error bit of one transport packet; everything decodes."""
    path = h264(tmp_path / "a.ts", bf="0")
    with av.open(str(path)) as container:
        place = [p.pos or 0 for p in container.demux(video=0) if p.size][37]
    content = bytearray(path.read_bytes())
    content[place + 1] |= 0x80
    path.write_bytes(content)
    assert sharded(path) == (100, ["packets that the container marks as incomplete: 1"])


def test_the_reason_of_unsound_parameters_is_not_their_size(tmp_path: Path):
    path = write_video(tmp_path / "a.mov", moving_scene(9, 96, 64), codec="rawvideo")
    assert "the stream's parameters are unsound" in both_faults(path).detail


def test_a_frame_that_the_decoder_had_to_make_up(tmp_path: Path):
    path = write_video(tmp_path / "a.avi", moving_scene(60, 96, 64))
    with_damage(path, 20, share=0.5)
    fault = both_faults(path)
    assert fault.kind is FaultKind.DAMAGED
    assert fault.detail.startswith("1 of 60 frames damaged, first at frame 20: the decoder had to")
    assert sharded(path, "keep") == (60, [f"damaged: {fault.detail}"])


def test_packets_that_give_no_frame(tmp_path: Path):
    """HEVC leaves out what refers to a damaged frame, up to the next key frame, without a word."""
    path = tmp_path / "a.mp4"
    options = {"x265-params": "keyint=50:min-keyint=50:log-level=none"}
    write_video(path, moving_scene(100, 96, 64), codec="libx265", options=options)
    with av.open(str(path)) as container:
        place = [p.pos or 0 for p in container.demux(video=0) if p.size][52]
    content = bytearray(path.read_bytes())
    content[place + 6] ^= 0xFF  # In the slice's header.
    path.write_bytes(content)
    fault = both_faults(path)
    assert fault.kind is FaultKind.DAMAGED
    assert fault.detail.endswith("of 100 packets give no frame, without an error")
    count, notes = sharded(path, "keep")
    assert count < 90
    assert any(note == f"damaged: {fault.detail}" for note in notes)


# Bombs.


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_header_that_declares_a_thousand_million_frames(tmp_path: Path):
    path = tmp_path / "a.mp4"
    h264(path, 20)
    content = bytearray(path.read_bytes())
    before = peak_bytes()
    for name, place, number in (
        (b"stsz", 8, 1),  # every sample has one byte
        (b"stsz", 12, 10**9),
        (b"stts", 12, 10**9),
        (b"stsc", 16, 10**9),
    ):
        start = content.index(name) + place
        content[start : start + 4] = number.to_bytes(4, "big")
    path.write_bytes(content)
    assert declared_frames(path) == 10**9
    fault = both_faults(path)
    assert fault.kind is FaultKind.UNSUPPORTED
    assert f"declares 1,000,000,000 frames, at most {MAX_FRAMES:,} are read" in fault.detail
    assert peak_bytes() - before < 100 << 20


@pytest.mark.parametrize("side", [9_000, 16_000, 65_500])
@pytest.mark.parametrize("kind", ["jpeg", "png", "container"])
def test_a_picture_of_thousands_of_millions_of_pixels(tmp_path: Path, kind: str, side: int):
    buffer = io.BytesIO()
    Image.new("L", (96, 64)).save(buffer, "PNG" if kind == "png" else "JPEG")
    picture = bytearray(buffer.getvalue())
    if kind == "jpeg":
        start = picture.index(b"\xff\xc0") + 5
        picture[start : start + 4] = side.to_bytes(2, "big") * 2
    elif kind == "png":
        picture[16:24] = side.to_bytes(4, "big") * 2
        picture[29:33] = zlib.crc32(picture[12:29]).to_bytes(4, "big")
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png" if kind == "png" else "mjpeg", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "gray" if kind == "png" else "yuvj420p"
        for number in range(40):
            packet = av.Packet(bytes(picture))
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    if kind == "container":
        content = bytearray(path.read_bytes())
        start = content.index(b"strf") + 12
        content[start : start + 8] = side.to_bytes(4, "little") * 2
        path.write_bytes(content)
    before = peak_bytes()
    if kind == "container":  # Only the pictures count.
        assert sharded(path)[0] == 40
    else:
        assert both_faults(path).kind is FaultKind.UNREADABLE
    assert peak_bytes() - before < 100 << 20


def test_facts_of_a_foreign_video(tmp_path: Path):
    content = h264(tmp_path / "a.mp4", 12).read_bytes()
    assert measure_video(content, "a") == ForeignFacts(num_frames=12, width=96, height=64)
