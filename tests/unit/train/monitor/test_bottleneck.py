"""Bottleneck and clock for given times; real runs: tests/distributed/test_bottleneck_runs.py."""

import pytest
import torch

from strata.train.monitor import clock as throughput
from strata.train.monitor.bottleneck import PARTS, RankTimes, Utilisation, find_bottleneck
from strata.train.monitor.clock import Clock


def times(**given: float) -> RankTimes:
    names = (*(f"{part}_s" for part in PARTS), "optimizer_s", "read_s", "graph_s")
    return RankTimes(**(dict.fromkeys(names, 0.0) | given))


@pytest.mark.parametrize("part", PARTS)
def test_the_largest_part_is_the_bottleneck(part: str):
    bottleneck = find_bottleneck([times(**({f"{p}_s": 1.0 for p in PARTS} | {f"{part}_s": 2.0}))])
    assert bottleneck.bound_by == part
    assert bottleneck.shares[part] == pytest.approx(2 / 6)
    assert sum(bottleneck.shares.values()) == pytest.approx(1)
    assert bottleneck.straggler_ratio is None
    assert not bottleneck.straggles
    assert f"bound by {part}" in bottleneck.text()


def test_the_slowest_rank_is_judged_and_named():
    # Rank 1 waits in collectives for rank 2, so the network is not slow.
    ranks = [
        times(compute_s=4, communication_s=6),
        times(compute_s=5, communication_s=5),
        times(compute_s=3, data_s=6, communication_s=1, read_s=5, graph_s=1),
    ]
    bottleneck = find_bottleneck(ranks)
    assert (bottleneck.bound_by, bottleneck.data_by, bottleneck.slowest_rank) == ("data", "read", 2)
    assert bottleneck.straggler_ratio == pytest.approx(9 / 4.5)
    assert bottleneck.straggles
    assert "bound by data (storage): data 60%" in bottleneck.text()
    assert "slowest rank 2, 2.00 of the others, which wait for it" in bottleneck.text()
    assert not find_bottleneck([times(compute_s=10), times(compute_s=11)]).straggles


def test_launches_that_came_late_are_the_hosts():
    busy = times(compute_s=8, communication_s=1, host_s=1)
    assert find_bottleneck([busy]).bound_by == "compute"
    assert find_bottleneck([busy], Utilisation(gpu=0.85)).bound_by == "compute"
    late = find_bottleneck([busy], Utilisation(gpu=0.2))
    assert late.bound_by == "host"
    assert late.shares == pytest.approx(
        {"data": 0, "compute": 0.1, "communication": 0.1, "host": 0.8, "checkpoint": 0}
    )
    # If another process uses the GPU too, no share becomes negative.
    assert find_bottleneck([busy], Utilisation(gpu=1.0)).shares == find_bottleneck([busy]).shares


@pytest.mark.parametrize(
    ("utilisation", "part"),
    [
        (Utilisation(), "graph"),
        (Utilisation(jpeg=0.5, decoder=0.0), "graph"),
        (Utilisation(jpeg=0.97), "decode"),
        (Utilisation(decoder=0.97, jpeg=0.0), "decode"),
    ],
)
def test_a_saturated_engine_tells_decoding_from_augmentation(utilisation: Utilisation, part: str):
    waits = times(data_s=8, compute_s=2, read_s=1, graph_s=9)
    assert find_bottleneck([waits], utilisation).data_by == part
    # A saturated engine does not change a storage bottleneck.
    reads = times(data_s=8, compute_s=2, read_s=9, graph_s=1)
    assert find_bottleneck([reads], utilisation).data_by == "read"


def test_the_optimizers_share_is_reported_within_compute():
    bottleneck = find_bottleneck([times(compute_s=8, host_s=2, optimizer_s=3)])
    assert bottleneck.optimizer_share == pytest.approx(0.3)
    assert "compute with the optimizer's 30%" in bottleneck.text()


def test_the_clock_attributes_each_second_once(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        clock.waiting()
        now += 3  # data
        clock.data_arrived()
        now += 5  # forward, backward
        with clock.communication():
            now += 2
            with clock.communication():
                now += 1
        with clock.optimizer():
            now += 4
        clock.step_done()
        now += 7  # host
        with clock.communication():
            now += 0.5
        with clock.checkpoint():
            now += 6
    assert clock.last_wait_s == 3
    assert clock.last_step_s == 15
    found = clock.interval()
    assert (found.wall_s, found.num_steps) == (57, 2)
    assert found.data_s == 6
    assert found.compute_s == 18
    assert found.optimizer_s == 8
    assert found.communication_s == 7
    assert found.checkpoint_s == 12
    assert found.host_s == 14
    assert clock.interval().wall_s == 0
