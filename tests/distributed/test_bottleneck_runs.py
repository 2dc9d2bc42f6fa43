"""The reported bottleneck is right, on real runs of two ranks that are slowed on purpose."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from strata.dataload.config import DataConfig
from strata.dataload.reader import ShardReader
from strata.dataload.strip_decoder import StripDecoder
from strata.distributed import World, broadcast_object
from strata.telemetry.metrics import Metrics
from strata.train.config import MonitorConfig, TrainConfig
from strata.train.engine import Engine
from strata.train.engine_config import EngineConfig
from strata.train.loop import Trainer
from strata.train.method.schedules import ScheduleConfig
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig
from strata.train.monitor.bottleneck import Bottleneck
from strata.train.pretraining import Pretraining, open_pretraining
from strata.train.run.checkpoint import CheckpointConfig
from strata.train.run.saver import RunSaver
from tests.support.rank_processes import run_ranks

_STEPS = 4
_SCENES: dict[str, dict[str, Any]] = {
    # What is slowed, by how many normal steps per call (or repeated for so long), on which rank. In
    # steps and not seconds, because the loader runs in parallel to steps, whose time varies.
    "plain": {},
    "storage": {"owner": ShardReader, "name": "strips", "steps": 6},
    # For each of a rank's two samples. It competes with the step for the core: it takes longer.
    "decode": {"owner": StripDecoder, "name": "decode", "steps": 10, "repeat": True},
    "model": {"width": 24},
    "slow rank": {"owner": Pretraining, "name": "step", "steps": 6, "rank": 1},
    "network": {"owner": Engine, "name": "watch_averaging", "steps": 6},
    "checkpoint": {"owner": RunSaver, "name": "save", "steps": 6, "every_steps": 1},
    "host": {"owner": Trainer, "name": "_advance", "steps": 6},
}


def _slowed(scene: dict[str, Any], step_s: float) -> Callable[..., Any]:
    original = getattr(scene["owner"], scene["name"])
    seconds = scene["steps"] * step_s

    def slowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if scene["name"] == "watch_averaging":
            # Inside the timed part, as with a slow network and not a slow rank.
            average = self.engine.allreduce_gradients

            def slow_average(*a: Any, **k: Any) -> None:
                time.sleep(seconds)
                average(*a, **k)

            self.engine.allreduce_gradients = slow_average
        elif scene.get("repeat"):
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                original(self, *args, **kwargs)
        else:
            time.sleep(seconds)
        return original(self, *args, **kwargs)

    return slowed


def _run_scenes(world: World, shards: Path, runs: Path) -> dict[str, Bottleneck]:
    bottlenecks, step_s = {}, 0.0
    for name, scene in _SCENES.items():
        config = TrainConfig(
            run=runs / name.replace(" ", "-"),
            data=DataConfig(shards=shards, batch_size=4, size=32, threads=1),
            model=BackboneConfig(width=scene.get("width", 8)),
            method=MethodConfig(num_prototypes=16, queue_length=16, embedding_size=16),
            schedule=ScheduleConfig(
                epochs=3, second_stage_epoch=2, queue_epoch=2, lr_drop_epochs=()
            ),
            engine=EngineConfig(device="cpu"),
            checkpoint=CheckpointConfig(every_steps=scene.get("every_steps", 0)),
            # The first steps are a warm-up with a separate report.
            monitor=MonitorConfig(port=0, log_every=2, verdict_s=0, progress=False),
            stop_after_steps=_STEPS,
        )
        if world.is_first:
            config.run.mkdir(parents=True)
        torch.distributed.barrier()
        with pytest.MonkeyPatch.context() as patch:
            if "owner" in scene and scene.get("rank", world.rank) == world.rank:
                patch.setattr(scene["owner"], scene["name"], _slowed(scene, step_s))
            metrics = Metrics(config.run / "log.jsonl" if world.is_first else None)
            trainer = open_pretraining(
                config,
                world=world,
                device=torch.device("cpu"),
                reader=ShardReader(shards),
                metrics=metrics,
            )
            trainer.fit()
        assert trainer.task.monitor.bottleneck is not None
        bottlenecks[name] = trainer.task.monitor.bottleneck
        if name == "plain":
            step_s = broadcast_object(metrics.registry.get_sample_value("strata_own_step_seconds"))
    return bottlenecks


def test_the_bottleneck_is_right_on_slowed_runs(shards: Path, tmp_path: Path):
    both = run_ranks(_run_scenes, 2, shards / "train", tmp_path, timeout_s=240)
    assert both[0] == both[1]  # the result is the same on all ranks
    found: dict[str, Bottleneck] = both[0]
    del found["plain"]
    said = "\n".join(f"{name}: {bottleneck.text()}" for name, bottleneck in found.items())
    assert {name: v.bound_by for name, v in found.items()} == {
        "storage": "data",
        "decode": "data",
        "model": "compute",
        "slow rank": "compute",
        "network": "communication",
        "checkpoint": "checkpoint",
        "host": "host",
    }, said
    assert found["storage"].data_by == "read", said
    assert found["decode"].data_by == "graph", said
    slow = found["slow rank"]
    assert slow.straggles, said
    assert slow.slowest_rank == 1, said
    for bottleneck in found.values():
        assert 0 < bottleneck.optimizer_share < bottleneck.shares["compute"], said
        assert sum(bottleneck.shares.values()) == pytest.approx(1)
