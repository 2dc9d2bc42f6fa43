"""One video to the normal form: decode, turn upright, scale, and encode strips."""

import io
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.error import BlockingIOError as AVBlockingIOError
from av.error import EOFError as AVEOFError
from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame
from PIL import Image

from strata.decoding import Damaged, Decoding, check_complete, read_packets
from strata.errors import FaultKind, VideoFault
from strata.format.ffmpeg_filters import (
    UPRIGHT,
    Orientation,
    filter_graph,
    scale_steps,
    unsupported,
)
from strata.format.open_video import no_pulse, open_video
from strata.format.schema import NormalForm
from strata.preprocess.container import Timing, VideoFacts, read_facts, timing_of

__all__ = ["FrameSource", "encode_strip", "matrix_to_bt601"]

_BT601 = (0.299, 0.114)
_LUMA_WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087)}
_LUMA_WEIGHTS |= {9: (0.2627, 0.0593)}
"""Weights of red and blue by the stream's colour matrix (ITU-T H.273, table 4). What is not here is
BT.601 or says nothing, which FFmpeg takes for BT.601, or nothing that its scaler takes."""


def encode_strip(planes: np.ndarray, form: NormalForm) -> bytes:
    """Encode frames into one strip.

    The frames come in JPEG's own colours and chroma resolution, so that the encoder neither
    converts nor averages anything: each chroma value is repeated 2 x 2 and averaged back by libjpeg
    to itself.

    Args:
        planes: Shape `[F, height * 3 / 2, width]`, uint8: full-range BT.601 Y, Cb, Cr as 4:2:0
            planes, one below the other.
        form: The normal form; at most `frames_per_segment` frames.

    Returns:
        A baseline JPEG with standard Huffman tables and a restart marker at each frame's end.
    """
    count, height, width = len(planes), form.height, form.width
    luma = planes[:, :height]
    chroma = planes[:, height:].reshape(count, 2, height // 2, width // 2).astype("<u8")
    # Pillow's pixel is four bytes: Y, Cb, Cr, nothing. Two neighbours fill a 64-bit word and share
    # their chroma.
    pair = (chroma[:, 0] << 8 | chroma[:, 1] << 16) * 0x1_0000_0001
    pixels = luma.astype("<u4")
    words = pixels.view("<u8").reshape(count, height // 2, 2, width // 2)
    words |= pair[:, :, None]
    picture = Image.frombuffer("YCbCr", (width, count * height), pixels, "raw", "YCbCrX", 0, 1)
    buffer = io.BytesIO()
    picture.save(
        buffer,
        "JPEG",
        quality=form.quality,
        subsampling="4:2:0",
        optimize=False,
        restart_marker_rows=height // 16,
    )
    return buffer.getvalue()


def matrix_to_bt601(colorspace: int) -> np.ndarray | None:
    """The matrix that converts full-range Y, Cb, Cr of a colour matrix to BT.601 (JPEG).

    swscale can do it too, but loses one to three levels of brightness on the way.

    Args:
        colorspace: `MatrixCoefficients` of ITU-T H.273.

    Returns:
        Shape `[3, 3]`, float32, or None if no change is needed.
    """
    if colorspace not in _LUMA_WEIGHTS:
        return None

    def from_rgb(red: float, blue: float) -> np.ndarray:
        luma = np.array([red, 1 - red - blue, blue])
        cb = (np.array([0.0, 0.0, 1.0]) - luma) / (2 * (1 - blue))
        cr = (np.array([1.0, 0.0, 0.0]) - luma) / (2 * (1 - red))
        return np.stack([luma, cb, cr])

    matrix = from_rgb(*_BT601) @ np.linalg.inv(from_rgb(*_LUMA_WEIGHTS[colorspace]))
    return matrix.astype(np.float32)


def _apply_matrix(planes: np.ndarray, height: int, matrix: np.ndarray) -> None:
    """Change the colour matrix of one frame's 4:2:0 planes `[height * 3 / 2, width]` in place."""
    luma, chroma = planes[:height], planes[height:].reshape(2, height // 2, -1)
    centred = chroma.astype(np.float32) - 128
    shift = np.tensordot(matrix[0, 1:], centred, 1).repeat(2, axis=0).repeat(2, axis=1)
    luma[:] = np.clip(luma + shift + 0.5, 0, 255)
    chroma[:] = np.clip(np.tensordot(matrix[1:, 1:], centred, 1) + 128.5, 0, 255)


class FrameSource:
    """Decodes one video into segments of frames in the normal form.

    Args:
        where: The file, or its content.
        source: The file as the user would name it.
        form: The normal form.
        damaged: What becomes of a video of which some frames are damaged or missing.
        pulse: Called for each packet and each frame that is read.
    """

    def __init__(
        self,
        where: Path | bytes,
        source: str,
        form: NormalForm,
        *,
        damaged: Damaged = "reject",
        pulse: Callable[[], None] = no_pulse,
    ) -> None:
        self._pulse = pulse
        self._where = where
        self._source = source
        self._form = form
        self._damaged: Damaged = damaged
        self._matrix: np.ndarray | None = None
        self._timing: Timing | None = None
        self.deinterlaced = False
        """Whether there was an interlaced frame so far."""
        self.num_frames = 0
        """Frames yielded so far."""
        self.orientation = UPRIGHT
        """How the display matrix turns the pictures; known after the first segment."""
        self.notes: list[str] = []
        """Remarks about the video; known after the last segment."""
        self.facts: VideoFacts | None = None
        """Known after the first segment."""

    @property
    def rotation_degrees(self) -> int:
        """Counter-clockwise rotation of the display matrix; known after the first segment."""
        return self.orientation.degrees

    @property
    def resampled(self) -> bool:
        """Whether frames are repeated or dropped to make a varying rate constant."""
        return self._timing is not None and self._timing.is_variable

    @property
    def rate(self) -> Fraction:
        """Frames per second of the yielded frames; known after the first segment."""
        return self._timing.rate if self._timing else Fraction(0)

    def segments(self) -> Iterator[np.ndarray]:
        """Give all frames, a segment at a time.

        Yields:
            Shape `[F, height * 3 / 2, width]`, uint8, as `encode_strip` takes it. The array is
            overwritten by the next segment.

        Raises:
            VideoFault: The video cannot be read to its end, or is too short.
        """
        form = self._form
        store = np.empty((form.frames_per_segment, form.height * 3 // 2, form.width), np.uint8)
        filled = 0
        for frame in self._upright_frames():
            if filled == len(store):
                yield store
                filled = 0
            _copy_planes(frame, store[filled], form)
            if self._matrix is not None:
                _apply_matrix(store[filled], form.height, self._matrix)
            filled += 1
            self.num_frames += 1
        if self.num_frames < form.min_frames:
            raise VideoFault(
                FaultKind.TOO_SHORT,
                self._source,
                f"{self.num_frames} frames, {form.min_frames} asked for",
            )
        if filled:
            yield store[:filled]

    def _upright_frames(self) -> Iterator[VideoFrame]:
        """Decoded frames, scaled and turned, as full-range BT.601 4:2:0."""
        graph: Graph | None = None
        shape: tuple[object, ...] = ()
        packets = read_packets(self._where, self._source, self._pulse)
        with open_video(self._where, self._source) as (container, stream):
            facts = self.facts = read_facts(stream)
            self._timing = timing_of(packets, facts)
            decoding = Decoding(container, stream, packets, self._source, self._pulse)
            for frame in decoding.frames():
                self._pulse()
                # Sticky: a stream that mixes both must not restart the filter at every change.
                self.deinterlaced |= frame.interlaced_frame
                now = (frame.width, frame.height, frame.format.name, frame.colorspace)
                now = (*now, frame.color_range, frame.rotation, self.deinterlaced)
                try:
                    # A stream may change its size or colours half-way.
                    if graph is None or now != shape:
                        if graph is not None:
                            yield from _drain(graph)
                        graph, shape = self._build_graph(frame, facts), now
                    graph.push(frame)
                    yield from _pull(graph)
                except FFmpegError as error:
                    raise unsupported(frame, self._source, error) from error
            if graph is not None:
                yield from _drain(graph)
            self.notes = check_complete(decoding, packets, self._where, self._source, self._damaged)
        if not self.orientation.is_exact:
            turn = self.orientation
            self.notes.append(f"turned by {turn.degrees} degrees, the nearest quarter turn")

    def _build_graph(self, frame: VideoFrame, facts: VideoFacts) -> Graph:
        turn = self.orientation = Orientation.of(frame)
        steps = []
        if self.deinterlaced:
            # One frame for each that comes in; those that are progressive pass unchanged.
            steps.append("bwdif=mode=send_frame:deint=interlaced")
        if self.resampled:
            steps.append(f"fps={self.rate.numerator}/{self.rate.denominator}")
        # Equal matrices keep the scaler from converting; see matrix_to_bt601.
        self._matrix = None if frame.format.is_rgb else matrix_to_bt601(int(frame.colorspace))
        colours = "in_color_matrix=bt601:out_color_matrix=bt601:out_range=pc"
        steps += scale_steps(frame, self._form, facts.sample_aspect, turn, colours)
        steps += ["format=yuv420p", *turn.filters]
        return filter_graph(frame, steps, frame.time_base or Fraction(1, 1000))


def _copy_planes(frame: VideoFrame, target: np.ndarray, form: NormalForm) -> None:
    """Copy 4:2:0 planes one below the other; half the time of `to_ndarray` and a copy of its."""
    start = 0
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # pyright: ignore[reportArgumentType, reportCallIssue]
        count = plane.height * plane.width // form.width
        part = target[start : start + count].reshape(plane.height, plane.width)
        part[:] = rows[: plane.height, : plane.width]
        start += count


def _pull(graph: Graph) -> Iterator[VideoFrame]:
    while True:
        try:
            frame = graph.pull()
        except (AVBlockingIOError, AVEOFError):
            return
        if not isinstance(frame, VideoFrame):
            raise TypeError(f"a video graph gave {type(frame).__name__}")
        yield frame


def _drain(graph: Graph) -> Iterator[VideoFrame]:
    graph.push(None)
    yield from _pull(graph)
