"""Random augmentation parameters of views, drawn for each clip or each of its frames.

A parameter depends only on (seed, epoch, sample, view). The DALI graph and the reference
implementation both get their parameters from here, so that tests can compare their results.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from strata.counter_random import Stream, uniforms
from strata.errors import ConfigError

__all__ = [
    "BLUR_RADIUS_SIGMAS",
    "MID_GRAY",
    "RGB_TO_YIQ",
    "AugmentSpec",
    "ViewParameters",
    "blur_taps",
    "blur_window",
    "centre_crop",
    "colour_transforms",
    "draw_view",
    "ten_crops",
]

RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
"""Rows: luma and the two chroma axes that hue rotates and saturation scales; as in DALI."""
MID_GRAY = 128.0
"""The level around which contrast scales."""
BLUR_RADIUS_SIGMAS = 3.0
"""Number of standard deviations at which the Gaussian is truncated."""

_CROP_TRIALS = 10
_DRAWS_PER_TRIAL = 3
_DRAWS_AFTER_CROP = 10
_DRAWS_PER_COLOUR = 6
_MIN_SIGMA = 0.1
"""Standard deviation below which a Gaussian on the pixel grid changes nothing."""


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """Augmentation of a training view; the defaults are the `paper` recipe (method.md Part I)."""

    crop_area: tuple[float, float] = (0.5, 1.0)
    """Range of the crop's area as a share of the frame."""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's width over height, in stored pixels; swapped with probability 1/2."""
    flip: float = 0.5
    """Probability of the mirror image."""
    jitter: float = 1.0
    """Probability that brightness, contrast, saturation and hue of a clip are changed at all. Not
    given in TEXT; release: 1, CoCLR: 0.8."""
    brightness: float = 0.5
    """Factor uniform in [1 - this, 1 + this]."""
    contrast: float = 0.5
    """Factor uniform in [1 - this, 1 + this], around mid gray."""
    saturation: float = 0.5
    """Factor uniform in [1 - this, 1 + this]."""
    hue: float = 0.25
    """Rotation uniform in [-this, this] turns."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in output pixels of a 112-pixel clip."""
    gray: float = 0.0
    """Probability that one of R, G and B, drawn at random, replaces all three, before the jitter.
    Release: 0.5."""
    per_frame: bool = False
    """Whether gray and jitter are drawn for every frame, as in the release, and not once per clip.
    Crop, flip and blur are always drawn once per clip."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(f"data.views.crop_area is {self.crop_area}; use 0 < low <= high <= 1")
        low, high = self.crop_aspect
        if not 0 < low <= high:
            raise ConfigError(f"data.views.crop_aspect is {self.crop_aspect}; use 0 < low <= high")
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ConfigError(f"data.views.blur_sigma is {self.blur_sigma}; use 0 < low <= high")
        for name in ("flip", "jitter", "brightness", "contrast", "saturation", "blur", "gray"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"data.views.{name} is {value}; use 0 to 1")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"data.views.hue is {self.hue}; use 0 to 0.5 turns")


@dataclass(frozen=True)
class ViewParameters:
    """Augmentation parameters of one view of each of N samples.

    P is 1 if all frames of a view have the same colour parameters, else the number of frames.

    Args:
        box: Shape `[N, 4]`, float32: the crop's top, left, bottom, right in stored pixels.
        flip: Shape `[N]`, bool.
        brightness: Shape `[N, P]`, float32: factor.
        contrast: Shape `[N, P]`, float32: factor around mid gray.
        saturation: Shape `[N, P]`, float32: factor.
        hue_degrees: Shape `[N, P]`, float32: rotation.
        gray: Shape `[N, P]`, int8: the channel that replaces all three; -1 for none.
        sigma: Shape `[N]`, float32: blur in output pixels; 0 for none.
    """

    box: np.ndarray
    flip: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue_degrees: np.ndarray
    gray: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.box)


def _draw_boxes(spec: AugmentSpec, height: int, width: int, draws: np.ndarray) -> np.ndarray:
    """Draw random resized crops, again while they do not fit (method.md 1.3, step 1).

    Args:
        spec: Ranges of area and aspect.
        height: Stored rows.
        width: Stored columns.
        draws: Shape `[N, 3 * trials + 2]`.

    Returns:
        Shape `[N, 4]`, float32.
    """
    num = len(draws)
    trials = draws[:, : _CROP_TRIALS * _DRAWS_PER_TRIAL].reshape(num, _CROP_TRIALS, -1)
    low, high = spec.crop_area
    area = height * width * (low + (high - low) * trials[:, :, 0])
    low, high = spec.crop_aspect
    aspect = low + (high - low) * trials[:, :, 1]
    crop_w, crop_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    swap = trials[:, :, 2] < 0.5
    crop_w, crop_h = np.where(swap, crop_h, crop_w), np.where(swap, crop_w, crop_h)
    fits = (crop_w <= width) & (crop_h <= height)
    first = fits.argmax(axis=1)
    some = np.any(fits, axis=1)
    rows = np.arange(num)
    # The fallback is the largest centred square, as in the release.
    side = min(height, width)
    crop_w = np.where(some, crop_w[rows, first], side)
    crop_h = np.where(some, crop_h[rows, first], side)
    place = np.where(some[:, None], draws[:, -2:], 0.5)
    top = np.minimum(np.floor(place[:, 0] * (height - crop_h + 1)), height - crop_h)
    left = np.minimum(np.floor(place[:, 1] * (width - crop_w + 1)), width - crop_w)
    return np.stack([top, left, top + crop_h, left + crop_w], axis=1).astype(np.float32)


def draw_view(
    spec: AugmentSpec,
    *,
    height: int,
    width: int,
    size: int,
    frames: int,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    view: int,
) -> ViewParameters:
    """Draw the parameters of one view of each sample.

    Args:
        spec: The recipe.
        height: Stored rows.
        width: Stored columns.
        size: Rows and columns of the view.
        frames: Number of frames of the view.
        seed: The run's seed.
        epoch: The epoch.
        samples: Shape `[N]`: sample indices.
        view: Number of the view of the sample.

    Returns:
        Parameters of N views; they depend only on the arguments.
    """
    num_crop = _CROP_TRIALS * _DRAWS_PER_TRIAL + 2
    draws = uniforms(seed, Stream.VIEW, epoch, samples, view, num_crop + _DRAWS_AFTER_CROP)
    rest = draws[:, num_crop:]
    if spec.per_frame:
        count = frames * _DRAWS_PER_COLOUR
        colour = uniforms(seed, Stream.FRAME, epoch, samples, view, count)
        colour = colour.reshape(len(samples), frames, _DRAWS_PER_COLOUR)
    else:
        # The per-clip draws keep their positions, so existing recipes give the same batches.
        colour = rest[:, None, [1, 2, 3, 4, 7, 8]]

    # A clip without jitter has neutral values in all of its frames.
    jittered = rest[:, 9, None] < spec.jitter

    def factor(strength: float, column: int) -> np.ndarray:
        change = strength * (2.0 * colour[:, :, column] - 1.0)
        return np.where(jittered, 1.0 + change, 1.0).astype(np.float32)

    low, high = spec.blur_sigma
    turn = 360.0 * spec.hue * (2.0 * colour[:, :, 3] - 1.0)
    sigma = (low + (high - low) * rest[:, 6]) * size / 112.0
    blurred = (rest[:, 5] < spec.blur) & (sigma >= _MIN_SIGMA)
    channel = np.floor(3.0 * colour[:, :, 5])
    return ViewParameters(
        box=_draw_boxes(spec, height, width, draws[:, :num_crop]),
        flip=rest[:, 0] < spec.flip,
        brightness=factor(spec.brightness, 0),
        contrast=factor(spec.contrast, 1),
        saturation=factor(spec.saturation, 2),
        hue_degrees=np.where(jittered, turn, 0.0).astype(np.float32),
        gray=np.where(colour[:, :, 4] < spec.gray, channel, -1).astype(np.int8),
        sigma=np.where(blurred, sigma, 0.0).astype(np.float32),
    )


def colour_transforms(view: ViewParameters) -> np.ndarray:
    """Combine gray, hue, saturation, contrast and brightness into one affine map of colours.

    Saturation and hue scale and rotate the chroma plane of YIQ; contrast scales around mid gray;
    brightness scales last.

    Returns:
        Shape `[N, P, 3, 4]`, float32: `out = map[..., :3] @ rgb + map[..., 3]`, levels 0 to 255.
    """
    angle = np.deg2rad(view.hue_degrees.astype(np.float64))
    turn = np.zeros((*angle.shape, 3, 3))
    turn[..., 0, 0] = 1.0
    turn[..., 1, 1] = turn[..., 2, 2] = view.saturation * np.cos(angle)
    turn[..., 1, 2] = view.saturation * np.sin(angle)
    turn[..., 2, 1] = -turn[..., 1, 2]
    chroma = np.linalg.inv(RGB_TO_YIQ) @ turn @ RGB_TO_YIQ
    scale = view.brightness.astype(np.float64) * view.contrast
    matrix = scale[..., None, None] * chroma
    # If one channel replaces all three, its column is the sum of all columns.
    only = view.gray[..., None] == np.arange(3)
    summed = matrix.sum(axis=-1, keepdims=True) * only[..., None, :]
    matrix = np.where(only.any(axis=-1)[..., None, None], summed, matrix)
    offset = view.brightness * MID_GRAY * (1.0 - view.contrast)
    offsets = np.broadcast_to(offset[..., None, None], (*offset.shape, 3, 1))
    return np.concatenate([matrix, offsets], axis=-1).astype(np.float32)


def blur_window(sigma: np.ndarray) -> np.ndarray:
    """Width of the Gaussian's window in pixels for each sigma; 1, the identity, for sigma 0.

    Returns:
        int32, odd.
    """
    radius = np.ceil(BLUR_RADIUS_SIGMAS * sigma)
    return (2 * radius + 1).astype(np.int32)


def blur_taps(sigma: np.ndarray) -> list[np.ndarray]:
    """Gaussian weights on the pixel grid for each sigma, summing to 1; `[1.]` for sigma 0."""
    taps = []
    for window, width in zip(blur_window(sigma).tolist(), sigma.tolist(), strict=True):
        places = np.arange(window) - window // 2
        weight = np.exp(-0.5 * np.square(places / (width or 1.0)))
        taps.append((weight / weight.sum()).astype(np.float32))
    return taps


def centre_crop(num: int, *, height: int, width: int, share: float = 1.0) -> ViewParameters:
    """Parameters of evaluation views: a centred square crop and no other change.

    Args:
        num: N, the number of views.
        height: Stored rows.
        width: Stored columns.
        share: Side of the square over the shorter side of the frame.
    """
    side = round(share * min(height, width))
    top, left = math.floor((height - side) / 2), math.floor((width - side) / 2)
    ones, zeros = np.ones((num, 1), np.float32), np.zeros((num, 1), np.float32)
    return ViewParameters(
        box=np.tile(np.array([[top, left, top + side, left + side]], np.float32), (num, 1)),
        flip=np.zeros(num, bool),
        brightness=ones,
        contrast=ones,
        saturation=ones,
        hue_degrees=zeros,
        gray=np.full((num, 1), -1, np.int8),
        sigma=np.zeros(num, np.float32),
    )


def ten_crops(num: int, *, height: int, width: int, share: float) -> list[ViewParameters]:
    """Parameters of ten-crop evaluation: square crops at the centre and corners, and mirrored.

    Args:
        num: N, the number of views of each crop.
        height: Stored rows.
        width: Stored columns.
        share: Side of the square over the shorter side of the frame.

    Returns:
        The centre, top left, top right, bottom left, bottom right; then the same mirrored.
    """
    centre = centre_crop(num, height=height, width=width, share=share)
    side = float(centre.box[0, 2] - centre.box[0, 0])
    corners = [(top, left) for top in (0.0, height - side) for left in (0.0, width - side)]
    boxes = [centre.box] + [
        np.tile(np.array([[top, left, top + side, left + side]], np.float32), (num, 1))
        for top, left in corners
    ]
    return [
        dataclasses.replace(centre, box=box, flip=np.full(num, mirrored))
        for mirrored in (False, True)
        for box in boxes
    ]
