"""Timestamps decide where they are sound, and a constant rate keeps every frame."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from strata.decoding import Packets, read_packets
from strata.preprocess.container import Timing, VideoFacts, timing_of
from strata.preprocess.transcode import FrameSource
from tests.support.source_videos import moving_scene, write_video
from tests.unit.preprocess.test_transcode import FORM

FILM = Fraction(24000, 1001)
NTSC = Fraction(30000, 1001)


def timing(
    times: list[float],
    rate: Fraction | int,
    *,
    coded: Fraction | int = 0,
    base: Fraction = Fraction(1, 90000),
) -> Timing:
    """Of frames at some seconds, whose header says a rate."""
    ticks = np.sort(np.round(np.array(times) / float(base)).astype(np.int64))
    facts = VideoFacts(
        width=96,
        height=64,
        codec="a",
        pixel_format="yuv420p",
        rate=Fraction(rate),
        guessed_rate=Fraction(rate),
        coded_rate=Fraction(coded),
        time_base=base,
        sample_aspect=1.0,
    )
    return timing_of(Packets(times=ticks, num_shown=len(ticks)), facts)


def regular(rate: Fraction | int, count: int = 150) -> list[float]:
    return [k / float(rate) for k in range(count)]


def with_(times: list[float], change: Callable[[int], float]) -> list[float]:
    return [time + change(k) for k, time in enumerate(times)]


def run_ahead(number: int) -> float:
    """Frames of a program stream between two with times: a frame ahead, and then one time twice."""
    return 0.04 if 11 <= number % 40 <= 25 else 0.0


PULLDOWN = np.cumsum([0] + [2, 3] * 75)[:150] / float(2 * NTSC)
RANDOM = np.random.default_rng(0)

CONSTANT = {
    "exact": (regular(25), 25, 0),
    "film in a coarse clock": ([round(t, 3) for t in regular(NTSC)], NTSC, 0),
    "film of two and three fields": (PULLDOWN.tolist(), FILM, NTSC),
    "the same in milliseconds": (np.round(PULLDOWN, 3).tolist(), FILM, NTSC),
    "program stream": (with_(regular(25, 160), run_ahead), 25, 25),
    "program stream that does not say": (with_(regular(25, 160), run_ahead), 25, 0),
    "jitter": (with_(regular(25), lambda k: 0.016 * (-1) ** k), 25, 25),
    "random jitter": ((np.array(regular(25)) + RANDOM.uniform(-0.014, 0.014, 150)).tolist(), 25, 0),
    "one lost": ([t for k, t in enumerate(regular(25)) if k != 70], 25, 25),
    "a short cut that lacks some at its end": ([*regular(25, 37), 1.56, 1.64], 25, 25),
    "every time twice": ([t for t in regular(25, 75) for _ in range(2)], 25, 0),
    "two frames": ([0.0, 3.0], 25, 0),
    "all at once": ([0.0] * 50, 25, 0),
    "broken": (with_(regular(25), lambda k: 900.0 * (k // 20)), 25, 25),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_rate_keeps_every_frame(name: str):
    times, rate, coded = CONSTANT[name]
    found = timing(times, rate, coded=coded)
    assert not found.is_variable
    assert found.rate == rate


VARIABLE = {
    "every fifth lost": ([t for k, t in enumerate(regular(25)) if k % 5 != 4], 25, 25),
    "every other lost in half": ([t for k, t in enumerate(regular(30)) if k < 75 or k % 2], 30, 30),
    "a camera in the dark": (np.cumsum([1 / 30] * 70 + [1 / 12] * 50).tolist(), 30, 0),
}


@pytest.mark.parametrize("name", VARIABLE)
def test_a_rate_that_varies_is_found(name: str):
    times, rate, coded = VARIABLE[name]
    assert timing(times, rate, coded=coded) == Timing(is_variable=True, rate=Fraction(rate))


def test_the_rate_is_that_of_the_times_where_the_header_counts_empty_chunks():
    assert timing(regular(25), 50) == Timing(is_variable=False, rate=Fraction(25))


def test_a_clock_that_starts_over(tmp_path: Path):
    """Two transport streams, one behind the other: the second has the times of the first."""
    path = write_video(tmp_path / "a.ts", moving_scene(40, 96, 64), codec="libx264")
    path.write_bytes(path.read_bytes() * 2)
    source = FrameSource(path, "a", FORM)
    assert sum(len(planes) for planes in source.segments()) == 80
    assert not source.resampled
    assert source.rate == 25


@pytest.mark.parametrize("rate", [24, 25, 30])
@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
@pytest.mark.parametrize("bit_rate", [40_000, 2_000_000])
def test_program_streams(tmp_path: Path, codec: str, rate: int, bit_rate: int):
    """At low rates many frames share one time."""
    path = tmp_path / "a.mpg"
    scene = moving_scene(120, 96, 64)
    write_video(path, scene, codec=codec, rate=rate, quality=bit_rate, options={"bf": "2"})
    assert read_packets(path, "a").num_shown == 120
    source = FrameSource(path, "a", FORM)
    assert sum(len(planes) for planes in source.segments()) == 120
    assert (source.resampled, source.rate) == (False, rate)
