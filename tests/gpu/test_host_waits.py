"""On a GPU: torch itself raises where an ordinary step waits for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from strata.config import parse_config
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.telemetry.metrics import Metrics
from strata.train.config import TrainConfig
from strata.train.pretraining import open_pretraining
from tests.support.commands import TINY
from tests.support.rank_processes import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def train(world: World, folder: Path, shards: Path) -> int:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = ["--config", str(folder / "tiny.yaml"), "--data.shards", str(shards / "train")]
    words += ["--run", str(folder / "run"), "--monitor.log_every", "1000"]
    words += ["--monitor.health_every", "1000", "--checkpoint.every_steps", "1000"]
    words += ["--engine.device", "cuda"]
    config = parse_config(TrainConfig, words, prog="test", description="")
    config.run.mkdir(exist_ok=True)
    trainer = open_pretraining(
        config,
        world=world,
        device=torch.device("cuda", 0),
        reader=ShardReader(config.data.shards),
        metrics=Metrics(),
    )
    step, watched = trainer.task.step, 0

    def strict(batch: Any, state: Any) -> Any:
        nonlocal watched
        # The first steps of a stage choose kernels and make buffers.
        if batch.step < 3 or batch.epoch > 1:
            return step(batch, state)
        watched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(batch, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.task.step = strict
    trainer.fit()
    return watched


def test_no_ordinary_step_waits_for_the_device(shards: Path, tmp_path: Path):
    assert run_ranks(train, 1, tmp_path, shards) == [6]
