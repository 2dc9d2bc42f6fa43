"""FFmpeg filters that pictures of foreign videos pass: cropped, scaled and turned upright."""

from collections.abc import Iterable
from fractions import Fraction

from av.filter import Graph
from av.video.frame import VideoFrame

__all__ = ["SCALER", "TURNS", "centre_crop", "filter_graph", "quarter_turn"]

SCALER = "flags=bicubic+accurate_rnd+bitexact"
"""Bicubic with its support widened when it shrinks; exact flags so that every CPU agrees."""

TURNS = {90: ("transpose=cclock",), 180: ("hflip", "vflip"), 270: ("transpose=clock",)}
"""Filters that undo a counter-clockwise angle of the display matrix."""


def quarter_turn(frame: VideoFrame) -> int:
    """The frame's counter-clockwise angle in degrees: 0, 90, 180 or 270."""
    return round(frame.rotation / 90) * 90 % 360


def centre_crop(width: int, height: int, sample_aspect: float, aspect: float) -> str:
    """The filter for the largest centred part with a given display aspect.

    Args:
        width: Pixels of the frame.
        height: Pixels of the frame.
        sample_aspect: Width of a pixel over its height.
        aspect: Width over height of the part as it is shown.

    Returns:
        A crop to even sizes, as 4:2:0 needs.
    """
    wanted = aspect / sample_aspect
    if width > height * wanted:
        return f"crop={max(round(height * wanted / 2) * 2, 2)}:{height}"
    return f"crop={width}:{max(round(width / wanted / 2) * 2, 2)}"


def filter_graph(frame: VideoFrame, steps: Iterable[str], time_base: Fraction) -> Graph:
    """A chain of filters for frames like this one, on one thread.

    Args:
        frame: The first to be pushed: its size, pixel format, colour matrix and range are taken.
        steps: Filters in FFmpeg's notation, `name` or `name=settings`, in their order.
        time_base: Seconds of a tick of the frames' times.

    Returns:
        The configured graph; push a frame, pull what comes out.

    Raises:
        av.error.FFmpegError: FFmpeg does not know a filter or takes no such frames.
    """
    graph = Graph()
    graph.threads = 1
    last = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
        f":time_base={time_base.numerator}/{time_base.denominator}"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
    )
    for step in steps:
        name, _, settings = step.partition("=")
        following = graph.add(name, settings or None)
        last.link_to(following)
        last = following
    last.link_to(graph.add("buffersink"))
    graph.configure()
    return graph
