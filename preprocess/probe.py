"""Read a container's facts, or say why it cannot be used."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from strata.errors import FaultKind, VideoFault

__all__ = ["VideoFacts", "hash_file", "open_video", "read_facts"]


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What the container says. Frame counts of headers are claims, often wrong by a few."""

    width: int
    """Pixels, before rotation."""
    height: int
    """Pixels, before rotation."""
    codec: str
    pixel_format: str
    fps: float
    """Average frames per second."""
    claimed_frames: int
    """0 where the container does not say."""
    sample_aspect: float
    """Width of a pixel divided by its height."""


def hash_file(path: Path, source: str) -> tuple[str, int]:
    """SHA-256 and size of a file.

    Raises:
        VideoFault: The file is missing or may not be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        raise VideoFault(FaultKind.UNREADABLE, source, error.strerror or str(error)) from error


@contextmanager
def open_video(path: Path, source: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a container and choose its picture stream, single-threaded.

    Args:
        path: The file.
        source: The file as the user would name it.

    Raises:
        VideoFault: No container, or no picture stream with a known codec in it.
    """
    try:
        # HMDB51 has clips whose metadata are not UTF-8, and nobody needs them.
        container = av.open(str(path), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        reason = "the file is empty" if _is_empty(path) else _reason(error)
        raise VideoFault(FaultKind.UNREADABLE, source, reason) from error
    with container:
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            kinds = sorted({s.type for s in container.streams}) or ["nothing"]
            detail = f"the container holds {' and '.join(kinds)}, no moving picture"
            raise VideoFault(FaultKind.NO_VIDEO_STREAM, source, detail)
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoFault(FaultKind.UNREADABLE, source, "the codec is not known to this FFmpeg")
        # The workers are the threads; frame threading would only add delay and memory.
        stream.thread_count = 1
        yield container, stream


def read_facts(stream: VideoStream) -> VideoFacts:
    """The facts of a chosen stream."""
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    aspect = stream.sample_aspect_ratio
    return VideoFacts(
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        codec=stream.codec_context.name,
        pixel_format=stream.codec_context.pix_fmt or "unknown",
        fps=float(rate) if rate else 0.0,
        claimed_frames=stream.frames,
        sample_aspect=float(aspect) if aspect else 1.0,
    )


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
