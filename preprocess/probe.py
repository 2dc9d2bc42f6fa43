"""Read a container's facts, or say why it cannot be used."""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from strata.errors import FaultKind, VideoFault

__all__ = [
    "Timing",
    "VideoFacts",
    "hash_file",
    "no_pulse",
    "open_video",
    "read_facts",
    "read_timing",
]


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What the container says. Frame counts of headers are claims, often wrong by a few."""

    width: int
    """Pixels, before rotation."""
    height: int
    """Pixels, before rotation."""
    codec: str
    pixel_format: str
    rate: Fraction
    """Average frames per second; 0 where the container does not say."""
    claimed_frames: int
    """0 where the container does not say."""
    sample_aspect: float
    """Width of a pixel divided by its height."""


_HASH_BYTES = 1 << 20


def no_pulse() -> None:
    """For callers that watch nobody."""


def hash_file(path: Path, source: str, pulse: Callable[[], None]) -> tuple[str, int]:
    """SHA-256 and size of a file.

    Args:
        path: The file.
        source: The file as the user would name it.
        pulse: Called after each piece.

    Raises:
        VideoFault: The file is missing or may not be read.
    """
    try:
        digest, num_bytes = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_HASH_BYTES):
                digest.update(piece)
                num_bytes += len(piece)
                pulse()
        return digest.hexdigest(), num_bytes
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
        rate=Fraction(rate) if rate else Fraction(0),
        claimed_frames=stream.frames,
        sample_aspect=float(aspect) if aspect else 1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the timestamps of a stream say, without decoding it."""

    is_variable: bool
    """Whether the frames do not come at a constant rate."""
    rate: Fraction
    """Frames per second that a constant rate should have; 0 where nobody can say."""
    missing_share: float
    """Share of the promised duration that the file does not have; 0 if nothing was promised."""


_MAX_IRREGULAR_SHARE = 0.02
"""Share of intervals that may differ from the usual one by more than half: lost frames and jitter
of a stream that is constant all the same."""

_MAX_STRETCH = 2.0
"""A constant rate that would need so many times the frames, or so many times fewer, speaks of
broken timestamps, and the frames are taken as they come."""


def read_timing(path: Path, source: str, pulse: Callable[[], None]) -> Timing:
    """Read the timestamps of all packets, which costs a pass over the file and no decoding.

    Args:
        path: The file.
        source: The file as the user would name it.
        pulse: Called for each packet.

    Raises:
        VideoFault: The container does not open.
    """
    ticks = array("q")
    complete = True
    with open_video(path, source) as (container, stream):
        base = stream.time_base or Fraction(1, 1000)
        rate = Fraction(stream.guessed_rate or stream.average_rate or 0)
        promised_s = _promised_seconds(container, stream)
        try:
            for packet in container.demux(stream):
                pulse()
                if packet.size:
                    if packet.pts is None:
                        complete = False
                    else:
                        ticks.append(packet.pts)
        except (av.error.FFmpegError, OSError):
            pass  # Decoding meets it again and says where.
    times = np.sort(np.frombuffer(ticks, np.int64)) if ticks else np.zeros(0, np.int64)
    missing = 0.0
    if promised_s and len(times):
        missing = 1 - float(times[-1] * base) / promised_s
        if (
            missing > 0
            and _last_second_of_all(path, source, pulse) >= (1 - missing / 2) * promised_s
        ):
            missing = 0.0  # Sound goes on where the pictures end: they are all there.
    steps = np.diff(times)
    if not complete or len(steps) < 2:
        return Timing(is_variable=False, rate=rate, missing_share=missing)
    usual = float(np.median(steps))
    irregular = np.mean((steps < 0.5 * usual) | (steps > 1.5 * usual))
    if usual <= 0 or irregular <= _MAX_IRREGULAR_SHARE:
        return Timing(is_variable=False, rate=rate, missing_share=missing)
    constant = 1 / (Fraction(usual) * base)
    # Containers with coarse clocks blur the usual interval; the guess of FFmpeg is round.
    if rate and abs(rate / constant - 1) < 0.05:
        constant = rate
    constant = constant.limit_denominator(1001)
    stretch = float(steps.sum() * base * constant) / len(steps)
    return Timing(
        is_variable=1 / _MAX_STRETCH <= stretch <= _MAX_STRETCH,
        rate=constant,
        missing_share=missing,
    )


def _promised_seconds(container: InputContainer, stream: VideoStream) -> float:
    """How long the header says that a stream without a number of frames is; 0 if it does not."""
    if stream.frames:
        return 0.0
    tag = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), "")
    try:
        hours, minutes, seconds = map(float, tag.split(":"))
        return hours * 3600 + minutes * 60 + seconds
    except ValueError:
        return (container.duration or 0) / av.time_base


def _last_second_of_all(path: Path, source: str, pulse: Callable[[], None]) -> float:
    """The last timestamp of any stream, in seconds."""
    last = 0.0
    with open_video(path, source) as (container, _):
        try:
            for packet in container.demux():
                pulse()
                if packet.pts is not None and packet.time_base:
                    last = max(
                        last, float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    )
        except (av.error.FFmpegError, OSError):
            pass
    return last


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
