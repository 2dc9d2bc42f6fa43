"""The distribution and the identity of augmentation parameters."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from strata.dataload.augment import AugmentSpec, centre_crop, draw_view
from strata.errors import ConfigError

PLACE = {"height": 128, "width": 176, "size": 112, "seed": 0, "epoch": 0, "view": 0}


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


def test_parameters_depend_on_seed_epoch_sample_and_view_alone():
    whole = draw(64)
    part = draw_view(AugmentSpec(), samples=np.array([40, 3]), **PLACE)
    for field in dataclasses.fields(whole):
        got, want = getattr(part, field.name), getattr(whole, field.name)
        np.testing.assert_array_equal(got, want[[40, 3]])
    changes: tuple[dict[str, Any], ...] = ({"seed": 1}, {"epoch": 1}, {"view": 1})
    for change in changes:
        assert (draw(64, **change).brightness != whole.brightness).all()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop_aspect": (2.0, 1.0)}, "crop_aspect"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"flip": 1.5}, "flip"),
        ({"hue": 0.7}, "hue"),
    ],
)
def test_settings_out_of_range_are_named(changes, name):
    with pytest.raises(ConfigError, match=f"data.views.{name}"):
        AugmentSpec(**changes)
