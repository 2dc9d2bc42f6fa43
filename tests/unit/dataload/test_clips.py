"""Frame indices compared with plain loops, and at the limits of their ranges."""

import math

import numpy as np
import pytest

from strata.dataload.clips import ClipSpec, evaluation_clips, training_clip, training_window
from strata.errors import ConfigError


def window_by_loop(num_frames: int, spec: ClipSpec, u: float, v: float) -> list[int]:
    """method.md 1.2, as written."""
    window = spec.window_frames
    stride = 1.0 + u * (min(spec.max_stride, num_frames / window) - 1.0)
    last_start = math.floor(num_frames - window * stride)
    start = min(math.floor(v * (last_start + 1)), last_start)
    return [min(round(start + stride * k), num_frames - 1) for k in range(window)]


@pytest.mark.parametrize("num_frames", [32, 33, 40, 96, 97, 300])
def test_windows_are_those_of_the_loop(num_frames: int, rng: np.random.Generator):
    spec = ClipSpec()
    draws = np.concatenate([rng.random((200, 2)), [[0, 0], [0, 1 - 2**-32], [1 - 2**-32] * 2]])
    got = training_window(np.full(len(draws), num_frames), spec, draws)
    want = [window_by_loop(num_frames, spec, u, v) for u, v in draws]
    np.testing.assert_array_equal(got, want)
    assert got.min() >= 0
    assert got.max() <= num_frames - 1
    steps = np.diff(got, axis=1)
    assert steps.min() >= 0
    assert steps.max() <= math.ceil(min(3.0, num_frames / 32))


def test_every_start_and_stride_occurs(rng: np.random.Generator):
    windows = training_window(np.full(4000, 200), ClipSpec(), rng.random((4000, 2)))
    spans = windows[:, -1] - windows[:, 0]
    assert spans.min() <= 33
    assert spans.max() >= 91
    assert windows[:, 0].min() == 0
    assert windows[:, -1].max() == 199


def test_a_video_too_short_is_refused():
    with pytest.raises(ValueError, match="31 frames cannot hold a window of 32"):
        training_window(np.array([40, 31]), ClipSpec(), np.zeros((2, 2)))


def test_evaluation_clips_span_the_video():
    clips = evaluation_clips(np.array([100, 16, 5]), num_clips=10, clip_frames=16, stride=1)
    assert clips.shape == (3, 10, 16)
    assert clips[0, :, 0].tolist() == [round(84 * k / 9) for k in range(10)]
    assert clips[0, -1, -1] == 99
    assert (clips[1] == np.arange(16)).all()
    assert clips[2, 0].tolist() == [0, 1, 2, 3, *[4] * 12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_frames": 15}, "clip_frames is 15; use an even number"),
        ({"max_stride": 0.5}, "max_stride is 0.5; use 1 or more"),
        ({"long_stride": 3}, "long_stride is 3; use 1 or 2"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        ClipSpec(**changes)


@pytest.mark.parametrize(("clip_frames", "stride"), [(8, 1), (16, 2), (16, 4), (40, 1)])
def test_a_classifiers_clip_starts_at_every_place_where_it_fits(clip_frames: int, stride: int):
    frames, draws = np.full(1000, 40), np.arange(1000) / 1000
    got = training_clip(frames, draws, clip_frames=clip_frames, stride=stride)
    last = max(40 - (clip_frames - 1) * stride - 1, 0)
    assert sorted(set(got[:, 0].tolist())) == list(range(last + 1))
    counts = np.bincount(got[:, 0])
    assert counts.max() - counts.min() <= 1
    want = np.minimum(got[:, :1] + stride * np.arange(clip_frames), 39)
    np.testing.assert_array_equal(got, want)
