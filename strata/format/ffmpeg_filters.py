"""FFmpeg filters that pictures of foreign videos pass: cropped, scaled and turned upright."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation

from strata.errors import FaultKind, VideoFault
from strata.format.schema import NormalForm

__all__ = [
    "UPRIGHT",
    "Orientation",
    "centre_crop",
    "filter_graph",
    "scale_steps",
    "unsupported",
]

SCALER = "flags=bicubic+accurate_rnd+bitexact"
"""Bicubic with its support widened when it shrinks; exact flags so that every CPU agrees."""

_TURNS = {
    (False, 0): (),
    (False, 90): ("transpose=cclock",),
    (False, 180): ("hflip", "vflip"),
    (False, 270): ("transpose=clock",),
    (True, 0): ("hflip",),
    (True, 90): ("transpose=cclock_flip",),
    (True, 180): ("vflip",),
    (True, 270): ("transpose=clock_flip",),
}
"""Filters by whether the picture is mirrored, and by its counter-clockwise angle after that."""

_MAX_SHRINK = 16
"""Times that swscale shrinks a side at once: with exact rounding a filter of its has at most 170
taps, and bicubic takes four for each pixel, of chroma for each second one."""

_ANY = 5
"""A colour matrix that swscale takes, for a picture that nobody looks at."""

_MATRICES = {
    3: "3 (reserved)",
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE ST 2085",
    12: "chromaticity-derived, not constant",
    13: "chromaticity-derived, constant",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
"""Colour matrices of ITU-T H.273, table 4, that FFmpeg's scaler does not convert."""


def _unknown_type(cls: type[Type], value: int) -> Type:
    """A member for side data that PyAV has no name for, like the EXIF of a camera's MJPEG.

    PyAV 18.1 raises ValueError for a frame that carries any such, whatever one asks of it.
    """
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


Type._missing_ = classmethod(_unknown_type)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Orientation:
    """One of the eight orientations in which a decoded picture is shown.

    Args:
        mirrored: Whether left and right are exchanged first.
        degrees: Counter-clockwise rotation after that: 0, 90, 180 or 270.
        is_exact: Whether the container asks for exactly this, and for no angle between.
    """

    mirrored: bool = False
    degrees: int = 0
    is_exact: bool = True

    @classmethod
    def of(cls, frame: VideoFrame) -> "Orientation":
        """The orientation of the frame's display matrix, to the nearest quarter turn.

        The matrix is that of ISO/IEC 14496-12, 8.3.2: a point (x, y) goes to
        (a x + c y, b x + d y), with y downwards.
        """
        # PyAV ties a frame to its side data in a cycle, which only the garbage collector frees. So
        # they are read from a tiny copy, and the picture itself is given back at once.
        tiny = frame.reformat(2, 2, "rgb24", _ANY, _ANY, Interpolation.POINT)
        side = tiny.side_data.get("DISPLAYMATRIX")
        if side is None:
            return UPRIGHT
        a, b, _, c, d = np.frombuffer(side, "<i4")[:5].astype(np.float64)
        mirrored = a * d - b * c < 0
        # The first column is where the picture's x axis goes; mirrored, the other way round.
        x, y = (-a, -b) if mirrored else (a, b)
        if x == y == 0:
            return UPRIGHT
        angle = float(np.degrees(np.arctan2(-y, x)))
        degrees = round(angle / 90) * 90
        return cls(bool(mirrored), degrees % 360, abs(angle - degrees) < 1)

    @property
    def swaps_sides(self) -> bool:
        """Whether width and height change places."""
        return self.degrees in (90, 270)

    @property
    def filters(self) -> tuple[str, ...]:
        """FFmpeg's filters for it."""
        return _TURNS[self.mirrored, self.degrees]


UPRIGHT = Orientation()
"""Nothing to turn."""


def centre_crop(width: int, height: int, sample_aspect: float, aspect: float) -> tuple[int, int]:
    """The largest centred part with a given display aspect.

    Args:
        width: Pixels of the frame.
        height: Pixels of the frame.
        sample_aspect: Width of a pixel over its height.
        aspect: Width over height of the part as it is shown.

    Returns:
        Width and height of the part; what is cut is cut to an even size, as 4:2:0 needs.
    """
    wanted = aspect / sample_aspect
    if width > height * wanted:
        return min(max(round(height * wanted / 2) * 2, 2), width), height
    return width, min(max(round(width / wanted / 2) * 2, 2), height)


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


def scale_steps(
    frame: VideoFrame, form: NormalForm, sample_aspect: float, turn: Orientation, options: str
) -> list[str]:
    """Filters that bring a frame to the form's size; to the other way round if it is turned after.

    Args:
        frame: Says its size.
        form: Says size and fit.
        sample_aspect: Width of the frame's pixels over their height.
        turn: What is to be done afterwards: there is less to turn then.
        options: More options of FFmpeg's `scale`, parted by colons.

    Returns:
        Filters in FFmpeg's notation.
    """
    wide, high = (form.height, form.width) if turn.swaps_sides else (form.width, form.height)
    width, height = frame.width, frame.height
    steps = []
    if form.fit == "crop":
        width, height = centre_crop(width, height, sample_aspect, wide / high)
        steps.append(f"crop={width}:{height}")
    # Of a strip the scaler refuses to shrink the long side at once; it splits larger ones itself.
    ratio = max(width / wide, height / high)
    if ratio > _MAX_SHRINK and width * height <= 4 * wide * high:
        count = math.ceil(math.log(ratio, _MAX_SHRINK / 2))
        for k in range(1, count):
            w, h = (
                round(size * min(target / size, 1) ** (k / count))
                for size, target in ((width, wide), (height, high))
            )
            steps.append(f"scale={w}:{h}:{SCALER}")
    steps.append(f"scale={wide}:{high}:{SCALER}:{options}")
    return steps


def unsupported(frame: VideoFrame, source: str, error: FFmpegError) -> VideoFault:
    """The fault of a video whose pictures decode, but cannot be brought to the normal form."""
    matrix = _MATRICES.get(int(frame.colorspace), "")
    detail = f"{frame.width} x {frame.height} pixels of {frame.format.name} cannot be scaled"
    if matrix and not frame.format.is_rgb:
        detail = f"the colour matrix {matrix} is not supported; encode it again in BT.709"
    return VideoFault(FaultKind.UNSUPPORTED, source, f"{detail} ({error.strerror or error})")
