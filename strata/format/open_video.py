"""Videos of unknown origin: opened safely, and the stream chosen that players show."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from strata.errors import FaultKind, VideoFault

__all__ = [
    "MAX_FRAMES",
    "MAX_PIXELS",
    "no_pulse",
    "open_container",
    "open_video",
    "reason_of",
    "size_of",
]

MAX_PIXELS = 1 << 26
"""Most pixels of a picture, 8192 x 8192: at most 100 MB as 4:2:0 of 8 bits."""

MAX_FRAMES = 1 << 24
"""Most packets of a stream, 155 hours at 30 a second: with FFmpeg's tables about 1.3 GB."""

_FORMATS = (
    # Containers.
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,kux,asf,asf_o,mpeg,mpegts,ogg,rm,nut,"
    "mxf,gxf,wtv,dv,ivf,amv,nsv,nuv,pva,vividas,ty,dhav,mgsts,wc3movie,film_cpk,4xm,roq,smk,bink,"
    "flic,rpl,ea,mtv,mlv,"
    # Coded streams without a container.
    "h264,hevc,vvc,av1,obu,m4v,mpegvideo,mpeg1video,mpeg2video,mjpeg,mjpeg_2000,h261,h263,vc1,"
    "vc1test,dirac,cavsvideo,avs2,avs3,evc,yuv4mpegpipe,"
    # Moving pictures of the web.
    "gif,apng,jpegxl_anim"
)
"""FFmpeg's demuxers of formats that hold pictures themselves. Those that follow names to other
files or hosts (concat, hls, dash, sdp, image2, ...) are not among them."""

_NO_VIDEOS = (
    (rb"ffconcat", "a list of other files (ffconcat)"),
    (rb"#EXTM3U", "a playlist (m3u8)"),
    (rb"v=0", "the description of a network stream (SDP)"),
    (rb"<(\?xml|MPD|Smooth)", "an XML text, like the playlists of DASH"),
    (rb"\[playlist\]", "a playlist (PLS)"),
    (rb"\x89PNG", "a still picture (PNG)"),
    (rb"\xff\xd8\xff", "a still picture (JPEG)"),
    (rb"BM", "a still picture (BMP)"),
    (rb"RIFF....WEBP", "a picture (WebP)"),
    (rb"RIFF....WAVE", "sound alone (WAVE)"),
    (rb"ID3", "sound alone (MP3)"),
    (rb"fLaC", "sound alone (FLAC)"),
)
"""First bytes of files that are often named like videos, and what the message calls them."""

_STILLS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_DEFAULT_BONUS = 5_000_000
"""Pixels that a default stream is ahead of others in ffmpeg's own choice (`map_auto_video`)."""

_LOOKED_AT_PACKETS = 1000
"""How far a file with several picture streams is read to see which of them have packets."""


def no_pulse() -> None:
    """A pulse for callers that do not watch the progress."""


@contextmanager
def open_video(where: Path | bytes, source: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a container and choose its picture stream, single-threaded.

    FFmpeg gets a path as a file, whatever its characters, and opens nothing beside it. Of several
    picture streams that is taken which ffmpeg takes: the largest, with an advantage for a default
    one; attached pictures and thumbnails are none.

    Args:
        where: The file, or its content.
        source: The file as the user would name it.

    Raises:
        VideoFault: No container of pictures, no picture stream with a known codec in it, or
            pictures that are too large.
    """
    with open_container(where, source) as container:
        stream = _choose_stream(container, where, source)
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            detail = f"pictures of {width} x {height} pixels, at most {MAX_PIXELS:,} are decoded"
            raise VideoFault(FaultKind.UNSUPPORTED, source, detail)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        # The workers are the threads; frame threading would only add delay and memory.
        stream.thread_count = 1
        yield container, stream


@contextmanager
def open_container(where: Path | bytes, source: str) -> Iterator[InputContainer]:
    """Open a file of moving pictures, but no file that it refers to.

    Args:
        where: The file, or its content.
        source: The file as the user would name it.

    Raises:
        VideoFault: It is no such file, or cannot be read.
    """
    # A name with a colon would be a protocol. PyAV hands over the bytes that Python was given.
    file = f"file:{os.fspath(where)}" if isinstance(where, Path) else _Content(where, source)
    if isinstance(where, Path) and where.parent == _DESCRIPTORS:
        file = _Unnamed(where, source)
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
    }
    try:
        # HMDB51 has clips whose metadata are not UTF-8; they are not used.
        container = av.open(file, "r", options=options, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        raise VideoFault(FaultKind.UNREADABLE, source, _why_not(where, error)) from error
    with container:
        yield container


_DESCRIPTORS = Path("/proc/self/fd")


class _Unnamed(io.FileIO):
    """An open file without a name of its own, by its path below /proc; else as `_Content`."""

    def __init__(self, where: Path, source: str) -> None:
        super().__init__(where)
        self.name = f"video{PurePosixPath(source).suffix}"


class _Content(io.BytesIO):
    """A file in memory; where its first bytes are not clear, FFmpeg looks at its name."""

    def __init__(self, content: bytes, source: str) -> None:
        super().__init__(content)
        self.name = f"video{PurePosixPath(source).suffix}"


def _why_not(where: Path | bytes, error: Exception) -> str:
    """Explain why a file does not open, by its first bytes if FFmpeg's reason is unspecific."""
    if isinstance(where, bytes):
        head = where[:64]
    else:
        try:
            with where.open("rb") as file:
                head = file.read(64)
        except OSError as cause:
            return reason_of(cause)
    if not head:
        return "the file is empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for pattern, what in _NO_VIDEOS:
        if re.match(pattern, text, re.DOTALL):
            return f"{what}, no video"
    if isinstance(error, av.error.ArgumentError):  # The whitelist's refusal.
        return "FFmpeg reads it, but as no format that holds moving pictures"
    return reason_of(error)


def _choose_stream(container: InputContainer, where: Path | bytes, source: str) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & _STILLS]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        detail = f"the container holds {' and '.join(kinds)}, no moving picture"
        raise VideoFault(FaultKind.NO_VIDEO_STREAM, source, detail)
    # Without a codec context PyAV knows no size either.
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise VideoFault(FaultKind.UNREADABLE, source, "the codec is not known to this FFmpeg")
    if len(known) > 1:
        filled = _streams_with_packets(where, source, {s.index for s in known})
        known = [s for s in known if s.index in filled] or known

    def score(stream: VideoStream) -> int:
        context = stream.codec_context
        bonus = _DEFAULT_BONUS if stream.disposition & Disposition.default else 0
        return context.width * context.height + bonus

    return max(known, key=score)


def _streams_with_packets(where: Path | bytes, source: str, wanted: set[int]) -> set[int]:
    found: set[int] = set()
    with open_container(where, source) as container:
        try:
            for number, packet in enumerate(container.demux()):
                if packet.size:
                    found.add(packet.stream_index)
                if wanted <= found or number == _LOOKED_AT_PACKETS:
                    break
        except (av.error.FFmpegError, OSError):
            pass  # Decoding finds the same error and reports where.
    return found


def reason_of(error: Exception) -> str:
    """The message of FFmpeg or the system, without the file's name."""
    return getattr(error, "strerror", None) or str(error)


def size_of(where: Path | bytes) -> int:
    """Bytes of a file."""
    return len(where) if isinstance(where, bytes) else where.stat().st_size
