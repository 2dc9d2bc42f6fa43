"""Distribution and reproducibility of augmentation parameters."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest

from strata.dataload.augment import (
    RGB_TO_YIQ,
    AugmentSpec,
    centre_crop,
    colour_transforms,
    draw_view,
)
from strata.errors import ConfigError

PLACE = {"height": 128, "width": 176, "size": 112, "frames": 16, "seed": 0, "epoch": 0, "view": 0}


def draw(num: int = 20_000, spec: AugmentSpec | None = None, **changes):
    return draw_view(spec or AugmentSpec(), samples=np.arange(num), **(PLACE | changes))


def test_crops_lie_in_the_frame_and_have_the_drawn_area():
    box = draw().box
    top, left, bottom, right = box.T
    assert top.min() == 0
    assert left.min() == 0
    assert bottom.max() == 128
    assert right.max() == 176
    area = (bottom - top) * (right - left) / (128 * 176)
    assert area.min() > 0.48
    assert area.max() <= 1.0
    aspect = (right - left) / (bottom - top)
    assert aspect.min() > 0.74
    assert aspect.max() < 1.36


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    spec = AugmentSpec(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    np.testing.assert_array_equal(draw(10, spec).box, centre_crop(10, height=128, width=176).box)


def test_ranges_of_the_paper_recipe():
    view = draw()
    for name in ("brightness", "contrast", "saturation"):
        values = getattr(view, name)
        assert 0.5 <= values.min() < 0.51
        assert 1.49 < values.max() <= 1.5
    assert -90 <= view.hue_degrees.min() < -89
    assert 89 < view.hue_degrees.max() <= 90
    assert abs(view.flip.mean() - 0.5) < 0.02
    assert abs((view.sigma > 0).mean() - 0.5) < 0.02
    assert 1.98 < view.sigma.max() <= 2.0


def test_blur_scales_with_the_view():
    small, large = draw(size=56), draw(size=112)
    both = (small.sigma > 0) & (large.sigma > 0)
    np.testing.assert_allclose(small.sigma[both] * 2, large.sigma[both], rtol=1e-6)


def test_gray_and_jitter_are_drawn_for_each_frame_where_the_release_does():
    view = draw(2000, AugmentSpec(gray=0.5, per_frame=True))
    assert view.brightness.shape == view.gray.shape == (2000, 16)
    for name in ("brightness", "contrast", "saturation"):
        values = getattr(view, name)
        assert 0.5 <= values.min() < 0.51
        assert 1.49 < values.max() <= 1.5
        # The frames of a clip differ as much as clips do.
        assert abs(values.var(axis=1, ddof=1).mean() - 1 / 12) < 0.003
    assert abs((view.gray >= 0).mean() - 0.5) < 0.01
    counts = np.bincount(view.gray[view.gray >= 0], minlength=3) / (view.gray >= 0).sum()
    np.testing.assert_allclose(counts, 1 / 3, atol=0.02)
    clip = draw(2000)
    np.testing.assert_array_equal(view.box, clip.box)
    np.testing.assert_array_equal(view.flip, clip.flip)
    np.testing.assert_array_equal(view.sigma, clip.sigma)
    assert clip.brightness.shape == (2000, 1)
    assert (clip.gray == -1).all()


@pytest.mark.parametrize("per_frame", [False, True])
def test_jitter_leaves_some_clips_as_they_are_and_the_others_alike(per_frame: bool):
    plain = draw(4000, AugmentSpec(gray=0.2, per_frame=per_frame))
    view = draw(4000, AugmentSpec(gray=0.2, per_frame=per_frame, jitter=0.8))
    neutral = (view.brightness == 1).all(axis=1)
    assert abs(neutral.mean() - 0.2) < 0.02
    for name, value in (("contrast", 1), ("saturation", 1), ("hue_degrees", 0)):
        np.testing.assert_array_equal((getattr(view, name) == value).all(axis=1), neutral)
    for field in dataclasses.fields(view):
        got, want = getattr(view, field.name), getattr(plain, field.name)
        np.testing.assert_array_equal(got[~neutral], want[~neutral])
        if field.name in ("box", "flip", "gray", "sigma"):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        (AugmentSpec(), "eaab9f7688e4e28c"),
        (AugmentSpec(gray=0.5, per_frame=True), "c5bc377577d4f898"),
    ],
    ids=["paper", "release"],
)
def test_the_draws_of_both_recipes_stay_what_they_were(spec: AugmentSpec, digest: str):
    view = draw(64, spec)
    content = [getattr(view, field.name) for field in dataclasses.fields(view)]
    found = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in content))
    assert found.hexdigest()[:16] == digest


def test_a_clip_that_is_longer_begins_with_the_same_draws():
    spec = AugmentSpec(gray=0.5, per_frame=True)
    short, long = draw(8, spec, frames=16), draw(8, spec, frames=32)
    np.testing.assert_array_equal(long.hue_degrees[:, :16], short.hue_degrees)


@pytest.mark.parametrize("gray", [-1, 0, 1, 2])
def test_colour_as_one_map_is_the_steps_one_by_one(gray: int, rng: np.random.Generator):
    row = centre_crop(1, height=128, width=176)
    row = dataclasses.replace(
        row,
        brightness=np.array([[1.4]], np.float32),
        contrast=np.array([[0.6]], np.float32),
        saturation=np.array([[1.3]], np.float32),
        hue_degrees=np.array([[-70.0]], np.float32),
        gray=np.array([[gray]], np.int8),
    )
    rgb = rng.uniform(0, 255, 3)
    want = np.full(3, rgb[gray]) if gray >= 0 else rgb
    luma, in_phase, quadrature = RGB_TO_YIQ @ want
    turned = 1.3 * complex(in_phase, quadrature) * np.exp(1j * np.deg2rad(70.0))
    want = np.linalg.inv(RGB_TO_YIQ) @ [luma, turned.real, turned.imag]
    want = 1.4 * (0.6 * (want - 128) + 128)
    affine = colour_transforms(row)[0, 0]
    np.testing.assert_allclose(affine[:, :3] @ rgb + affine[:, 3], want, atol=1e-3)


def test_parameters_depend_on_seed_epoch_sample_and_view_alone():
    full = draw(64)
    part = draw_view(AugmentSpec(), samples=np.array([40, 3]), **PLACE)
    for field in dataclasses.fields(full):
        got, want = getattr(part, field.name), getattr(full, field.name)
        np.testing.assert_array_equal(got, want[[40, 3]])
    changes: tuple[dict[str, Any], ...] = ({"seed": 1}, {"epoch": 1}, {"view": 1})
    for change in changes:
        assert (draw(64, **change).brightness != full.brightness).all()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop_aspect": (2.0, 1.0)}, "crop_aspect"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"flip": 1.5}, "flip"),
        ({"gray": -0.1}, "gray"),
        ({"jitter": 1.1}, "jitter"),
        ({"hue": 0.7}, "hue"),
    ],
)
def test_settings_out_of_range_are_named(changes, name):
    with pytest.raises(ConfigError, match=f"data.views.{name}"):
        AugmentSpec(**changes)
