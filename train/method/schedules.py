"""Schedules of a run as pure functions of the epoch, without state to restore."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from strata.ranges import check_range

__all__ = ["Phase", "ScheduleConfig", "phase_at"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Epochs of the schedule, counted from 0. Defaults: TEXT and release for UCF101."""

    epochs: int = 300
    """Number of epochs. TEXT: 300 on UCF101, 100 on Kinetics-400."""
    lr_drop_epochs: tuple[int, ...] = (200,)
    """Epochs at whose start the learning rate drops. TEXT: 200, or 70 on Kinetics-400."""
    lr_drop_factor: float = 0.1
    """Factor of the learning rate at each drop."""
    second_stage_epoch: int = 50
    """First epoch of the second stage. Release: 50, or 20 on Kinetics-400."""
    queue_epoch: int = 10
    """First epoch in which the prototype assignment uses the queue of scores. Release: 10."""
    frozen_prototype_epochs: int = 1
    """Epochs at the start in which the prototypes are not updated. Release: 1."""

    def __post_init__(self) -> None:
        check = partial(check_range, self, prefix="schedule.")
        check("epochs", at_least=1)
        check("lr_drop_factor", above=0, at_most=1)
        check("second_stage_epoch", "queue_epoch", "frozen_prototype_epochs", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Values of the schedule in one epoch."""

    stage: Literal[1, 2]
    lr_factor: float
    """Learning rate relative to its initial value."""
    queue: bool
    """Whether Sinkhorn uses the queue's scores in addition to the batch's."""
    prototypes_frozen: bool


def phase_at(config: ScheduleConfig, epoch: int) -> Phase:
    """Compute the phase of an epoch, counted from 0."""
    drops = sum(epoch >= drop for drop in config.lr_drop_epochs)
    return Phase(
        stage=2 if epoch >= config.second_stage_epoch else 1,
        lr_factor=config.lr_drop_factor**drops,
        queue=epoch >= config.queue_epoch,
        prototypes_frozen=epoch < config.frozen_prototype_epochs,
    )
