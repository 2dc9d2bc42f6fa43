"""A hang is seen while it lasts: time counts as it passes, and the verdict ages."""

import time
from pathlib import Path

import pytest
import torch

from strata.dataload.config import DataConfig
from strata.distributed import World
from strata.telemetry.metrics import Metrics
from strata.train.config import MonitorConfig, TrainConfig
from strata.train.monitor.clock import Clock
from strata.train.monitor.progress import Progress
from strata.train.monitor.run_monitor import RunMonitor


class Now:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.s = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.s)

    def pass_(self, seconds: float) -> None:
        self.s += seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    return Now(monkeypatch)


def step(clock: Clock, now: Now, wait_s: float = 1.0, compute_s: float = 3.0) -> None:
    clock.waiting()
    now.pass_(wait_s)
    clock.data_arrived()
    now.pass_(compute_s)
    clock.step_done()


def test_a_wait_that_has_not_ended_counts_and_no_share_exceeds_one(now: Now):
    clock, start = Clock(), now.s
    step(clock, now)
    clock.waiting()
    before = clock.progress.spent_s()
    for _ in range(5):
        now.pass_(7)
        after = clock.progress.spent_s()
        # A scrape at any moment: a rate is at most 1, and the activities fill the time.
        assert after["data"] - before["data"] == 7
        assert sum(after.values()) == now.s - start
        before = after
    assert clock.progress.activity == "data"


def test_a_stall_is_five_median_steps_or_the_shortest_that_counts(now: Now):
    progress = Progress(stalled_s=2)
    now.pass_(599)
    assert not progress.stalled  # the first step compiles
    now.pass_(2)
    assert progress.stalled
    for seconds in (4, 4, 4, 40, 4):
        now.pass_(seconds)
        progress.step_done()
    assert progress.limit_s == 20
    now.pass_(19)
    assert not progress.stalled
    now.pass_(2)
    assert progress.stalled
    progress.stalled_s = 60
    assert not progress.stalled


def test_a_probe_and_the_end_are_no_stall_and_no_step(now: Now):
    clock = Clock()
    clock.progress.stalled_s = 5
    step(clock, now, 1, 1)
    step(clock, now, 1, 1)
    with clock.paused():
        now.pass_(1000)
        with clock.communication():
            assert clock.progress.activity == "probe"
        assert not clock.progress.stalled
    assert not clock.progress.stalled
    step(clock, now, 1, 1)
    assert clock.progress.limit_s == 10
    with clock.communication():
        assert clock.progress.activity == "communication"
        now.pass_(11)
        assert clock.progress.stalled
    assert clock.progress.activity == "host"
    clock.progress.enter("end")
    now.pass_(1000)
    assert not clock.progress.stalled


def test_the_age_of_a_bottleneck_and_its_parts_are_readings(now: Now, tmp_path: Path):
    config = TrainConfig(
        run=tmp_path,
        data=DataConfig(shards=tmp_path, batch_size=4, size=32),
        monitor=MonitorConfig(verdict_s=0, stalled_s=30),
    )
    metrics, clock = Metrics(), Clock()
    monitor = RunMonitor(
        config, world=World(), device=torch.device("cpu"), metrics=metrics, clock=clock
    )

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    step(clock, now)
    step(clock, now)
    monitor.report(clock.interval(), stage=1)
    assert value("strata_bound", by="compute") == 1
    assert value("strata_bound", by="stalled") == 0
    assert value("strata_time_share_ratio", part="data") == 0.25
    assert value("strata_time_seconds_total", part="compute") == 6
    # Reads block: what was measured before is withdrawn, and the wait counts.
    clock.waiting()
    now.pass_(31)
    assert value("strata_bound", by="compute") == 0
    assert value("strata_bound", by="stalled") == 1
    assert value("strata_time_share_ratio", part="data") is None
    assert value("strata_activity", activity="data") == 1
    assert value("strata_activity_seconds_total", activity="data") == 2 + 31
    # And they return: the interval's parts are added all at once, and add up to its length.
    clock.data_arrived()
    now.pass_(3)
    clock.step_done()
    monitor.report(clock.interval(), stage=1)
    assert value("strata_bound", by="data") == 1
    parts = ("data", "compute", "communication", "host", "checkpoint")
    total = sum(value("strata_time_seconds_total", part=p) or 0 for p in parts)
    assert total == 4 + 4 + 31 + 3
    monitor.close()
