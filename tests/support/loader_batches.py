"""Helper of the training loader's tests: the batches of one rank."""

import itertools

import torch

from strata.dataload.loader import Batch, DataConfig, TrainLoader, open_plan
from strata.dataload.reader import ShardReader
from strata.distributed import World

SEED = 5


def batches(
    config: DataConfig,
    *,
    world: World | None = None,
    epochs: tuple[int, int] = (0, 2),
    start_step: int = 0,
    count: int | None = None,
    **options,
) -> list[Batch]:
    """Load all or `count` batches of a rank; `options` are passed to the loader."""
    reader = ShardReader(config.shards)
    loader = TrainLoader(
        reader,
        config,
        open_plan(reader, config, SEED),
        world=world or World(),
        device=torch.device("cpu"),
        epochs=epochs,
        start_step=start_step,
        **options,
    )
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()
