"""A source file: its bytes and hash, its container's fields, its timing."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from av.video.stream import VideoStream

from strata.decoding import LONGEST, MAX_IRREGULAR_SHARE, Packets, has_gaps
from strata.errors import FaultKind, VideoFault
from strata.transfer import Store, as_url

__all__ = [
    "SourceContent",
    "Timing",
    "VideoFacts",
    "open_source",
    "read_facts",
    "stamp_of",
    "timing_of",
]


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """Facts from the container's header."""

    width: int
    """Pixels, before rotation."""
    height: int
    """Pixels, before rotation."""
    codec: str
    pixel_format: str
    rate: Fraction
    """Average frames per second; 0 if the container has none."""
    guessed_rate: Fraction
    """FFmpeg's own guess, which is round; 0 where it has none."""
    coded_rate: Fraction
    """Frames per second by the coded stream; 0 if it has none."""
    time_base: Fraction
    """Seconds of a tick of the timestamps."""
    sample_aspect: float
    """Width of a pixel divided by its height."""


_PIECE_BYTES = 1 << 20
_MEMORY_BYTES = 1 << 26
"""A source up to this size is read into memory, a larger one from a URL to an unnamed file."""


@dataclass(frozen=True)
class SourceContent:
    """A source that was read completely, once."""

    where: Path | bytes
    """Its bytes; of a large one the file, whose pages the kernel holds."""
    sha256: str
    num_bytes: int


@contextmanager
def open_source(path: Path, source: str, pulse: Callable[[], None]) -> Iterator[SourceContent]:
    """Read a source from storage once: hash, timing and decoding use the same bytes.

    Args:
        path: The file, or its URL.
        source: The file as the user would name it.
        pulse: Called after each piece.

    Raises:
        VideoFault: The file is missing or may not be read.
    """
    url = as_url(path)
    if url is not None:
        with _downloaded(url, source, pulse) as file:
            yield _content_of(file, Path(f"/proc/self/fd/{file.fileno()}"), pulse)
        return
    try:
        with path.open("rb", buffering=0) as file:
            content = _content_of(file, path, pulse)
    except OSError as error:
        raise VideoFault(FaultKind.UNREADABLE, source, error.strerror or str(error)) from error
    yield content


def _content_of(file: IO[bytes], path: Path, pulse: Callable[[], None]) -> SourceContent:
    digest, num_bytes, pieces = hashlib.sha256(), 0, list[bytes]()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
        num_bytes += len(piece)
        if num_bytes <= _MEMORY_BYTES:
            pieces.append(piece)
        else:
            pieces.clear()
        pulse()
    where = path if num_bytes > _MEMORY_BYTES else b"".join(pieces)
    return SourceContent(where, digest.hexdigest(), num_bytes)


@contextmanager
def _downloaded(url: str, source: str, pulse: Callable[[], None]) -> Iterator[IO[bytes]]:
    """A local copy without a name, which is gone when it is closed, however a process ends."""
    folder, _, name = url.rpartition("/")
    with tempfile.TemporaryFile() as file:
        if not _store(folder).fetch(name, file, pulse):
            raise VideoFault(FaultKind.UNREADABLE, source, "no such file")
        yield file


@lru_cache(maxsize=64)
def _store(url: str) -> Store:
    return Store(url)


def stamp_of(path: Path) -> str:
    """Size, and time of change or the store's hash, of a source; empty if it is missing."""
    url = as_url(path)
    if url is not None:
        folder, _, name = url.rpartition("/")
        found = _store(folder).info(name)
        return "" if found is None else found.stamp
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def read_facts(stream: VideoStream) -> VideoFacts:
    """The facts of a chosen stream."""
    context = stream.codec_context
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    aspect = stream.sample_aspect_ratio
    return VideoFacts(
        width=context.width,
        height=context.height,
        codec=context.name,
        pixel_format=context.pix_fmt or "unknown",
        rate=Fraction(rate or 0),
        guessed_rate=Fraction(stream.guessed_rate or stream.average_rate or 0),
        coded_rate=Fraction(context.framerate or 0),
        time_base=stream.time_base or Fraction(1, 1000),
        sample_aspect=float(aspect) if aspect else 1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Timing of a stream by its timestamps."""

    is_variable: bool
    """Whether the frames do not come at a constant rate."""
    rate: Fraction
    """Frames per second that a constant rate has or should have; 0 if unknown."""


_SHORTEST = 0.5
"""Times the usual interval that are no irregular one, as are `LONGEST`."""

_CUT_INTERVALS = 2
"""Intervals that may always be irregular: a cut without encoding leaves so many where the last
frames lack some between them, and in a short clip those would be a large share."""

_MAX_STRAY = 2.0
"""Frames by which a stream at a stated rate may be early or late: in program streams only some
packets have times, and what FFmpeg puts between them runs ahead and falls back."""

_MAX_STRETCH = 2.0
"""A constant rate that would need so many times the frames, or so many times fewer, speaks of
broken timestamps, and the frames are taken as they come."""

_SAME_RATE = 0.05
"""Relative difference of two rates that mean the same: coarse clocks blur intervals."""


def timing_of(packets: Packets, facts: VideoFacts) -> Timing:
    """Whether the rate varies, and which constant rate the frames have or should have.

    Timestamps decide only where they are sound: all there, of one clock, and hardly any twice.

    Args:
        packets: Of the stream.
        facts: Of the stream.
    """
    times, base = packets.times, facts.time_base
    as_stated = Timing(is_variable=False, rate=facts.rate)
    steps = np.diff(times)
    forward = steps[steps > 0]
    if not packets.is_timed or packets.starts_over or len(steps) < 2 or not len(forward):
        return as_stated
    usual = float(np.median(forward))
    constant = 1 / (Fraction(usual) * base)
    if facts.guessed_rate and abs(facts.guessed_rate / constant - 1) < _SAME_RATE:
        constant = facts.guessed_rate
    constant = constant.limit_denominator(1001)
    stretch = float(steps.sum() * base * constant) / len(steps)
    is_plausible = 1 / _MAX_STRETCH <= stretch <= _MAX_STRETCH
    irregular = np.sum((steps < _SHORTEST * usual) | (steps > LONGEST * usual))
    if irregular <= max(MAX_IRREGULAR_SHARE * len(steps), _CUT_INTERVALS):
        # The mean too, as an interval of television's films is one of two or of three fields.
        found = (float(constant), float(constant) / stretch)
        agrees = any(abs(float(facts.rate) / rate - 1) < _SAME_RATE for rate in found)
        return as_stated if agrees or not is_plausible else Timing(is_variable=False, rate=constant)
    repeated = float(np.mean(steps == 0))
    if repeated or not has_gaps(steps, usual):
        stated = (facts.coded_rate, facts.guessed_rate)
        if any(_follows(times, base, rate) for rate in stated if rate):
            return as_stated
    if repeated > MAX_IRREGULAR_SHARE or not is_plausible:
        return as_stated
    return Timing(is_variable=True, rate=constant)


def _follows(times: np.ndarray, base: Fraction, rate: Fraction) -> bool:
    """Whether the frames never stray far from a constant rate."""
    off = (times - times[0]) * float(base * rate) - np.arange(len(times))
    off -= np.median(off)
    return bool(np.mean(np.abs(off) > _MAX_STRAY) <= MAX_IRREGULAR_SHARE)
