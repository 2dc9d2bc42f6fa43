"""The schedule's phases at their boundaries."""

import pytest

from strata.errors import ConfigError
from strata.train.method.schedules import ScheduleConfig, phase_at

PAPER = ScheduleConfig()


@pytest.mark.parametrize(
    ("epoch", "stage", "factor", "queue", "frozen"),
    [
        (0, 1, 1.0, False, True),
        (1, 1, 1.0, False, False),
        (9, 1, 1.0, False, False),
        (10, 1, 1.0, True, False),
        (49, 1, 1.0, True, False),
        (50, 2, 1.0, True, False),
        (199, 2, 1.0, True, False),
        (200, 2, 0.1, True, False),
        (299, 2, 0.1, True, False),
    ],
)
def test_the_published_schedule(epoch, stage, factor, queue, frozen):
    phase = phase_at(PAPER, epoch)
    assert (phase.stage, phase.queue, phase.prototypes_frozen) == (stage, queue, frozen)
    assert phase.lr_factor == pytest.approx(factor)


def test_several_drops_multiply():
    config = ScheduleConfig(lr_drop_epochs=(2, 4), lr_drop_factor=0.5)
    assert [phase_at(config, e).lr_factor for e in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_settings_out_of_range_are_named():
    with pytest.raises(ConfigError, match=r"schedule\.epochs is 0"):
        ScheduleConfig(epochs=0)
