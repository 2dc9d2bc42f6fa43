"""Videos that somebody else encoded, of any size, codec and place of key frames: frames by number.

Frame k is the k-th picture that FFmpeg decodes from the beginning. Where every packet is a picture
with a time of its own, decoding starts at the key frame before the first frame that is asked for;
else at the beginning. Only the frames asked for are scaled.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from strata.errors import FaultKind, VideoFault
from strata.filters import SCALER, TURNS, centre_crop, filter_graph, quarter_turn
from strata.schema import NormalForm

__all__ = ["ForeignFacts", "decode_frames", "measure_video", "video_ext"]

_VIDEO_EXTS = ("mp4", "webm", "mkv", "avi", "mov")

_PICTURE_A_PACKET = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"})
"""MPEG-4 in AVI is none: it packs two pictures into a packet, or none."""

_MIN_DECODED_SHARE = 0.9
"""Of the frames that the header promises; below, the video is truncated, as in sharding."""

_TO_RGB = "scale=flags=accurate_rnd+bitexact"
"""After full range and full chroma: in one step swscale loses one to two levels of brightness."""


@dataclass(frozen=True, kw_only=True)
class ForeignFacts:
    """What decoding a video in full has found."""

    num_frames: int
    width: int
    """Pixels, before rotation."""
    height: int
    """Pixels, before rotation."""


def video_ext(exts: Iterable[str]) -> str | None:
    """The extension of a sample's video among those of its members, whatever its case."""
    found = {ext.lower(): ext for ext in exts}
    return next((found[ext] for ext in _VIDEO_EXTS if ext in found), None)


@contextmanager
def _open(content: bytes, source: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        container = av.open(io.BytesIO(content), "r", metadata_errors="ignore")
    except (FFmpegError, OSError) as error:
        raise VideoFault(FaultKind.UNREADABLE, source, _reason(error)) from error
    with container:
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise VideoFault(FaultKind.NO_VIDEO_STREAM, source, "there is no moving picture in it")
        if streams[0].codec_context is None:
            raise VideoFault(FaultKind.UNREADABLE, source, "the codec is not known to this FFmpeg")
        streams[0].thread_count = 1
        yield container, streams[0]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def measure_video(content: bytes, source: str) -> ForeignFacts:
    """Decode a video in full and say what it holds.

    Args:
        content: The file.
        source: The file as the user would name it.

    Raises:
        VideoFault: It cannot be decoded to its end.
    """
    count = 0
    with _open(content, source) as (container, stream):
        try:
            for _ in container.decode(stream):
                count += 1
        except (FFmpegError, OSError) as error:
            kind = FaultKind.TRUNCATED if count else FaultKind.UNREADABLE
            detail = f"{count} frames decode, then: {_reason(error)}"
            raise VideoFault(kind, source, detail) from error
        if count < _MIN_DECODED_SHARE * stream.frames:
            detail = f"the header promises {stream.frames} frames, {count} decode"
            raise VideoFault(FaultKind.TRUNCATED, source, detail)
        context = stream.codec_context
        return ForeignFacts(num_frames=count, width=context.width, height=context.height)


def decode_frames(
    content: bytes, source: str, num_frames: int, frames: np.ndarray, form: NormalForm
) -> tuple[np.ndarray, int]:
    """Decode some frames of a video, turned upright and scaled to the normal form.

    Args:
        content: The file.
        source: The file as the user would name it.
        num_frames: How many it has, as `measure_video` says.
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
        raise VideoFault(FaultKind.TRUNCATED, source, _reason(error)) from error
    if pictures is None:
        detail = f"frames {frames[0]} to {frames[-1]} asked for, {more} decode"
        raise VideoFault(FaultKind.WRONG_COUNT, source, detail)
    return pictures, num_decoded + more


def _packet_times(content: bytes, source: str) -> tuple[list[int], list[int]]:
    """The times of all pictures and of key frames, ascending; none where packets do not tell."""
    times, keys = [], []
    with _open(content, source) as (container, stream):
        if stream.codec_context.codec.canonical_name not in _PICTURE_A_PACKET:
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
    """The frames at some times, or of some numbers, both ascending; None if one does not come."""
    pictures = np.empty((len(wanted), form.height, form.width, 3), np.uint8)
    found, count = 0, 0
    scaler = _Scaler(form)
    with _open(content, source) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream)
        for frame in container.decode(stream):
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
    return None, count


class _Scaler:
    """Turns frames upright and scales them to RGB of the form's size.

    Args:
        form: Says size and fit.
    """

    def __init__(self, form: NormalForm) -> None:
        self._form = form
        self._graph: Graph | None = None
        self._shape: tuple[object, ...] = ()

    def scale(self, frame: VideoFrame, sample_aspect: float) -> np.ndarray:
        """One frame: `[height, width, 3]`, uint8."""
        shape = (frame.width, frame.height, frame.format.name, frame.colorspace)
        shape = (*shape, frame.color_range, frame.rotation)
        if self._graph is None or shape != self._shape:
            self._graph, self._shape = self._build(frame, sample_aspect), shape
        self._graph.push(frame)
        scaled = self._graph.pull()
        if not isinstance(scaled, VideoFrame):
            raise TypeError(f"a video graph gave {type(scaled).__name__}")
        return scaled.to_ndarray()

    def _build(self, frame: VideoFrame, sample_aspect: float) -> Graph:
        form = self._form
        turn = quarter_turn(frame)
        wide, high = (form.height, form.width) if turn in (90, 270) else (form.width, form.height)
        steps = []
        if form.fit == "crop":
            steps.append(centre_crop(frame.width, frame.height, sample_aspect, wide / high))
        steps += [f"scale={wide}:{high}:{SCALER}:out_range=pc", "format=yuv444p"]
        steps += [_TO_RGB, "format=rgb24", *TURNS.get(turn, ())]
        return filter_graph(frame, steps, Fraction(1, 1000))
