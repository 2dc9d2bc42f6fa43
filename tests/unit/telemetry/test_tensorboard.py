"""TensorBoard's own reader finds the figures of the records."""

import importlib.util
from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.telemetry.loggers import TensorBoard
from strata.telemetry.metrics import Metrics
from strata.train.config import MonitorConfig

pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")


def read(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def run(folder: Path, first: int, last: int, loss: float) -> None:
    """A run of so many steps, as the loop records it."""
    metrics, board = Metrics(), TensorBoard(folder)
    metrics.add_listener(board)
    metrics.record("start", step=first)
    for step in range(first + 1, last + 1):
        losses = {"instance": loss + step, "total": 2.0}
        metrics.record("step", step=step, losses=losses, grad_norm=None, ok=True, stage=1)
    metrics.record("checkpoint", step=last, took_s=1.0)
    metrics.record("probe", step=last, epoch=1, recall={"R@1": 0.5}, protocol="words")
    board.close()
    metrics.close()


def test_the_numbers_of_every_step(tmp_path: Path):
    run(tmp_path, 0, 3, loss=0.5)
    found = read(tmp_path)
    assert found == {
        "losses/instance": {1: 1.5, 2: 2.5, 3: 3.5},
        "losses/total": {1: 2.0, 2: 2.0, 3: 2.0},
        "stage": {1: 1.0, 2: 1.0, 3: 1.0},
        "probe/epoch": {3: 1.0},
        "probe/recall/R@1": {3: 0.5},
    }


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path: Path):
    run(tmp_path, 0, 4, loss=0.5)
    run(tmp_path, 2, 3, loss=10.0)
    assert read(tmp_path)["losses/instance"] == {1: 1.5, 2: 2.5, 3: 13.0}


def test_without_the_package_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package tensorboard"):
        MonitorConfig(tensorboard=True)
    MonitorConfig()
