"""The mp4 payload: a segment as a short mp4 video with closed groups and no reordering."""

import io
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from strata.errors import FaultKind, VideoFault
from strata.format.schema import NormalForm

__all__ = ["encode_mp4", "to_stored_range", "verify_mp4"]

_ENCODERS = {"h264": "libx264", "vp9": "libvpx-vp9", "mjpeg": "mjpeg"}
_BT601, _LIMITED, _FULL = 6, 1, 2
"""SMPTE 170M of ITU-T H.273, and FFmpeg's two ranges."""

_LEVELS = np.arange(256)
_LIMITED_LUMA = np.round(16 + _LEVELS * 219 / 255).astype(np.uint8)
_LIMITED_CHROMA = np.round(128 + (_LEVELS - 128) * 224 / 255).astype(np.uint8)

_WORST_STEPS = 0.1
"""How many quantiser steps, beside two levels, a frame's block means may be off, root mean square;
docs/benchmarks.md has what noise, the worst there is, comes to."""


def _options(form: NormalForm) -> dict[str, str]:
    match form.codec:
        case "h264":
            fixed = f"keyint={form.gop}:min-keyint={form.gop}:scenecut=0:open-gop=0"
            return {
                "crf": str(form.quantizer),
                "preset": "medium",
                "x264-params": f"{fixed}:bframes=0:ref=1:threads=1:lookahead-threads=1",
            }
        case "vp9":
            # Without lag and alternate references every frame is shown and none is reordered.
            return {
                "crf": str(form.quantizer),
                "b": "0",
                "g": str(form.gop),
                "keyint_min": str(form.gop),
                "lag-in-frames": "0",
                "auto-alt-ref": "0",
                "deadline": "good",
                "cpu-used": "4",
                "row-mt": "0",
                "threads": "1",
            }
        case "mjpeg":
            return {"huffman": "default"}


def to_stored_range(planes: np.ndarray, form: NormalForm) -> np.ndarray:
    """Convert to limited range for h264 and vp9, which readers that ignore the flag assume."""
    if form.codec == "mjpeg":
        return planes
    stored = np.empty_like(planes)
    np.take(_LIMITED_LUMA, planes[:, : form.height], out=stored[:, : form.height])
    np.take(_LIMITED_CHROMA, planes[:, form.height :], out=stored[:, form.height :])
    return stored


def encode_mp4(planes: np.ndarray, form: NormalForm, rate: Fraction) -> bytes:
    """Encode frames into one mp4 file.

    Args:
        planes: Shape `[F, height * 3 / 2, width]`, uint8: full-range BT.601 Y, Cb, Cr as 4:2:0.
        form: The normal form.
        rate: Frames per second.

    Returns:
        The file. h264 and vp9 are in limited range, mjpeg in full range; all say so.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(_ENCODERS[form.codec], rate=rate, options=_options(form))
        if not isinstance(stream, VideoStream):
            raise TypeError(f"a video encoder gave {type(stream).__name__}")
        context = stream.codec_context
        stream.width, stream.height = form.width, form.height
        full = form.codec == "mjpeg"
        stream.pix_fmt = "yuvj420p" if full else "yuv420p"
        context.colorspace, context.color_range = _BT601, _FULL if full else _LIMITED
        context.thread_count = 1
        context.flags |= Flags.bitexact
        if not full:
            context.gop_size, context.max_b_frames = form.gop, 0
            context.flags |= Flags.closed_gop
        if full:
            context.qmin = context.qmax = form.quantizer
        for place, picture in enumerate(to_stored_range(planes, form)):
            frame = VideoFrame.from_ndarray(picture, format=stream.pix_fmt)
            frame.colorspace, frame.color_range = context.colorspace, context.color_range
            frame.pts, frame.time_base = place, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _step(form: NormalForm) -> float:
    """The quantiser's step in grey levels, roughly, at its coarsest in a picture."""
    match form.codec:
        case "h264":
            return 0.625 * 2 ** ((form.quantizer + 6) / 6)
        case "vp9":
            return 0.625 * 2 ** ((form.quantizer * 0.8 + 6) / 6)
        case "mjpeg":
            return 2.0 * form.quantizer


def verify_mp4(
    content: bytes, planes: np.ndarray, form: NormalForm, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decode a segment in full; compare the number, order and content of its frames.

    Args:
        content: The file.
        planes: What `encode_mp4` was given.
        form: The normal form.
        source: The video as the user would name it.

    Returns:
        Offset in the file and length of each frame's packet, both `[F]`, int32.

    Raises:
        VideoFault: The number of frames, a picture or the structure is wrong.
    """
    count = len(planes)
    stored = to_stored_range(planes, form)
    bound = _WORST_STEPS * _step(form) + 2
    offsets: list[int] = []
    lengths: list[int] = []
    found = 0
    try:
        with av.open(io.BytesIO(content), "r") as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            for packet in container.demux(stream):
                if packet.size:
                    place = len(offsets)
                    starts = place % form.gop == 0 or form.codec == "mjpeg"
                    if packet.pts != packet.dts or packet.is_keyframe != starts:
                        detail = f"frame {place}: an unexpected key frame or order"
                        raise VideoFault(FaultKind.UNLIKE, source, detail)
                    offsets.append(packet.pos or 0)
                    lengths.append(packet.size)
                for frame in packet.decode():
                    if found < count:
                        _compare(frame, stored[found], form, bound, source, found)
                    found += 1
    except FFmpegError as error:
        detail = f"the segment does not read: {error.strerror}"
        raise VideoFault(FaultKind.UNLIKE, source, detail) from error
    if found != count or len(offsets) != count:
        detail = f"{count} frames in, {len(offsets)} packets and {found} frames out"
        raise VideoFault(FaultKind.WRONG_COUNT, source, detail)
    return np.array(offsets, np.int32), np.array(lengths, np.int32)


def _compare(
    frame: VideoFrame,
    expected: np.ndarray,
    form: NormalForm,
    bound: float,
    source: str,
    place: int,
) -> None:
    """Compare the means of 8 x 8 values of one frame's planes with those of the source."""
    difference = frame.to_ndarray().astype(np.int16) - expected
    high, wide = form.height // 8, form.width // 8
    luma = difference[: form.height].reshape(1, high, 8, wide, 8)
    chroma = difference[form.height :].reshape(2, high, 4, wide, 4)
    for name, part in (("luma", luma), ("chroma", chroma)):
        error = float(np.sqrt(np.mean(np.square(part.mean((2, 4))))))
        if error > bound:
            raise VideoFault(
                FaultKind.UNLIKE,
                source,
                f"frame {place}: block means of {name} are off by {error:.1f} levels (root mean "
                f"square), quantisation explains {bound:.1f}",
            )
