"""How random the plan's order is beside a uniform permutation: `python tools/bench.py shuffle`.

Pure arithmetic on `Plan`, no data. Samples were shuffled when they were sharded, so a shard is a
random sample of the set, and what a pool costs is company: samples of one shard meet more often.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from strata.dataload.plan import Plan
from strata.errors import ConfigError

__all__ = ["Quality", "main", "measure_order"]

_SETS = {
    "ucf101": (9_537, 128),
    "kinetics400": (240_000, 128),
}
"""Samples of the training split, samples in a shard."""


@dataclass(frozen=True)
class Quality:
    """What an order is like; each figure has its value for a uniform permutation beside it."""

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
    """Mean number of shards in 4,096 consecutive samples: what is read at a time."""


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


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: An option is out of its range.
    """
    parser = argparse.ArgumentParser(
        prog="tools/bench.py shuffle", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    say = parser.add_argument
    say("--sets", nargs="+", default=list(_SETS), help=f"of {', '.join(_SETS)}")
    say("--pools", nargs="+", type=int, default=[1024, 4096, 16384], help="data.pool_samples")
    say("--batch", type=int, default=256, help="samples in a global batch")
    say("--epochs", type=int, default=3, help="pairs of epochs to average")
    say("--out", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.sets) - set(_SETS))
    if unknown:
        raise ConfigError(f"--sets has no {unknown[0]}; use {', '.join(_SETS)}")
    if args.epochs < 1 or args.batch < 2:
        raise ConfigError("--epochs must be 1 or more and --batch 2 or more")
    print(
        f"{'set':<13}{'pool':>8}{'serial':>9}{'moved':>8}{'KS':>8}{'same shard':>12}"
        f"{'shards/batch':>14}{'shards/4096':>13}"
    )
    found = []
    for name in args.sets:
        num, size = _SETS[name]
        sizes = tuple(min(size, num - start) for start in range(0, num, size))
        orders: dict[str, Callable[[int], np.ndarray]] = {
            f"{pool}": Plan(
                shard_sizes=sizes, batch_size=args.batch, seed=0, pool_samples=pool
            ).epoch_order
            for pool in args.pools
        }
        orders["uniform"] = lambda epoch, n=num: np.random.default_rng(epoch).permutation(n)
        for pool, order_of in orders.items():
            quality = measure_order(
                order_of, shard_size=size, batch_size=args.batch, epochs=args.epochs
            )
            found.append({"set": name, "pool": pool, **asdict(quality)})
            print(
                f"{name:<13}{pool:>8}{quality.serial_correlation:>9.4f}{quality.moved:>8.4f}"
                f"{quality.moved_ks:>8.4f}{quality.same_shard:>12.5f}"
                f"{quality.shards_in_batch:>14.1f}{quality.shards_open:>13.1f}"
            )
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
