"""Makes small real video files for the tests."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tests.support.shard_folders import moving_picture


def moving_scene(count: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Make frames of smooth moving colours: uint8 `[F, H, W, 3]`."""
    return moving_picture(seed, count, height, width)


def with_fields(frame: VideoFrame, order: str) -> VideoFrame:
    """Flag a frame as interlaced."""
    graph = Graph()
    nodes = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        )
    ]
    nodes += [graph.add("setfield", order), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    flagged = graph.pull()
    assert isinstance(flagged, VideoFrame)
    flagged.pts = None
    return flagged


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "mpeg4",
    pixel_format: str = "yuv420p",
    rate: int = 25,
    quality: int = 2_000_000,
    colorspace: int | None = None,
    full_range: bool = False,
    options: dict[str, str] | None = None,
    times_ms: Sequence[int] | None = None,
    sample_aspect: Fraction | None = None,
    field_order: str | None = None,
    display_matrix: Sequence[int] | None = None,
) -> Path:
    """Encode RGB frames with the given colours, timestamps, pixel aspect and field order.

    `display_matrix` is a, b, c, d of ISO/IEC 14496-12, 8.3.2, as integers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.bit_rate = quality
        if display_matrix is not None:
            a, b, c, d = (n << 16 for n in display_matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        stream.codec_context.time_base = Fraction(1, rate)
        range_code = 2 if full_range else 1
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
            stream.codec_context.color_range = range_code
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sample_aspect is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect
        for place, picture in enumerate(frames):
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            if colorspace is not None:
                settings: dict[str, Any] = {
                    "dst_colorspace": {1: 1, 5: 5, 6: 5}[colorspace],
                    "dst_color_range": range_code,
                    "interpolation": 4,
                }
                frame = frame.reformat(format=pixel_format, **settings)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[place], Fraction(1, 1000)
            if field_order is not None:
                frame = with_fields(frame.reformat(format=pixel_format), field_order)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
