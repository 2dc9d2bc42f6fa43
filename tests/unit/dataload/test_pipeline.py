"""Both pipelines compared with the reference, operation by operation."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from torch.nn import functional

from strata.dataload.augment import AugmentSpec, ViewParameters, draw_view
from strata.dataload.cpu_pipeline import CpuPipeline
from strata.dataload.cpu_views import ClipParameters, ViewMaker
from strata.dataload.faults import UndecodableError
from strata.dataload.graph_spec import GraphSpec, ViewSlice
from strata.dataload.pipeline import GpuPipeline
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

CUT = ViewSlice(0, FRAMES)
GEOMETRY = ["centre", "box", "whole frame", "box enlarged", "flip"]


def gaps(
    name: str, pipeline: type[CpuPipeline] | type[GpuPipeline], *, photometric: bool, **changes
) -> np.ndarray:
    """Differences of a case's view from the reference: `[FRAMES, SIZE, SIZE, 3]`."""
    parameters = dataclasses.replace(rows_of(name), **changes)
    strip = encode(moving_pictures(1))
    options = {"photometric": photometric, "colour_maps": True}
    (got,) = run_graph([strip], [parameters], (CUT,), pipeline, **options)
    frames = decode_strip(strip, HEIGHT)
    one_pass = pipeline is GpuPipeline
    want = reference_view(
        frames, CUT, parameters, 0, SIZE, photometric=photometric, one_pass=one_pass
    )
    return np.abs(got[0].astype(int) - want.astype(int))


@pytest.mark.parametrize("name", GEOMETRY)
def test_crop_and_resize_are_within_one_level(name: str):
    on_cpu = gaps(name, CpuPipeline, photometric=False)
    assert on_cpu.max() <= 1
    assert on_cpu.mean() <= 0.02
    # DALI's CPU versions of the operators of a GPU; tests/gpu has the GPU's own.
    on_gpu = gaps(name, GpuPipeline, photometric=False)
    assert on_gpu[:, 1:-1, 1:-1].max() <= 1
    # At the border the triangle reaches beyond the crop; DALI repeats the edge pixel there.
    assert on_gpu.max() <= 3


@pytest.mark.parametrize("name", [n for n in CASES if n not in GEOMETRY])
def test_colour_and_blur_are_within_one_level(name: str):
    """Alone: the crop is as large as the view, so that resizing changes nothing."""
    same_size = np.array([[7, 20, 7 + SIZE, 20 + SIZE]], np.float32)
    both = "sigma" in CASES[name] and len(CASES[name]) > 1
    for pipeline in (CpuPipeline, GpuPipeline):
        gap = gaps(name, pipeline, photometric=True, box=same_size)
        assert gap.max() <= (2 if both else 1)
        assert gap.mean() <= 0.3


@pytest.mark.parametrize("name", CASES)
def test_every_view_agrees_with_the_reference(name: str):
    on_cpu = gaps(name, CpuPipeline, photometric=True)
    assert (on_cpu > 1).mean() <= 0.005
    # Colour enlarges a difference of the resize.
    assert on_cpu.max() <= 3
    assert on_cpu.mean() <= 0.3
    on_gpu = gaps(name, GpuPipeline, photometric=True)
    assert on_gpu[:, 1:-1, 1:-1].max() <= 3
    assert on_gpu.max() <= 6
    assert on_gpu.mean() <= 0.3


def test_a_twist_of_a_gpu_agrees_with_the_reference():
    """Without gray and with one draw for all frames, a GPU uses a twist instead of maps."""
    parameters = dataclasses.replace(IDENTITY, **CASES["all"])
    strip = encode(moving_pictures(4))
    (got,) = run_graph([strip], [parameters], (CUT,), GpuPipeline)
    want = reference_view(decode_strip(strip, HEIGHT), CUT, parameters, 0, SIZE, photometric=True)
    gap = np.abs(got[0].astype(int) - want.astype(int))
    assert gap[:, 1:-1, 1:-1].max() <= 3


def test_clips_with_and_without_jitter_agree_with_the_reference():
    """Views drawn by a recipe that does not change the colours of some clips."""
    num = 6
    views = drawn(num, AugmentSpec(crop_area=(0.2, 1.0), jitter=0.5, gray=0.2))
    assert 0 < (views.brightness == 1).sum() < num
    strips = [encode(moving_pictures(seed)) for seed in range(num)]
    (got,) = run_graph(strips, [views], (CUT,))
    for row, strip in enumerate(strips):
        frames = decode_strip(strip, HEIGHT)
        want = reference_view(frames, CUT, views, row, SIZE, photometric=True)
        gap = np.abs(got[row].astype(int) - want.astype(int))
        assert gap.max() <= 3, f"row {row}: largest difference {gap.max()}"
        assert gap.mean() <= 0.3, f"row {row}: mean difference {gap.mean():.3f}"


def drawn(num: int, spec: AugmentSpec) -> ViewParameters:
    return draw_view(
        spec,
        height=HEIGHT,
        width=WIDTH,
        size=SIZE,
        frames=FRAMES,
        seed=0,
        epoch=0,
        samples=np.arange(num),
        view=0,
    )


def test_the_resize_is_that_of_torch():
    clip = moving_pictures(7)
    out = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    ViewMaker(SIZE).make(clip, ClipParameters((3, 10, 62, 81), False, None, None), out)
    crop = torch.from_numpy(clip[:, 3:62, 10:81]).permute(0, 3, 1, 2)
    want = functional.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)
    assert torch.equal(torch.from_numpy(out), want.permute(0, 2, 3, 1))


def test_a_view_sees_nothing_beyond_its_crop():
    clip, box = moving_pictures(8), (8, 16, 56, 80)
    inside = np.zeros_like(clip)
    inside[:, 8:56, 16:80] = clip[:, 8:56, 16:80]
    parameters = dataclasses.replace(IDENTITY, box=np.array([box], np.float32))
    for pipeline in (CpuPipeline, GpuPipeline):
        for cut in (CUT, ViewSlice(0, FRAMES // 2, 2)):
            one, two = (
                run_graph([f], [parameters], (cut,), pipeline, coded="frames", photometric=False)
                for f in (clip, inside)
            )
            np.testing.assert_array_equal(one, two)


def test_gray_is_one_channel_three_times():
    parameters = dataclasses.replace(IDENTITY, gray=np.array([[2]], np.int8))
    strip = encode(moving_pictures(5))
    (got,) = run_graph([strip], [parameters], (CUT,))
    (plain,) = run_graph([strip], [IDENTITY], (CUT,), photometric=False)
    np.testing.assert_array_equal(got, np.repeat(plain[..., 2:], 3, axis=-1))


def test_a_sample_without_colour_and_blur_is_not_touched_and_a_flip_is_exact():
    strip = encode(moving_pictures(6))
    flipped = dataclasses.replace(IDENTITY, flip=np.array([True]))
    (plain,) = run_graph([strip], [IDENTITY], (CUT,), photometric=False)
    np.testing.assert_array_equal(run_graph([strip], [IDENTITY], (CUT,))[0], plain)
    np.testing.assert_array_equal(run_graph([strip], [flipped], (CUT,))[0], plain[..., ::-1, :])


def test_views_are_the_frames_they_should_be():
    strip = encode(moving_pictures(2))
    cuts = (ViewSlice(0, 4), ViewSlice(4, 4), ViewSlice(0, 4, 2), ViewSlice(0, 8))
    for pipeline in (CpuPipeline, GpuPipeline):
        views = run_graph([strip], [IDENTITY] * 4, cuts, pipeline, photometric=False)
        full = views[3][0]
        np.testing.assert_array_equal(views[0][0], full[:4])
        np.testing.assert_array_equal(views[1][0], full[4:])
        np.testing.assert_array_equal(views[2][0], full[::2])


def test_parameters_hold_for_all_frames_of_a_clip():
    still = np.repeat(moving_pictures(3)[:1], FRAMES, axis=0)
    parameters = dataclasses.replace(IDENTITY, **CASES["all"])
    (view,) = run_graph([encode(still)], [parameters], (CUT,))
    # The first and last frame of a strip have one neighbour only, so their border rows' chroma
    # is interpolated from other rows; between them all frames must be the same.
    for frame in view[0][2:-1]:
        np.testing.assert_array_equal(frame, view[0][1])


def test_samples_of_a_batch_do_not_touch_each_other_on_any_number_of_threads():
    strips = [encode(moving_pictures(s)) for s in range(6)]
    views = drawn(6, AugmentSpec(per_frame=True, gray=0.3))
    (batch,) = run_graph(strips, [views], (CUT,), num_threads=3)
    for number, strip in enumerate(strips):
        row = ViewParameters(**{n: v[number : number + 1] for n, v in vars(views).items()})
        (alone,) = run_graph([strip], [row], (CUT,))
        np.testing.assert_array_equal(batch[number], alone[0])


def opened(batch_size: int, **changes) -> CpuPipeline:
    spec = GraphSpec(
        batch_size=batch_size,
        strip_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        size=SIZE,
        views=(CUT, CUT),
        joined=2,
        photometric=False,
        decode="cpu",
        augment="cpu",
        device_id=None,
        num_threads=2,
    )
    return CpuPipeline(dataclasses.replace(spec, **changes))


def test_memory_is_used_again_only_when_nothing_refers_to_a_batch():
    pipeline = opened(1)
    first, second = ([encode(moving_pictures(seed))] for seed in (1, 2))
    (batch,) = pipeline.start(first, [IDENTITY] * 2)()
    assert batch.shape == (1, 2, FRAMES, SIZE, SIZE, 3)
    part, place = batch[:, 1], batch.data_ptr()
    want = part.clone()
    del batch
    (other,) = pipeline.start(second, [IDENTITY] * 2)()
    assert torch.equal(part, want)
    assert not torch.equal(other[:, 1], want)
    del part
    # A thread may hold its share of the batch for a moment after the batch is complete.
    held, deadline = [other], time.monotonic() + 60
    while held[-1].data_ptr() != place:
        assert time.monotonic() < deadline
        held += pipeline.start(first, [IDENTITY] * 2)()
    pipeline.close()


@pytest.mark.parametrize("pipeline", [CpuPipeline, GpuPipeline])
def test_damaged_samples_are_named_and_the_pipeline_continues(pipeline):
    good = encode(moving_pictures(1))
    views = drawn(3, AugmentSpec())
    both = opened(3, views=(CUT,), joined=1)
    both.close()
    again = pipeline(both.spec)
    with pytest.raises(UndecodableError) as found:
        again.start([good, good[:200], good[:100]], [views])()
    assert [place for place, _ in found.value.faults] == [1, 2]
    assert all("Stacktrace" not in reason for _, reason in found.value.faults)
    (batch,) = again.start([good] * 3, [views])()
    (want,) = pipeline(both.spec).start([good] * 3, [views])()
    assert torch.equal(batch, want)
    again.close()
