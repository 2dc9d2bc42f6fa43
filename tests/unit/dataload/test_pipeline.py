"""The DALI graph against the reference, operation by operation."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from strata.dataload.augment import ViewParameters, centre_crop
from strata.dataload.pipeline import ClipPipeline, GraphSpec, ViewSlice
from strata.dataload.reference import decode_strip, reference_view

HEIGHT, WIDTH, FRAMES, SIZE = 64, 96, 8, 48


def encode(frames: np.ndarray) -> np.ndarray:
    """A strip of smooth moving pictures, as the sharder writes it."""
    out = io.BytesIO()
    Image.fromarray(np.concatenate(frames)).save(
        out, "JPEG", quality=95, restart_marker_rows=HEIGHT // 16
    )
    return np.frombuffer(out.getvalue(), np.uint8)


def moving_pictures(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    wide = np.asarray(
        Image.fromarray(small).resize((WIDTH + 4 * FRAMES, HEIGHT), Image.Resampling.BICUBIC)
    )
    return np.stack([wide[:, 4 * t : 4 * t + WIDTH] for t in range(FRAMES)])


def run_graph(
    strips: list[np.ndarray], views: list[ViewParameters], cuts: tuple[ViewSlice, ...], **changes
) -> list[np.ndarray]:
    spec = GraphSpec(
        batch_size=len(strips),
        strip_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        size=SIZE,
        views=cuts,
        photometric=True,
        decode="cpu",
        augment="cpu",
        device_id=None,
        num_threads=1,
    )
    graph = ClipPipeline(dataclasses.replace(spec, **changes))
    return [v.numpy() for v in graph.run(strips, views)]


IDENTITY = centre_crop(1, height=HEIGHT, width=WIDTH)
ONE = np.ones(1, np.float32)
CASES = {
    "centre": {},
    "box": {"box": np.array([[3, 10, 45, 81]], np.float32)},
    "box enlarged": {"box": np.array([[20, 30, 50, 60]], np.float32)},
    "flip": {"flip": np.array([True])},
    **{f"brightness {v}": {"brightness": v * ONE} for v in (0.5, 1.2, 1.5)},
    **{f"contrast {v}": {"contrast": v * ONE} for v in (0.5, 1.2, 1.5)},
    **{f"saturation {v}": {"saturation": v * ONE} for v in (0.5, 1.2, 1.5)},
    **{f"hue {v}": {"hue_degrees": v * ONE} for v in (-90.0, 33.0, 90.0)},
    **{f"blur {v}": {"sigma": v * ONE} for v in (0.1, 0.7, 2.0)},
    "all": {
        "box": np.array([[5, 0, 60, 70]], np.float32),
        "flip": np.array([True]),
        "brightness": 1.3 * ONE,
        "contrast": 0.7 * ONE,
        "saturation": 1.4 * ONE,
        "hue_degrees": -40 * ONE,
        "sigma": 1.1 * ONE,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_every_operation_agrees_with_the_reference(name: str):
    parameters = dataclasses.replace(IDENTITY, **CASES[name])
    strip = encode(moving_pictures(1))
    cut = ViewSlice(0, FRAMES)
    (got,) = run_graph([strip], [parameters], (cut,))
    want = reference_view(decode_strip(strip, HEIGHT), cut, parameters, 0, SIZE, photometric=True)
    gap = np.abs(got[0].astype(int) - want.astype(int))
    assert got.shape == (1, FRAMES, SIZE, SIZE, 3)
    # Each of three roundings may fall the other way, and contrast enlarges the first.
    assert gap.max() <= 3, f"largest difference {gap.max()}"
    assert gap.mean() <= 0.3, f"mean difference {gap.mean():.3f}"


def test_views_are_the_frames_they_should_be():
    strip = encode(moving_pictures(2))
    cuts = (ViewSlice(0, 4), ViewSlice(4, 4), ViewSlice(0, 4, 2), ViewSlice(0, 8))
    views = run_graph([strip], [IDENTITY] * 4, cuts, photometric=False)
    whole = views[3][0]
    np.testing.assert_array_equal(views[0][0], whole[:4])
    np.testing.assert_array_equal(views[1][0], whole[4:])
    np.testing.assert_array_equal(views[2][0], whole[::2])


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
    rows = [dataclasses.replace(IDENTITY, **CASES[n]) for n in ("all", "blur 2.0", "hue 90.0")]
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
