"""How many GPU-hours the pretrainings of a grid take, from measured rates."""

from dataclasses import dataclass

from strata.config import parse_config
from strata.dataload.reader import ShardReader
from strata.tools.ablation_grid import AblateConfig, pretraining
from strata.tools.ablation_table import Cell
from strata.train.config import TrainConfig
from strata.train.method.schedules import phase_at

__all__ = ["gpu_hours"]


@dataclass(frozen=True)
class _Cost:
    short: int
    """Epochs without the long sequence."""
    long: int
    """Epochs with it."""
    hours: float


def _cost(config: AblateConfig, cell: Cell) -> _Cost:
    built = parse_config(
        TrainConfig, pretraining(config, cell), prog="train/main.py", description=""
    )
    epochs = range(built.schedule.epochs)
    long = sum(built.method.wants_long(phase_at(built.schedule, e).stage) for e in epochs)
    short = len(epochs) - long
    rates = config.rates
    videos = rates.num_videos or ShardReader(config.training_set(cell)).num_samples
    seconds = videos * (short / rates.stage_1 + long / rates.stage_2)
    return _Cost(short, long, seconds / 3600)


def gpu_hours(config: AblateConfig) -> str:
    """A table of the rows' GPU-hours in words; evaluations are not in it.

    Args:
        config: With rates.

    Raises:
        ShardError: `rates.num_videos` is 0 and the shards are not here.
    """
    rows: dict[str, list[_Cost]] = {}
    for cell in config.cells():
        if not config.rows[cell.row].untrained:
            rows.setdefault(cell.row, []).append(_cost(config, cell))
    lines = [
        f"{name}: {len(costs)} pretrainings of {costs[0].short} epochs without and {costs[0].long} "
        f"with the long sequence, {sum(c.hours for c in costs):.1f} GPU-hours"
        for name, costs in rows.items()
    ]
    total = sum(c.hours for costs in rows.values() for c in costs)
    rates = config.rates
    source = f" ({rates.source})" if rates.source else ""
    lines.append(
        f"in all {total:.1f} GPU-hours of pretraining at {rates.stage_1:g} and {rates.stage_2:g} "
        f"samples/s{source}; evaluations come on top"
    )
    return "\n".join(lines)
