"""The clock excludes work that is not training from its intervals."""

import time

import pytest

from strata.train.monitor.clock import Clock


def test_a_pause_is_left_out_of_the_interval(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    now += 1
    clock.data_arrived()
    now += 2
    clock.step_done()
    with clock.communication():
        now += 4
    with clock.paused():
        now += 8
        with clock.communication():
            now += 16
    clock.waiting()
    now += 32
    clock.data_arrived()
    now += 64
    clock.step_done()
    times = clock.interval()
    assert times.num_steps == 2
    assert times.wall_s == 1 + 2 + 4 + 32 + 64
    assert times.data_s == 1 + 32
    assert times.compute_s == 2 + 64
    assert times.communication_s == 4
    assert times.host_s == 0
