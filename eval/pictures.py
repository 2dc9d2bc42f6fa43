"""Pictures of stored videos: film strips, contact sheets and small videos."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageDraw

from strata.dataload.decode_windows import read_windows
from strata.dataload.reader import ShardReader
from strata.dataload.reference import decode_strip, decode_video

__all__ = ["contact_sheet", "encode_jpeg", "film_strip", "stored_frames", "write_video"]

_CAPTION_ROWS = 14
_GAP = 4


def stored_frames(reader: ShardReader, sample: int, frames: np.ndarray) -> np.ndarray:
    """Frames of a stored video, whatever the payload.

    Args:
        reader: The set.
        sample: Which video.
        frames: Shape `[T]`: frame indices, not decreasing.

    Returns:
        Shape `[T, height, width, 3]`, uint8.

    Raises:
        ShardError: The sample is damaged.
    """
    windows = read_windows(reader, [sample], [frames])
    coded = np.asarray(windows.coded[0])
    form = reader.manifest.form
    if form.payload == "foreign":
        return coded
    if windows.places:
        return decode_video(coded)[windows.places[0]]
    return decode_strip(coded, form.height)


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    """A picture as JPEG of a quality from 1 to 95."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def film_strip(reader: ShardReader, sample: int, *, num_frames: int = 6, height: int = 72) -> bytes:
    """Frames evenly spaced along a video, side by side.

    Args:
        reader: The set.
        sample: Which video.
        num_frames: How many; all of them where the video has fewer.
        height: Rows of the picture; the width follows from the stored aspect.

    Returns:
        A JPEG.

    Raises:
        ShardError: The sample is damaged.
    """
    count = int(reader.num_frames[sample])
    chosen = np.unique(np.linspace(0, count - 1, min(num_frames, count)).round().astype(np.int64))
    frames = stored_frames(reader, sample, chosen)
    wide = Image.fromarray(np.concatenate(list(frames), axis=1))
    width = max(round(wide.width * height / wide.height), 1)
    return encode_jpeg(wide.resize((width, height), Image.Resampling.LANCZOS), 75)


def contact_sheet(views: Sequence[tuple[str, np.ndarray]], title: str, columns: int) -> Image.Image:
    """Frames of each view in reading order, `columns` a row.

    Args:
        views: Caption and `[T, S, S, 3]`, uint8, of each.
        title: First line.
        columns: Frames in a row.
    """
    size = views[0][1].shape[1]
    tile = size + _GAP
    rows = [-(-len(frames) // columns) for _, frames in views]
    height = _CAPTION_ROWS + sum(_CAPTION_ROWS + r * tile for r in rows)
    sheet = Image.new("RGB", (columns * tile, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 1), title, fill="black")
    top = _CAPTION_ROWS
    for (caption, frames), num_rows in zip(views, rows, strict=True):
        draw.text((2, top + 1), caption, fill="black")
        top += _CAPTION_ROWS
        for k, frame in enumerate(frames):
            place = (k % columns * tile, top + k // columns * tile)
            sheet.paste(Image.fromarray(frame), place)
        top += num_rows * tile
    return sheet


def write_video(path: Path, frames: np.ndarray, rate: float) -> None:
    """Write frames as an H.264 mp4 of good quality.

    Args:
        path: The file.
        frames: Shape `[T, even rows, even columns, 3]`, uint8.
        rate: Frames a second.
    """
    with av.open(path, "w") as container:
        speed = Fraction(rate).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=speed, options={"crf": "12"})
        if not isinstance(stream, VideoStream):
            raise TypeError(f"a video encoder gave {type(stream).__name__}")
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
