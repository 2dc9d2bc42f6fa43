"""An epoch's order is uniform with a large pool, and keeps shards together with a small one."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from strata.dataload.plan import Plan

SHARD, SHARDS, BATCH = 64, 64, 32


class Quality(NamedTuple):
    """How random an order is; means over two pairs of epochs."""

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


def measure_order(order_of: Callable[[int], np.ndarray]) -> Quality:
    rows = []
    for epoch in range(2):
        one, two = order_of(epoch), order_of(epoch + 1)
        num = len(one)
        # The inverse of a permutation has each sample's place.
        distance = np.sort(np.abs(np.argsort(one) - np.argsort(two)) / num)
        # P(|u - v| <= distance) for independent uniform u, v in [0, 1].
        uniform = 1 - (1 - distance) ** 2
        batches = (one // SHARD).reshape(-1, BATCH)
        counts = [np.unique(b, return_counts=True)[1] for b in batches]
        rows.append(
            (
                np.corrcoef(one[:-1], one[1:])[0, 1],
                distance.mean(),
                np.abs(uniform - np.arange(1, num + 1) / num).max(),
                np.mean([(c * (c - 1)).sum() / (BATCH * (BATCH - 1)) for c in counts]),
                np.mean([len(c) for c in counts]),
            )
        )
    return Quality(*np.mean(rows, axis=0).tolist())


def quality(pool: int) -> Quality:
    plan = Plan(shard_sizes=(SHARD,) * SHARDS, batch_size=BATCH, seed=0, pool_samples=pool)
    return measure_order(plan.epoch_order)


def test_a_pool_of_all_samples_is_uniform():
    uniform = measure_order(lambda epoch: np.random.default_rng(epoch).permutation(SHARD * SHARDS))
    for found in (quality(4096), uniform):
        assert abs(found.serial_correlation) < 0.05
        assert abs(found.moved - 1 / 3) < 0.015
        assert found.moved_ks < 0.04
        assert found.same_shard == pytest.approx(63 / 4095, rel=0.1)


def test_a_small_pool_keeps_a_shards_samples_together():
    found = quality(256)
    assert found.same_shard == pytest.approx(63 / 255, rel=0.05)
    assert found.shards_in_batch == pytest.approx(4, abs=0.1)
    assert found.serial_correlation > 0.1
    assert quality(1).serial_correlation > 0.9
