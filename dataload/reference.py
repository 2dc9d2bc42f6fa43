"""Reference implementation of the views in PIL and torch, for tests of both pipelines."""

import io

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from strata.dataload.augment import MID_GRAY, RGB_TO_YIQ, ViewParameters, blur_window
from strata.dataload.graph_spec import ViewSlice

__all__ = ["colour_matrix", "decode_strip", "decode_video", "reference_view", "resize_matrix"]

_LUMA_FLOOR, _LUMA_LEVELS, _CHROMA_LEVELS = 16.0, 219.0, 224.0


def decode_strip(strip: np.ndarray, height: int) -> np.ndarray:
    """Decode a tall JPEG to frames.

    Returns:
        Shape `[F, height, width, 3]`, uint8.
    """
    with Image.open(io.BytesIO(strip.tobytes())) as picture:
        rows = np.asarray(picture.convert("RGB"))
    return rows.reshape(-1, height, rows.shape[1], 3)


def decode_video(video: np.ndarray) -> np.ndarray:
    """Decode all frames of a 4:2:0 video in BT.601, with linear chroma upsampling.

    Returns:
        Shape `[F, height, width, 3]`, uint8.
    """
    frames = []
    with av.open(io.BytesIO(video.tobytes()), "r") as container:
        for frame in container.decode(video=0):
            full = frame.format.name == "yuvj420p"
            planes = torch.from_numpy(frame.to_ndarray().astype(np.float32))
            luma, chroma = planes.split([frame.height, frame.height // 2])
            chroma = chroma.reshape(1, 2, frame.height // 2, frame.width // 2) - MID_GRAY
            chroma = functional.interpolate(chroma, scale_factor=2, mode="bilinear")[0]
            if not full:
                luma = (luma - _LUMA_FLOOR) * (255.0 / _LUMA_LEVELS)
                chroma = chroma * (255.0 / _CHROMA_LEVELS)
            blue, red = chroma
            rgb = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
            frames.append(_round_uint8(torch.stack(rgb, dim=-1)).to(torch.uint8).numpy())
    return np.stack(frames)


def colour_matrix(
    brightness: float, contrast: float, saturation: float, hue_degrees: float
) -> tuple[np.ndarray, float]:
    """The affine map of colours of the jitter.

    Saturation and hue scale and rotate the chroma plane of YIQ; contrast scales around mid gray;
    brightness scales last.

    Returns:
        Matrix `[3, 3]` and offset: `out = matrix @ rgb + offset`.
    """
    angle = np.deg2rad(hue_degrees)
    turn = np.array(
        [
            [1.0, 0.0, 0.0],
            [0.0, np.cos(angle), np.sin(angle)],
            [0.0, -np.sin(angle), np.cos(angle)],
        ]
    )
    scale = np.diag([1.0, saturation, saturation])
    chroma = np.linalg.inv(RGB_TO_YIQ) @ turn @ scale @ RGB_TO_YIQ
    return brightness * contrast * chroma, brightness * MID_GRAY * (1.0 - contrast)


def resize_matrix(length: int, size: int) -> Tensor:
    """Matrix that resizes a row of pixels linearly, antialiased when it shrinks.

    The triangle is as wide as an output pixel, at least one input pixel, and is cut off at the ends
    of the row, as in Pillow and torch.

    Args:
        length: Number of pixels of the row.
        size: Number of output pixels.

    Returns:
        Shape `[size, length]`, float64; rows sum to 1.
    """
    scale = length / size
    support = max(1.0, scale)
    centres = (np.arange(size)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(length) - centres) / support)
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True))


def _round_uint8(values: Tensor) -> Tensor:
    """Round halves up, as integer arithmetic does."""
    return (values + 0.5).floor().clamp(0, 255)


def reference_view(
    frames: np.ndarray,
    cut: ViewSlice,
    parameters: ViewParameters,
    row: int,
    size: int,
    *,
    photometric: bool,
    one_pass: bool = False,
) -> np.ndarray:
    """Compute one view of one sample: crop, resize, mirror, colour, blur.

    Args:
        frames: Shape `[F, H, W, 3]`, uint8: the strip's frames.
        cut: The frames of the view.
        parameters: Parameters of N samples.
        row: Index of the sample in the parameters.
        size: Rows and columns of the view.
        photometric: Whether colour and blur apply.
        one_pass: Whether the resize rounds once, as DALI's, and not also between its passes along
            rows and along columns, as torch's and Pillow's.

    Returns:
        Shape `[T, size, size, 3]`, uint8.
    """
    top, left, bottom, right = (int(v) for v in parameters.box[row])
    crop = torch.from_numpy(frames[cut.frames, top:bottom, left:right].astype(np.float64))
    clip = torch.einsum("tyxc,jx->tcyj", crop, resize_matrix(crop.shape[2], size))
    if not one_pass:
        clip = _round_uint8(clip)
    clip = torch.einsum("iy,tcyj->tcij", resize_matrix(crop.shape[1], size), clip)
    if parameters.flip[row]:
        clip = clip.flip(-1)
    clip = _round_uint8(clip)
    if photometric:
        each = range(len(clip)) if parameters.gray.shape[1] > 1 else [0] * len(clip)
        clip = torch.stack(
            [_colour(f, parameters, row, k) for f, k in zip(clip, each, strict=True)]
        )
        clip = _blur(clip, float(parameters.sigma[row]))
    return clip.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def _colour(frame: Tensor, parameters: ViewParameters, row: int, number: int) -> Tensor:
    """Apply gray and jitter to one frame `[3, size, size]`, by the given parameters."""
    channel = int(parameters.gray[row, number])
    if channel >= 0:
        frame = frame[channel].expand_as(frame)
    matrix, offset = colour_matrix(
        float(parameters.brightness[row, number]),
        float(parameters.contrast[row, number]),
        float(parameters.saturation[row, number]),
        float(parameters.hue_degrees[row, number]),
    )
    weight = torch.from_numpy(matrix)
    return _round_uint8(torch.einsum("ij,jhw->ihw", weight, frame) + offset)


def _blur(clip: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur, mirrored at the border without repeating the edge pixel."""
    window = int(blur_window(np.array([sigma]))[0])
    if window == 1:
        return clip
    radius = window // 2
    taps = torch.exp(-torch.arange(-radius, radius + 1).double().square() / (2 * sigma**2))
    taps = taps / taps.sum()
    channels = clip.shape[1]
    padded = functional.pad(clip, (radius, radius, radius, radius), mode="reflect")
    kernel = taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    rows = functional.conv2d(padded, kernel, groups=channels)
    return _round_uint8(functional.conv2d(rows, kernel.transpose(2, 3), groups=channels))
