"""The interface between the training loop and a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn

from strata.dataload.loader import Batch, TrainLoader
from strata.train.engine import Engine
from strata.train.monitor.clock import Clock
from strata.train.run.checkpoint import RunState
from strata.train.run.non_finite import NonFiniteFlags, Report

__all__ = ["Task"]

ModelT = TypeVar("ModelT", bound=nn.Module)


class Task(ABC, Generic[ModelT]):
    """A task of the training loop: one step, and the report on an interval of steps.

    Pretraining is one (train/pretraining.py), a classifier another (eval/classifier/run.py).
    """

    model: ModelT
    engine: Engine
    clock: Clock

    @abstractmethod
    def check(self, found: Path, saved: RunState, now: RunState) -> None:
        """Raise `CheckpointError` if a checkpoint is of another training than this one."""

    @abstractmethod
    def announce(self, state: RunState) -> None:
        """Log what is about to be trained."""

    @abstractmethod
    def loader(self, state: RunState) -> TrainLoader:
        """The batches from a position to the end."""

    @abstractmethod
    def step(self, batch: Batch, state: RunState) -> NonFiniteFlags:
        """Compute and update once, without waiting for the device."""

    @abstractmethod
    def count(self, batch: Batch, queue_depth: int) -> None:
        """Count an issued step without using the device."""

    @abstractmethod
    def report_due(self, state: RunState) -> bool:
        """Whether to report after the step that led to this state."""

    @abstractmethod
    def report(self, batch: Batch, state: RunState) -> dict[str, str]:
        """Report the steps since the last report; returns what the progress bar shows."""

    @abstractmethod
    def between_steps(self, state: RunState, beat: Callable[[str], None]) -> None:
        """Work that is due at a position and is not training."""

    @abstractmethod
    def before_saving(self) -> None:
        """Bring the model into the state that is saved. All ranks call it."""

    @abstractmethod
    def dump(self, report: Report) -> None:
        """Keep the batch of a step that was not finite, if the user asked for it."""

    @abstractmethod
    def close(self) -> None:
        """Release what the task holds."""
