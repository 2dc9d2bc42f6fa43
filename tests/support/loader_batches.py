"""Helper of the training loader's tests: the batches of one rank."""

import itertools
from collections.abc import Callable

import torch

from strata.dataload.config import DataConfig
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import PretrainingRecipe, open_plan
from strata.distributed import World

SEED = 5


def batches(
    config: DataConfig,
    *,
    world: World | None = None,
    epochs: tuple[int, int] = (0, 2),
    start_step: int = 0,
    count: int | None = None,
    wants_long: Callable[[int], bool] = lambda _: True,
) -> list[Batch]:
    """Load all or `count` batches of a rank."""
    reader = ShardReader(config.shards)
    loader = TrainLoader(
        reader,
        config,
        open_plan(reader, config, SEED),
        world=world or World(),
        device=torch.device("cpu"),
        epochs=epochs,
        start_step=start_step,
        recipe=PretrainingRecipe(config.clips, wants_long),
    )
    with loader:
        return list(itertools.islice(loader, count))
