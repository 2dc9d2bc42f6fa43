"""A normal training step never waits for the device and copies no constant to it."""

import gc
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from strata.config import parse_config
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.telemetry.metrics import Metrics
from strata.train.config import TrainConfig
from strata.train.pretraining import open_pretraining
from tests.support.commands import TINY
from tests.support.rank_processes import run_ranks

_ATEN = torch.ops.aten
# Operations that wait for a GPU: .item(), bool(), float(); data-dependent shapes; torch.tensor().
WAITS = (
    _ATEN._local_scalar_dense.default,
    _ATEN.is_nonzero.default,
    _ATEN.equal.default,
    _ATEN.nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.lift_fresh.default,
)
# torch's Adam has its step counts on the host if it is not the fused one of GPUs; orders are made
# on the host and copied without waiting.
ALLOWED = ("/torch/optim/", " in orders")


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in WAITS:
            frames = traceback.extract_stack()
            stack = "\n".join(f"{f.filename}:{f.lineno} in {f.name}" for f in frames)
            if not any(allowed in stack for allowed in ALLOWED):
                self.waits.append(f"{func}\n{stack}")
        return func(*args, **(kwargs or {}))


def train(world: World, folder: Path, shards: Path, log_every: int) -> dict[str, Any]:
    """A small run of both stages, with the operations of and between all steps recorded."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = ["--config", str(folder / "tiny.yaml"), "--data.shards", str(shards / "train")]
    words += ["--run", str(folder / "run"), "--monitor.log_every", str(log_every)]
    words += ["--monitor.health_every", "1000", "--checkpoint.every_steps", "1000"]
    words += ["--collect_every_steps", "4"]
    config = parse_config(TrainConfig, words, prog="test", description="")
    config.run.mkdir(exist_ok=True)
    trainer = open_pretraining(
        config,
        world=world,
        device=torch.device("cpu"),
        reader=ShardReader(config.data.shards),
        metrics=Metrics(),
    )
    watch, collected, watched = Watch(), [], []
    step, advance = trainer.task.step, trainer._advance

    def watched_step(batch: Any, state: Any) -> Any:
        # Constants are copied once; while the queue fills, its length is a shape.
        if trainer.state.step == 0 or not trainer.task.model.queue.is_full:
            return step(batch, state)
        watched.append(trainer.state.step)
        with watch:
            return step(batch, state)

    def watched_advance() -> None:
        with watch:
            advance()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and trainer.state.step:
            collected.append((trainer.state.step, info["generation"]))

    trainer.task.step, trainer._advance = watched_step, watched_advance
    gc.callbacks.append(note)
    try:
        trainer.fit()
    finally:
        gc.callbacks.remove(note)
    return {"waits": watch.waits, "watched": watched, "collected": collected, "gc": gc.isenabled()}


def test_no_wait_and_no_collection_but_at_chosen_steps(shards: Path, tmp_path: Path):
    (found,) = run_ranks(train, 1, tmp_path, shards, 1000)
    assert len(found["watched"]) >= 10
    assert not found["waits"], f"{len(found['waits'])} waits, first {found['waits'][0]}"
    # First to freeze the objects of the start, then at every fourth of 18 steps.
    steps = [step for step, _ in found["collected"] if step < 18]
    assert steps == [1, 4, 8, 12, 16]
    assert all(generation == 2 for _, generation in found["collected"][:5])
    assert found["gc"]
