"""Resume a run from its newest checkpoint, if that belongs to the same training."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from strata.config import dotted
from strata.distributed import all_equal
from strata.errors import CheckpointError
from strata.logs import get_logger
from strata.train.engine import Engine
from strata.train.run.checkpoint import RunState, find_checkpoint, restore

__all__ = ["check_same_training", "resume_run"]

logger = get_logger(__name__)

_RECIPE = ("method.", "model.", "data.clips.", "data.views.", "data.size", "seed")
"""Settings that a run cannot change when it resumes; changes of others are logged."""
_FREE = (
    *("run", "resume", "stop_after_steps", "plan_only"),
    *("data.shards", "probe.train", "probe.test", "method.teacher"),
)


def resume_run(
    engine: Engine,
    model: nn.Module,
    run: Path,
    now: RunState,
    *,
    mode: Literal["never", "auto"],
    check: Callable[[Path, RunState], None],
) -> RunState:
    """Restore the newest complete checkpoint of a run, if there is one. All ranks call it.

    Args:
        engine: Receives optimizer and random state.
        model: The module inside the engine.
        run: The run's folder.
        now: The state of this run before any step.
        mode: Whether a run that has checkpoints may be resumed.
        check: Called with a checkpoint's folder and state; raises if it is of another training.

    Returns:
        The position to continue from.

    Raises:
        CheckpointError: There is a checkpoint but resume is off, or it is of another training.
    """
    found = find_checkpoint(run)
    all_equal("newest checkpoint", "none" if found is None else found.name)
    if found is None:
        return now
    if mode == "never":
        raise CheckpointError(
            f"{run} already holds {found.name}; add --resume auto to resume, or choose another "
            "--run"
        )
    saved = restore(engine, model, found)
    check(found, saved)
    logger.info("resumed %s at step %d", found, saved.step)
    return dataclasses.replace(saved, world_size=now.world_size, config=now.config)


def check_same_training(found: Path, saved: RunState, now: RunState, *, is_first: bool) -> None:
    """Check that a checkpoint has the data, order and recipe of this run; log other changes.

    Args:
        found: The checkpoint's folder.
        saved: Its state.
        now: The state of this run before any step.
        is_first: Whether this rank logs.

    Raises:
        CheckpointError: The data, their order, the method, the model or the views have changed.
    """
    for name, what, same in (
        ("manifest_digest", "on other data", "shards"),
        ("plan_digest", "in another order", "batch size and seed"),
        ("teacher_digest", "by another teacher", "method.teacher"),
    ):
        mine, theirs = getattr(now, name), getattr(saved, name)
        if mine != theirs:
            raise CheckpointError(
                f"{found} was trained {what} ({name} {theirs or 'none'}, now {mine or 'none'}); "
                f"use the same {same}, or another --run"
            )
    before, after = dotted(saved.config), dotted(now.config)
    for name in sorted(before.keys() & after.keys()):
        # A list from JSON and a tuple from YAML are the same setting.
        old, new = _as_json(before[name]), _as_json(after[name])
        if old == new or name in _FREE:
            continue
        if name.startswith(_RECIPE):
            raise CheckpointError(
                f"{found} was trained with {name} {old}, now it is {new}: another recipe; set "
                f"--{name} as it was, or choose another --run"
            )
        if is_first:
            logger.warning("%s was %s before and is %s from here on", name, old, new)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
