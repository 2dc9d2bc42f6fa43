"""Decode an encoded strip and compare it with the frames that were encoded.

The bounds follow from the quantisation table: the error of a DCT coefficient is at most half its
step. As the transform is orthonormal, the mean square error of the pixels is that of the
coefficients, and the error of a mean of pixels is bounded by the means of the basis functions.
"""

import io
from functools import cache

import numpy as np
from PIL import Image, JpegImagePlugin

from strata.errors import FaultKind, ShardError, VideoFault
from strata.format.schema import FrameTable, NormalForm
from strata.format.strip_jpeg import assemble_strip, parse_strip

__all__ = ["verify_strip"]

_ROUNDING = 1.5
"""Error in grey levels from integer DCTs and two roundings."""

_FULL_EVERY = 16
"""Every so many frames one is compared pixel by pixel."""


def _decode(jpeg: bytes, size: tuple[int, int]) -> np.ndarray:
    picture = Image.open(io.BytesIO(jpeg))
    picture.draft("YCbCr", size)  # Also picks the scaled decoder where the size is smaller.
    return np.asarray(picture)


def _root_mean_square(difference: np.ndarray) -> np.ndarray:
    """Over all axes but the first."""
    return np.sqrt(np.mean(np.square(difference, dtype=np.float32), axis=(1, 2)))


def verify_strip(
    jpeg: bytes, planes: np.ndarray, form: NormalForm, source: str, *, every: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Decode a strip and compare the number and the content of its frames with the source.

    Frames are entropy-decoded in full and compared by the means of their 8 x 8 blocks, in luma and
    chroma; some are also compared pixel by pixel, cut out as the loader will cut them. Whatever
    `every` is, each frame's restart marker is found and counted.

    Args:
        jpeg: The strip.
        planes: What `encode_strip` was given.
        form: The normal form.
        source: The video as the user would name it.
        every: Every so many frames one is decoded; the last always is.

    Returns:
        The offsets and lengths of `parse_strip`.

    Raises:
        VideoFault: The number of frames or a picture is wrong.
    """
    count, height, width = len(planes), form.height, form.width
    try:
        offsets, lengths = parse_strip(jpeg)
        picture = Image.open(io.BytesIO(jpeg))
        if len(offsets) != count or picture.size != (width, count * height):
            raise VideoFault(
                FaultKind.WRONG_COUNT,
                source,
                f"{count} frames in, {len(offsets)} and {picture.size[1]} rows out",
            )
        steps = _quantisation_steps(picture)

        table = FrameTable(0, height, width, form.frames_per_segment, offsets, lengths)
        chosen = (
            np.arange(count) if every == 1 else np.append(np.arange(0, count - 1, every), count - 1)
        )
        read = jpeg if every == 1 else assemble_strip([jpeg], table, chosen).tobytes()
        small = _decode(read, (width // 8, len(chosen) * height // 8))
        small = small.reshape(len(chosen), height // 8, width // 8, 3)
        expected = planes if every == 1 else planes[chosen]
        for channel, name in enumerate(("luma", "Cb", "Cr")):
            means = _block_means(expected, channel, height, width)
            error = _root_mean_square(small[..., channel] - means)
            # A JPEG block of 8 x 8 chroma values covers 2 x 2 of the means.
            bound = _bound_of_means(steps[min(channel, 1)], 8 if channel == 0 else 4)
            _compare(error, bound + _ROUNDING, source, f"block means of {name}", chosen)

        chosen = np.arange(0, count, _FULL_EVERY * (1 if every == 1 else 2))
        cut = assemble_strip([jpeg], table, chosen)
        full = _decode(cut.tobytes(), (width, len(chosen) * height)).reshape(-1, height, width, 3)
        error = _root_mean_square(full[..., 0].astype(np.int16) - planes[chosen, :height])
        bound = 0.5 * float(np.sqrt(np.mean(np.square(steps[0], dtype=np.float64))))
        _compare(error, bound + _ROUNDING, source, "luma pixels", chosen)
    except (OSError, ShardError) as error:
        raise VideoFault(FaultKind.UNLIKE, source, f"the strip does not read: {error}") from error
    return offsets, lengths


def _quantisation_steps(picture: Image.Image) -> dict[int, tuple[int, ...]]:
    if not isinstance(picture, JpegImagePlugin.JpegImageFile):
        raise ShardError(f"{picture.format} instead of JPEG")
    tables = picture.quantization  # pyright: ignore[reportAttributeAccessIssue] # types-Pillow lacks it
    return {number: tuple(table) for number, table in tables.items()}


@cache
def _bound_of_means(steps: tuple[int, ...], side: int) -> float:
    """Bound on the change of the mean of `side` x `side` pixels of a block by quantisation."""
    frequency, place = np.mgrid[:8, :8]
    basis = np.cos((2 * place + 1) * frequency * np.pi / 16) / 2
    basis[0] /= np.sqrt(2)
    means = np.abs(basis.reshape(8, 8 // side, side).mean(2)).max(1)
    return float(means @ (np.array(steps).reshape(8, 8) / 2) @ means)


def _block_means(planes: np.ndarray, channel: int, height: int, width: int) -> np.ndarray:
    """Means of 8 x 8 pixels, `[F, height / 8, width / 8]`, int16; chroma blocks are 4 x 4."""
    count = len(planes)
    if channel == 0:
        plane, side = planes[:, :height], 8
    else:
        plane = planes[:, height:].reshape(count, 2, height // 2, width // 2)[:, channel - 1]
        side = 4
    rows, columns = plane.shape[1:]
    tall = Image.fromarray(np.ascontiguousarray(plane).reshape(count * rows, columns))
    small = np.asarray(tall.reduce(side), np.int16)
    return small.reshape(count, rows // side, columns // side)


def _compare(error: np.ndarray, bound: float, source: str, what: str, frames: np.ndarray) -> None:
    worst = int(error.argmax())
    if error[worst] > bound:
        frame = int(frames[worst])
        raise VideoFault(
            FaultKind.UNLIKE,
            source,
            f"frame {frame}: {what} are off by {error[worst]:.1f} levels (root mean square), "
            f"quantisation explains {bound:.1f}",
        )
