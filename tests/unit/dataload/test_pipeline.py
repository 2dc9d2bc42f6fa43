"""The DALI graph compared with the reference, operation by operation."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def

from strata.dataload import pipeline
from strata.dataload.augment import (
    AugmentSpec,
    ViewParameters,
    colour_transforms,
    draw_view,
)
from strata.dataload.pipeline import ViewSlice
from strata.dataload.reference import decode_strip, reference_view
from tests.support.graph_cases import (
    CASES,
    FRAMES,
    HEIGHT,
    IDENTITY,
    SIZE,
    WIDTH,
    encode,
    moving_pictures,
    rows_of,
    run_graph,
)


@pytest.mark.parametrize("name", CASES)
def test_every_operation_agrees_with_the_reference(name: str):
    parameters = dataclasses.replace(IDENTITY, **CASES[name])
    strip = encode(moving_pictures(1))
    cut = ViewSlice(0, FRAMES)
    (got,) = run_graph([strip], [parameters], (cut,))
    want = reference_view(decode_strip(strip, HEIGHT), cut, parameters, 0, SIZE, photometric=True)
    gap = np.abs(got[0].astype(int) - want.astype(int))
    assert got.shape == (1, FRAMES, SIZE, SIZE, 3)
    # Each of four roundings (resize, colour, blur along rows and along columns) may differ, and
    # contrast enlarges the first difference.
    assert gap.max() <= 3, f"largest difference {gap.max()}"
    assert gap.mean() <= 0.3, f"mean difference {gap.mean():.3f}"


def test_clips_with_and_without_jitter_agree_with_the_reference():
    """Views drawn by a recipe that does not change the colours of some clips."""
    num = 6
    views = draw_view(
        AugmentSpec(crop_area=(0.2, 1.0), jitter=0.5, gray=0.2),
        height=HEIGHT,
        width=WIDTH,
        size=SIZE,
        frames=FRAMES,
        seed=0,
        epoch=0,
        samples=np.arange(num),
        view=0,
    )
    assert 0 < (views.brightness == 1).sum() < num
    strips = [encode(moving_pictures(seed)) for seed in range(num)]
    cut = ViewSlice(0, FRAMES)
    (got,) = run_graph(strips, [views], (cut,), colour_maps=True)
    for row, strip in enumerate(strips):
        frames = decode_strip(strip, HEIGHT)
        want = reference_view(frames, cut, views, row, SIZE, photometric=True)
        gap = np.abs(got[row].astype(int) - want.astype(int))
        # The roundings of the test above.
        assert gap.max() <= 3, f"row {row}: largest difference {gap.max()}"
        assert gap.mean() <= 0.3, f"row {row}: mean difference {gap.mean():.3f}"


@pytest.mark.parametrize(
    ("name", "maps"),
    # A colour twist has no gray and is drawn once per clip.
    [(n, False) for n in ("all", "hue 90.0", "contrast 1.5")]
    + [(n, True) for n in ("all", "per frame", "gray 1")],
)
def test_the_operators_of_a_gpu_agree_with_the_affine_map(name: str, maps: bool):
    """Tests the CPU versions of these operators; tests/gpu tests the GPU versions."""
    row = dataclasses.replace(IDENTITY, **CASES[name])
    clip = moving_pictures(4)

    @pipeline_def
    def graph() -> Any:
        frames = fn.external_source(name="frames", layout="FHWC")
        return pipeline._colour_by_operator(frames, 0, maps)

    pipe: Any = graph(batch_size=1, num_threads=1, device_id=None)
    pipe.build()
    affine = np.broadcast_to(colour_transforms(row), (1, FRAMES, 3, 4))
    pipe.feed_input("frames", clip[None])
    if maps:
        pipe.feed_input("colour_0", np.ascontiguousarray(affine))
    else:
        for at in ("brightness", "contrast", "saturation"):
            pipe.feed_input(f"{at}_0", np.ascontiguousarray(getattr(row, at)[:, 0], np.float32))
        pipe.feed_input("hue_0", np.ascontiguousarray(row.hue_degrees[:, 0], np.float32))
    (out,) = pipe.run()
    got = np.array(out.as_tensor())[0].astype(float)
    want = np.einsum("tij,thwj->thwi", affine[0, :, :, :3], clip) + affine[0, :, None, None, :, 3]
    assert np.abs(got - want.clip(0, 255).round()).max() <= 1


def test_gray_is_one_channel_three_times():
    parameters = dataclasses.replace(IDENTITY, gray=np.array([[2]], np.int8))
    strip = encode(moving_pictures(5))
    cut = (ViewSlice(0, FRAMES),)
    (got,) = run_graph([strip], [parameters], cut)
    (plain,) = run_graph([strip], [IDENTITY], cut, photometric=False)
    np.testing.assert_array_equal(got, np.repeat(plain[..., 2:], 3, axis=-1))


def test_a_sample_without_colour_and_blur_is_not_touched():
    strip = encode(moving_pictures(6))
    cut = (ViewSlice(0, FRAMES),)
    (got,) = run_graph([strip], [IDENTITY], cut)
    (plain,) = run_graph([strip], [IDENTITY], cut, photometric=False)
    np.testing.assert_array_equal(got, plain)


def test_views_are_the_frames_they_should_be():
    strip = encode(moving_pictures(2))
    cuts = (ViewSlice(0, 4), ViewSlice(4, 4), ViewSlice(0, 4, 2), ViewSlice(0, 8))
    views = run_graph([strip], [IDENTITY] * 4, cuts, photometric=False)
    full = views[3][0]
    np.testing.assert_array_equal(views[0][0], full[:4])
    np.testing.assert_array_equal(views[1][0], full[4:])
    np.testing.assert_array_equal(views[2][0], full[::2])


def test_parameters_hold_for_all_frames_of_a_clip():
    still = np.repeat(moving_pictures(3)[:1], FRAMES, axis=0)
    parameters = dataclasses.replace(IDENTITY, **CASES["all"])
    (view,) = run_graph([encode(still)], [parameters], (ViewSlice(0, FRAMES),))
    # The first and last frame of a strip have one neighbour only, so their border rows' chroma
    # is interpolated from other rows; between them all frames must be the same.
    for frame in view[0][2:-1]:
        np.testing.assert_array_equal(frame, view[0][1])


def test_samples_of_a_batch_do_not_touch_each_other():
    strips = [encode(moving_pictures(s)) for s in range(3)]
    rows = [rows_of(n) for n in ("all", "blur 2.0", "per frame")]
    together = ViewParameters(
        *(
            np.concatenate([getattr(r, f.name) for r in rows])
            for f in dataclasses.fields(ViewParameters)
        )
    )
    cut = (ViewSlice(0, FRAMES),)
    (batch,) = run_graph(strips, [together], cut)
    for number, (strip, row) in enumerate(zip(strips, rows, strict=True)):
        (alone,) = run_graph([strip], [row], cut)
        np.testing.assert_array_equal(batch[number], alone[0])
