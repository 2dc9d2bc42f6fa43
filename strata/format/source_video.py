"""Videos that somebody else encoded, of any size, codec and place of key frames: frames by number.

Frame k is the k-th picture that FFmpeg decodes from the beginning. Where every packet is a picture
with a time of its own, decoding starts at the key frame before the first frame that is asked for;
else at the beginning. Only the frames asked for are scaled.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame

from strata.decoding import (
    PICTURE_A_PACKET,
    Decoding,
    Packets,
    check_complete,
    read_packets,
)
from strata.errors import FaultKind, VideoFault
from strata.format.ffmpeg_filters import Orientation, filter_graph, scale_steps, unsupported
from strata.format.open_video import open_video, reason_of
from strata.format.schema import NormalForm

__all__ = ["ForeignFacts", "decode_frames", "measure_video", "video_ext"]

_VIDEO_EXTS = ("mp4", "webm", "mkv", "avi", "mov")

_TO_RGB = "scale=flags=accurate_rnd+bitexact"
"""After full range and full chroma: in one step swscale loses one to two levels of brightness."""


@dataclass(frozen=True, kw_only=True)
class ForeignFacts:
    """Facts from decoding a video completely."""

    num_frames: int
    width: int
    """Pixels, before rotation."""
    height: int
    """Pixels, before rotation."""
    notes: tuple[str, ...] = ()
    """What is remarkable about it, for the manifest."""


def video_ext(exts: Iterable[str]) -> str | None:
    """The extension of a sample's video among those of its members, whatever its case."""
    found = {ext.lower(): ext for ext in exts}
    return next((found[ext] for ext in _VIDEO_EXTS if ext in found), None)


def measure_video(content: bytes, source: str) -> ForeignFacts:
    """Decode a video completely and return its facts.

    Args:
        content: The file.
        source: The file as the user would name it.

    Raises:
        VideoFault: It is no video, is damaged or truncated, or its pictures cannot be scaled.
    """
    packets = read_packets(content, source)
    scaler, shape = _Scaler(NormalForm(), source), None
    with open_video(content, source) as (container, stream):
        decoding = Decoding(container, stream, packets, source)
        for frame in decoding.frames():
            if shape is None:
                scaler.scale(frame, 1.0)
                shape = frame.width, frame.height
        notes = check_complete(decoding, packets, content, source, "reject")
        width, height = shape or (stream.codec_context.width, stream.codec_context.height)
    return ForeignFacts(
        num_frames=decoding.num_decoded, width=width, height=height, notes=tuple(notes)
    )


def decode_frames(
    content: bytes, source: str, num_frames: int, frames: np.ndarray, form: NormalForm
) -> tuple[np.ndarray, int]:
    """Decode some frames of a video, turned upright and scaled to the normal form.

    Args:
        content: The file.
        source: The file as the user would name it.
        num_frames: How many it has, by `measure_video`.
        frames: Shape `[N]`, int64, N at least 1, ascending, each once, each in [0, num_frames).
        form: Says size and fit.

    Returns:
        Shape `[N, height, width, 3]`, uint8, RGB; and how many frames were decoded for it.

    Raises:
        VideoFault: The video or one of the frames cannot be decoded.
    """
    try:
        times, keys = _packet_times(content, source)
        num_decoded = 0
        if len(times) == num_frames:
            wanted = [times[k] for k in frames.tolist()]
            start = max((key for key in keys if key <= wanted[0]), default=None)
            pictures, num_decoded = _take(content, source, wanted, start, form, by_time=True)
            if pictures is not None:
                return pictures, num_decoded
        pictures, more = _take(content, source, frames.tolist(), None, form, by_time=False)
    except (FFmpegError, OSError) as error:
        raise VideoFault(FaultKind.TRUNCATED, source, reason_of(error)) from error
    if pictures is None:
        detail = f"frames {frames[0]} to {frames[-1]} asked for, {more} decode"
        raise VideoFault(FaultKind.WRONG_COUNT, source, detail)
    return pictures, num_decoded + more


def _packet_times(content: bytes, source: str) -> tuple[list[int], list[int]]:
    """The times of all pictures and of key frames, ascending; none where packets lack them."""
    times, keys = [], []
    with open_video(content, source) as (container, stream):
        if stream.codec_context.codec.canonical_name not in PICTURE_A_PACKET:
            return [], []
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if packet.pts is None:
                return [], []
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    return (sorted(times), sorted(keys)) if len(set(times)) == len(times) else ([], [])


def _take(
    content: bytes,
    source: str,
    wanted: Sequence[int],
    start: int | None,
    form: NormalForm,
    *,
    by_time: bool,
) -> tuple[np.ndarray | None, int]:
    """Decode the frames at some times, or of some numbers; None if one is missing."""
    pictures = np.empty((len(wanted), form.height, form.width, 3), np.uint8)
    found, count = 0, 0
    scaler = _Scaler(form, source)
    with open_video(content, source) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream)
        packets = Packets()
        decoding = Decoding(container, stream, packets, source)
        for frame in decoding.frames():
            if decoding.num_failed:
                break
            place = frame.pts if by_time else count
            count += 1
            if place is None or place > wanted[found]:
                return None, count
            if place == wanted[found]:
                aspect = stream.sample_aspect_ratio
                pictures[found] = scaler.scale(frame, float(aspect or 1))
                found += 1
                if found == len(wanted):
                    return pictures, count
        # The index has no damaged videos: this one was good when it was made.
        if reason := packets.error or (decoding.num_failed and decoding.first_error):
            raise VideoFault(FaultKind.DAMAGED, source, f"{count} frames decode, then: {reason}")
    return None, count


class _Scaler:
    """Turns frames upright and scales them to RGB of the form's size.

    Args:
        form: Says size and fit.
        source: The file as the user would name it.
    """

    def __init__(self, form: NormalForm, source: str) -> None:
        self._form = form
        self._source = source
        self._graph: Graph | None = None
        self._shape: tuple[object, ...] = ()

    def scale(self, frame: VideoFrame, sample_aspect: float) -> np.ndarray:
        """One frame: `[height, width, 3]`, uint8.

        Raises:
            VideoFault: FFmpeg's scaler does not take such frames.
        """
        shape = (frame.width, frame.height, frame.format.name, frame.colorspace)
        shape = (*shape, frame.color_range, frame.rotation)
        try:
            if self._graph is None or shape != self._shape:
                self._graph, self._shape = self._build(frame, sample_aspect), shape
            self._graph.push(frame)
            scaled = self._graph.pull()
        except FFmpegError as error:
            raise unsupported(frame, self._source, error) from error
        if not isinstance(scaled, VideoFrame):
            raise TypeError(f"a video graph gave {type(scaled).__name__}")
        return scaled.to_ndarray()

    def _build(self, frame: VideoFrame, sample_aspect: float) -> Graph:
        turn = Orientation.of(frame)
        steps = scale_steps(frame, self._form, sample_aspect, turn, "out_range=pc")
        steps += ["format=yuv444p", _TO_RGB, "format=rgb24", *turn.filters]
        return filter_graph(frame, steps, Fraction(1, 1000))
