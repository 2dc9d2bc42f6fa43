"""How random the plan's order is, compared with a uniform permutation: `tools/bench.py shuffle`.

Pure arithmetic on `Plan`, no data. Samples were shuffled when they were sharded, so a shard is a
random sample of the set. The price of a pool is that samples of one shard meet in a batch more
often.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from strata.dataload.plan import Plan
from strata.errors import ConfigError
from strata.tools.benchmarks.measure import (
    parse_options,
    require_known,
    table,
    write_record,
)

__all__ = ["Quality", "main", "measure_order"]

_SETS = {
    "ucf101": (9_537, 128),
    "kinetics400": (240_000, 128),
}
"""Samples of the training split, samples in a shard."""


@dataclass(frozen=True)
class Quality:
    """How random an order is; each figure's docstring gives its value for a uniform permutation."""

    serial_correlation: float
    """Of neighbours' storage indices in the order; 0 when uniform."""
    moved: float
    """Mean distance of a sample's places in two epochs, as a share of the set; 1/3 when uniform."""
    moved_ks: float
    """Largest gap between that distance's distribution and the uniform one's (Kolmogorov)."""
    same_shard: float
    """Share of the pairs of a batch that are from one shard."""
    shards_in_batch: float
    """Mean number of shards in a batch."""
    shards_open: float
    """Mean number of shards in 4,096 consecutive samples: those that are read at a time."""


def _triangular(distance: np.ndarray) -> np.ndarray:
    """P(|u - v| <= distance) for independent uniform u, v in [0, 1]."""
    return 1 - (1 - distance) ** 2


def measure_order(
    order_of: Callable[[int], np.ndarray], *, shard_size: int, batch_size: int, epochs: int
) -> Quality:
    """Measure neighbouring epochs of an order.

    Args:
        order_of: Gives an epoch's order of all samples.
        shard_size: Samples in a shard.
        batch_size: Samples in a batch.
        epochs: Pairs of epochs to average.
    """
    rows = []
    for epoch in range(epochs):
        one, two = order_of(epoch), order_of(epoch + 1)
        num = len(one)
        places = [np.empty(num, np.int64), np.empty(num, np.int64)]
        places[0][one], places[1][two] = np.arange(num), np.arange(num)
        distance = np.sort(np.abs(places[0] - places[1]) / num)
        gap = np.abs(_triangular(distance) - np.arange(1, num + 1) / num).max()
        shards = one // shard_size
        batches = shards[: num // batch_size * batch_size].reshape(-1, batch_size)
        counts = [np.unique(b, return_counts=True)[1] for b in batches]
        pairs = batch_size * (batch_size - 1)
        windows = [len(np.unique(shards[k : k + 4096])) for k in range(0, num, 4096)]
        rows.append(
            (
                np.corrcoef(one[:-1], one[1:])[0, 1],
                distance.mean(),
                gap,
                np.mean([(c * (c - 1)).sum() / pairs for c in counts]),
                np.mean([len(c) for c in counts]),
                np.mean(windows),
            )
        )
    return Quality(*(float(v) for v in np.mean(rows, axis=0)))


@dataclass(frozen=True, kw_only=True)
class ShuffleOptions:
    """How random the order of samples is for each size of the shuffle's pool."""

    sets: tuple[str, ...] = tuple(_SETS)
    """Sizes of data sets, by name."""
    pools: tuple[int, ...] = (1024, 4096, 16384)
    """Values of data.pool_samples."""
    batch: int = 256
    """Samples in a global batch."""
    epochs: int = 3
    """Pairs of epochs to average."""
    out: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        require_known("set", self.sets, list(_SETS))
        if self.epochs < 1 or self.batch < 2:
            raise ConfigError("epochs must be 1 or more and batch 2 or more")


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: An option is out of its range.
    """
    options = parse_options(ShuffleOptions, argv, "shuffle")
    records = []
    for name in options.sets:
        num, size = _SETS[name]
        sizes = tuple(min(size, num - start) for start in range(0, num, size))
        orders: dict[str, Callable[[int], np.ndarray]] = {
            f"{pool}": Plan(
                shard_sizes=sizes, batch_size=options.batch, seed=0, pool_samples=pool
            ).epoch_order
            for pool in options.pools
        }
        orders["uniform"] = lambda epoch, n=num: np.random.default_rng(epoch).permutation(n)
        for pool, order_of in orders.items():
            quality = measure_order(
                order_of, shard_size=size, batch_size=options.batch, epochs=options.epochs
            )
            records.append({"set": name, "pool": pool, **asdict(quality)})
    head = ("set", "pool", "serial", "moved", "KS", "same shard", "shards/batch", "shards/4096")
    formats = ("", "", ".4f", ".4f", ".4f", ".5f", ".1f", ".1f")
    rows = [[f"{v:{f}}" for v, f in zip(r.values(), formats, strict=True)] for r in records]
    print(table(head, rows))
    write_record(options.out, records)
