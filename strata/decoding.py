"""Decode videos of unknown origin completely and report their faults.

A container's header is often wrong. So no video is rejected because of its header alone: a video
counts as truncated if the file itself shows that bytes are missing, and as damaged if packets do
not decode.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from strata.errors import FaultKind, VideoFault
from strata.format.open_video import (
    MAX_FRAMES,
    MAX_PIXELS,
    no_pulse,
    open_container,
    open_video,
    reason_of,
    size_of,
)
from strata.structure import declared_frames, missing_bytes

__all__ = [
    "LONGEST",
    "MAX_IRREGULAR_SHARE",
    "PICTURE_A_PACKET",
    "Damaged",
    "Decoding",
    "Packets",
    "check_complete",
    "has_gaps",
    "read_packets",
]

PICTURE_A_PACKET = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
"""Codecs with one frame in each packet. Not MPEG-4: in AVI a packet has two frames or none."""

MIN_DECODED_SHARE = 0.9
"""Share of the declared frames or seconds that may be missing; headers are often inexact."""

Damaged = Literal["reject", "keep"]
"""What to do with a video of which some frames are damaged or missing."""

LONGEST = 1.75
"""Times the usual interval that are no gap: television's films have a factor of 1.5, a loss 2."""

MAX_IRREGULAR_SHARE = 0.02
"""Share of intervals that may differ from the usual one by more than half: lost frames and jitter
of a stream that is constant all the same."""

_REORDERED_FRAMES = 16
"""Most frames that H.264 and HEVC reorder; timestamps that jump back further start again."""


@dataclass(kw_only=True)
class Packets:
    """Facts about a stream from reading its packets without decoding them."""

    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Timestamps of the packets that are shown, ascending, in ticks."""
    is_timed: bool = True
    """Whether every packet has a timestamp."""
    starts_over: bool = False
    """Whether the timestamps jump back."""
    num_shown: int = 0
    """Number of packets that are not empty and not hidden by an edit list."""
    num_lacking: int = 0
    """Number of packets that an mp4's table places behind the end of the file."""
    marked: set[int | None] = field(default_factory=set)
    """Times of packets that the container marks as incomplete."""
    num_marked: int = 0
    """How many of them are not the last one."""
    ends_inside: bool = False
    """Whether the last packet is incomplete."""
    promised_frames: int = 0
    """Frames that the header declares; 0 if it does not."""
    missing_share: float = 0.0
    """Share of the declared duration that is missing; 0 if none is declared."""
    num_unread: int = 0
    """Bytes at the file's end in which the container finds no packets, where a share is missing."""
    num_skipped: int = 0
    """Frames that are missing by the times: a constant rate has gaps of so many intervals."""
    first_skipped: int = 0
    """Number of the first frame behind such a gap."""
    error: str = ""
    """Why the container cannot be read to its end."""


def read_packets(where: Path | bytes, source: str, pulse: Callable[[], None] = no_pulse) -> Packets:
    """Read all packets of the chosen stream, without decoding.

    Args:
        where: The file, or its content.
        source: The file as the user would name it.
        pulse: Called for each packet.

    Raises:
        VideoFault: The container does not open, or has more packets than are supported.
    """
    try:
        declared = declared_frames(where)
    except OSError as error:
        raise VideoFault(FaultKind.UNREADABLE, source, reason_of(error)) from error
    if declared > MAX_FRAMES:
        detail = f"its header declares {declared:,} frames, at most {MAX_FRAMES:,} are read"
        raise VideoFault(FaultKind.UNSUPPORTED, source, detail)
    found = Packets()
    ticks = array("q")
    num_read, highest, back, last_time = 0, 0, 0, None
    with open_video(where, source) as (container, stream):
        try:
            for packet in container.demux(stream):
                pulse()
                num_read += 1
                if num_read > MAX_FRAMES:
                    detail = f"more than {MAX_FRAMES:,} packets, the most that are read"
                    raise VideoFault(FaultKind.UNSUPPORTED, source, detail)
                if packet.is_corrupt:
                    found.marked.add(packet.pts)
                if not packet.size:
                    continue  # A frame that the camera dropped.
                last_time = packet.pts
                if packet.is_discard:
                    continue
                found.num_shown += 1
                if packet.pts is None:
                    found.is_timed = False
                else:
                    ticks.append(packet.pts)
                    highest = max(highest, packet.pts) if len(ticks) > 1 else packet.pts
                    back = max(back, highest - packet.pts)
            num_read -= 1  # PyAV adds an empty packet at the end.
        except (av.error.FFmpegError, OSError) as error:
            found.error = reason_of(error)
        found.ends_inside = bool(found.marked) and last_time in found.marked
        found.num_marked = len(found.marked) - found.ends_inside
        if ticks:
            found.times = np.sort(np.frombuffer(ticks, np.int64))
            steps = np.diff(found.times)
            usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
            found.starts_over = usual > 0 and back > _REORDERED_FRAMES * usual
            if found.is_timed and not found.starts_over and usual and has_gaps(steps, usual):
                gaps = np.flatnonzero(steps > LONGEST * usual)
                # Many gaps are a rate that varies, and no loss.
                if 0 < len(gaps) <= (1 - MIN_DECODED_SHARE) * len(steps):
                    found.num_skipped = int((np.round(steps[gaps] / usual) - 1).sum())
                    found.first_skipped = int(gaps[0]) + 1
        if "mp4" in container.format.name:
            found.num_lacking = _lacking(stream, num_read, where)
            # The table includes packets that edit lists hide, but not those that they omit.
            hidden = num_read - found.num_shown
            found.promised_frames = max(len(stream.index_entries) - hidden, 0)
        else:
            found.promised_frames = stream.frames
        promised_s = _promised_seconds(container, stream)
        base = stream.time_base
    if promised_s and base and len(found.times):
        missing = 1 - float(found.times[-1] * base) / promised_s
        if missing > 1 - MIN_DECODED_SHARE:
            last_s, last_byte = _end_of_all(where, source, pulse)
            # If only the audio is longer than the video, no frames are missing.
            if last_s < (1 - missing / 2) * promised_s:
                found.missing_share = missing
                unread = size_of(where) - last_byte
                found.num_unread = unread if unread > missing / 2 * size_of(where) else 0
    return found


def has_gaps(steps: np.ndarray, usual: float) -> bool:
    """Whether intervals are multiples of the usual one: a constant rate that lost frames."""
    multiples = steps / usual
    off = np.abs(multiples - np.maximum(np.round(multiples), 1))
    return bool(np.mean(off > max(0.1, 1 / usual)) <= MAX_IRREGULAR_SHARE)


def _lacking(stream: VideoStream, num_read: int, where: Path | bytes) -> int:
    """Number of an mp4's samples that were not read because they are past the file's end."""
    entries = stream.index_entries
    if len(entries) <= num_read:
        return 0
    num_bytes, behind = size_of(where), 0
    # Missing samples are the last ones, except in malicious tables, which are not read fully.
    for number in range(len(entries) - 1, max(len(entries) - 1 - MAX_FRAMES, -1), -1):
        if entries[number].pos + entries[number].size <= num_bytes:
            break
        behind += 1
    return behind


def _promised_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Declared duration of a stream without a declared number of frames; 0 if there is none."""
    if stream.frames:
        return 0.0
    tag = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), "")
    try:
        hours, minutes, seconds = map(float, tag.split(":"))
        return hours * 3600 + minutes * 60 + seconds
    except ValueError:
        return (container.duration or 0) / av.time_base


def _end_of_all(where: Path | bytes, source: str, pulse: Callable[[], None]) -> tuple[float, int]:
    """End of the last packet of all streams, in seconds and as a byte offset in the file."""
    last_s, last_byte = 0.0, 0
    with open_container(where, source) as container:
        try:
            for packet in container.demux():
                pulse()
                if packet.pts is not None and packet.time_base:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    last_s = max(last_s, float(end))
                last_byte = max(last_byte, (packet.pos or 0) + packet.size)
        except (av.error.FFmpegError, OSError):
            pass  # Decoding finds the same error and reports where.
    return last_s, last_byte


class Decoding:
    """Decodes a stream to its end despite damage, and records what was damaged.

    Args:
        container: The container that `open_video` returns.
        stream: The stream of the container.
        packets: What `read_packets` found in it.
        source: The file as the user would name it.
        pulse: Called for each packet.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        packets: Packets,
        source: str,
        pulse: Callable[[], None] = no_pulse,
    ) -> None:
        self._container = container
        self._stream = stream
        self._packets = packets
        self._source = source
        self._pulse = pulse
        self.num_decoded = 0
        """Number of frames decoded so far."""
        self.num_failed = 0
        """Number of packets that did not decode."""
        self.num_patched = 0
        """Number of frames that the decoder concealed in part."""
        self.num_before_key = 0
        """Number of packets before the first key frame, which cannot be decoded."""
        self._has_begun = False
        self.first_damaged: int | None = None
        """Number of the first damaged frame, in display order."""
        self.first_error = ""

    @property
    def num_lost(self) -> int:
        """Number of packets from the first key frame on that gave no frame."""
        return max(self._packets.num_shown - self.num_decoded - self.num_before_key, 0)

    @property
    def has_picture_a_packet(self) -> bool:
        """Whether each packet of this codec is one frame that is shown."""
        name = self._stream.codec_context.codec.canonical_name
        return name in PICTURE_A_PACKET and name not in ("vp8", "vp9")  # These hide some packets.

    def frames(self) -> Iterator[VideoFrame]:
        """Iterate over all frames that decode, in display order.

        Raises:
            VideoFault: There is not enough memory for a frame.
        """
        try:
            for packet in self._container.demux(self._stream):
                self._pulse()
                if packet.is_keyframe or self.num_decoded:
                    self._has_begun = True
                # An empty packet is a dropped frame; a decoder would take it for the end.
                if packet.size:
                    self.num_before_key += not self._has_begun and not packet.is_discard
                    yield from self._decode(packet)
        except (av.error.FFmpegError, OSError) as error:
            self._packets.error = self._packets.error or reason_of(error)
        yield from self._decode(None)

    def _decode(self, packet: Packet | None) -> Iterator[VideoFrame]:
        for frame in self._send(packet):
            self.num_decoded += 1
            if frame.is_corrupt and frame.pts not in self._packets.marked:
                self.num_patched += 1
                self._damage(frame.pts, "the decoder had to conceal missing parts")
            yield frame

    def _send(self, packet: Packet | None) -> list[VideoFrame]:
        try:
            return self._stream.codec_context.decode(packet)
        except av.error.MemoryError as error:
            raise VideoFault(
                FaultKind.UNSUPPORTED, self._source, "there is not enough memory for its frames"
            ) from error
        except av.error.EOFError:
            return []
        except (av.error.FFmpegError, OSError) as error:
            if self._has_begun:
                self.num_failed += 1
                time = packet.pts if packet is not None else None
                self._damage(time, _decoders_reason(error))
            self.first_error = self.first_error or _decoders_reason(error)
            return []

    def _damage(self, time: int | None, what: str) -> None:
        if self.first_damaged is None:
            self.first_damaged = self.num_decoded
            if time is not None and self._packets.is_timed:
                self.first_damaged = int(np.searchsorted(self._packets.times, time))
            self.first_error = what


def check_complete(
    decoding: Decoding, packets: Packets, where: Path | bytes, source: str, damaged: Damaged
) -> list[str]:
    """Check a decoded video: return notes for the manifest, or raise if it cannot be used.

    Args:
        decoding: The decoding, at its end.
        packets: What `read_packets` found.
        where: The file, or its content.
        source: The file as the user would name it.
        damaged: With `keep`, damage and a missing end are notes and not errors.

    Returns:
        Notes for the manifest.

    Raises:
        VideoFault: It is truncated or damaged, or no frame decodes.
    """
    num_decoded = decoding.num_decoded
    if num_decoded == 0 and (packets.num_shown or packets.promised_frames or packets.error):
        reason = packets.error or decoding.first_error or "none of its packets gives a frame"
        raise VideoFault(FaultKind.UNREADABLE, source, reason)
    notes: list[str] = []

    def fault(kind: FaultKind, detail: str) -> None:
        if damaged == "reject":
            raise VideoFault(kind, source, detail)
        notes.append(f"{kind.value}: {detail}")

    promise = _broken_promise(packets, num_decoded)
    looks_short = bool(promise) or decoding.first_damaged is not None
    cut, is_much = _cut(packets, where, looks_short)
    if packets.error:
        of = packets.promised_frames or "an unknown number of"
        fault(FaultKind.TRUNCATED, f"{num_decoded} of {of} frames decode, then: {packets.error}")
    elif cut and (promise or is_much or decoding.num_failed):
        # Frames damaged by the truncation are not reported separately.
        fault(FaultKind.TRUNCATED, f"{cut}; {promise or f'{num_decoded} frames decode'}")
        return notes
    elif packets.num_unread:
        fault(FaultKind.DAMAGED, f"{packets.num_unread:,} bytes at the end do not read; {promise}")
    elif cut or promise:
        notes.append("; ".join(filter(None, (cut, promise))))
    expected = max(packets.num_shown, num_decoded)
    is_lossy = num_decoded + decoding.num_before_key < MIN_DECODED_SHARE * expected
    if decoding.first_damaged is None and is_lossy and promise:
        fault(
            FaultKind.DAMAGED,
            f"{decoding.num_lost:,} of {expected:,} packets give no frame, without an error",
        )
    elif decoding.first_damaged is not None:
        if not decoding.num_failed and decoding.first_damaged >= expected - 1:
            notes.append("the last frame is incomplete")
        else:
            count = decoding.num_failed + decoding.num_patched
            if decoding.has_picture_a_packet:
                count = max(count, decoding.num_lost)
            fault(
                FaultKind.DAMAGED,
                f"{count:,} of {expected:,} frames damaged, first at frame "
                f"{decoding.first_damaged}: {decoding.first_error}",
            )
    elif decoding.num_lost and decoding.has_picture_a_packet:
        notes.append(f"{decoding.num_lost:,} of {expected:,} packets give no frame")
    gaps = f"frames missing by the timestamps: {packets.num_skipped:,}, first before frame "
    gaps = f"{gaps}{packets.first_skipped}" if packets.num_skipped else ""
    # Where one file was put behind another, the last packet of the first is marked without need.
    if packets.num_marked and not packets.starts_over:
        marked = f"packets that the container marks as incomplete: {packets.num_marked:,}"
        if gaps:
            fault(FaultKind.DAMAGED, f"{gaps}; {marked}")
        else:
            notes.append(marked)
    elif gaps and not promise:
        notes.append(gaps)
    if decoding.num_before_key:
        notes.append(f"{decoding.num_before_key:,} packets before the first key frame skipped")
    return notes


def _broken_promise(packets: Packets, num_decoded: int) -> str:
    """Message about a large difference between the header and the content, or empty."""
    if num_decoded < MIN_DECODED_SHARE * packets.promised_frames:
        return f"the header declares {packets.promised_frames:,} frames, {num_decoded:,} decode"
    if packets.missing_share > 1 - MIN_DECODED_SHARE:
        share = packets.missing_share
        return f"the last {share:.0%} of the duration that the header declares are missing"
    return ""


def _cut(packets: Packets, where: Path | bytes, looks_short: bool) -> tuple[str, bool]:
    """Evidence that the file's end is missing, or empty; and whether a large part is missing.

    Many headers state a wrong length. So a wrong length counts only together with another error,
    or if a large part is missing of a file that does not declare its number of frames.
    """
    if packets.num_lacking:
        return f"the file ends before its last {packets.num_lacking:,} frames", False
    if looks_short or not packets.promised_frames:
        count = missing_bytes(where)
        is_much = count > (1 - MIN_DECODED_SHARE) * (count + size_of(where))
        if count and (is_much or looks_short):
            return f"the file ends {count:,} bytes before its structure does", is_much
    if packets.ends_inside:
        return "the file ends inside a packet", False
    return "", False


def _decoders_reason(error: Exception) -> str:
    if isinstance(error, av.error.ArgumentError):  # Also FFmpeg's error for too large a picture.
        limit = f"a picture has over {MAX_PIXELS:,} pixels"
        return f"{reason_of(error)} (the stream's parameters are unsound, or {limit})"
    return reason_of(error)
