"""The view recipe as data: every random parameter of a view, drawn once per clip.

A parameter is a function of (seed, epoch, sample, view) alone. The DALI graph and the reference
both take the parameters from here, so they can be held against each other value by value.
"""

import math
from dataclasses import dataclass

import numpy as np

from strata.counter_random import Stream, uniforms
from strata.errors import ConfigError

__all__ = ["AugmentSpec", "ViewParameters", "centre_crop", "draw_view"]

_CROP_TRIALS = 10
_DRAWS_PER_TRIAL = 3
_DRAWS_AFTER_CROP = 10
_MIN_SIGMA = 0.1
"""Below this a Gaussian on the pixel grid changes nothing."""


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """Augmentation of a training view; the defaults are the `paper` recipe (method.md Part I)."""

    crop_area: tuple[float, float] = (0.5, 1.0)
    """Range of the crop's share of the frame."""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's width over height, in stored pixels; swapped with probability 1/2."""
    flip: float = 0.5
    """Probability of the mirror image."""
    brightness: float = 0.5
    """Factor uniform in [1 - this, 1 + this]."""
    contrast: float = 0.5
    """Factor uniform in [1 - this, 1 + this], about mid gray."""
    saturation: float = 0.5
    """Factor uniform in [1 - this, 1 + this]."""
    hue: float = 0.25
    """Rotation uniform in [-this, this] turns."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in output pixels of a 112-pixel clip."""

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
        for name in ("flip", "brightness", "contrast", "saturation", "blur"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"data.views.{name} is {value}; use 0 to 1")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"data.views.hue is {self.hue}; use 0 to 0.5 turns")


@dataclass(frozen=True)
class ViewParameters:
    """What happens to one view of each of N samples, the same for all frames of the view.

    Args:
        box: Shape `[N, 4]`, float32: the crop's top, left, bottom, right in stored pixels.
        flip: Shape `[N]`, bool.
        brightness: Shape `[N]`, float32: factor.
        contrast: Shape `[N]`, float32: factor about mid gray.
        saturation: Shape `[N]`, float32: factor.
        hue_degrees: Shape `[N]`, float32: rotation.
        sigma: Shape `[N]`, float32: blur in output pixels; 0 for none.
    """

    box: np.ndarray
    flip: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue_degrees: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.box)


def _draw_boxes(spec: AugmentSpec, height: int, width: int, draws: np.ndarray) -> np.ndarray:
    """Random resized crops, redrawn while they do not fit (method.md 1.3, step 1).

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
        seed: The run's seed.
        epoch: The epoch.
        samples: Shape `[N]`: sample indices.
        view: Which view of the sample.

    Returns:
        Parameters of N views; they depend on nothing but the arguments.
    """
    num_crop = _CROP_TRIALS * _DRAWS_PER_TRIAL + 2
    draws = uniforms(seed, Stream.VIEW, epoch, samples, view, num_crop + _DRAWS_AFTER_CROP)
    rest = draws[:, num_crop:]

    def factor(strength: float, column: int) -> np.ndarray:
        return (1.0 + strength * (2.0 * rest[:, column] - 1.0)).astype(np.float32)

    low, high = spec.blur_sigma
    sigma = (low + (high - low) * rest[:, 6]) * size / 112.0
    blurred = (rest[:, 5] < spec.blur) & (sigma >= _MIN_SIGMA)
    return ViewParameters(
        box=_draw_boxes(spec, height, width, draws[:, :num_crop]),
        flip=rest[:, 0] < spec.flip,
        brightness=factor(spec.brightness, 1),
        contrast=factor(spec.contrast, 2),
        saturation=factor(spec.saturation, 3),
        hue_degrees=(360.0 * spec.hue * (2.0 * rest[:, 4] - 1.0)).astype(np.float32),
        sigma=np.where(blurred, sigma, 0.0).astype(np.float32),
    )


def centre_crop(num: int, *, height: int, width: int) -> ViewParameters:
    """The view of an evaluation: the largest centred square, nothing else."""
    side = min(height, width)
    top, left = math.floor((height - side) / 2), math.floor((width - side) / 2)
    ones, zeros = np.ones(num, np.float32), np.zeros(num, np.float32)
    return ViewParameters(
        box=np.tile(np.array([[top, left, top + side, left + side]], np.float32), (num, 1)),
        flip=np.zeros(num, bool),
        brightness=ones,
        contrast=ones,
        saturation=ones,
        hue_degrees=zeros,
        sigma=zeros,
    )
