"""The order of samples, over a grid of parameters, without files."""

import itertools

import numpy as np
import pytest

from strata.dataload.plan import Plan, evaluation_slots
from strata.errors import ConfigError

SIZES = [(1,), (5,), (7, 1, 9), (64,) * 4, (100, 3, 50)]


def plans():
    for sizes, batch, pool in itertools.product(SIZES, (1, 2, 8), (4, 32, 4096)):
        if sum(sizes) >= batch:
            yield Plan(shard_sizes=sizes, batch_size=batch, seed=3, pool_samples=pool)


@pytest.mark.parametrize("plan", list(plans()), ids=str)
def test_every_epoch_holds_every_sample_once_in_another_order(plan: Plan):
    orders = [plan.epoch_order(e) for e in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(plan.num_samples))
    if plan.num_samples > 16:
        assert (orders[0] != orders[1]).any()
        assert (orders[1] != orders[2]).any()


def test_skipped_samples_are_in_no_batch_and_all_others_in_each_epoch():
    left_out = (0, 4, 5, 9)
    plan = Plan(shard_sizes=(5, 4, 3), batch_size=2, seed=3, pool_samples=4, left_out=left_out)
    assert (plan.num_samples, plan.steps_per_epoch) == (8, 4)
    for epoch in range(3):
        expected = sorted(set(range(12)) - set(left_out))
        assert sorted(plan.epoch_order(epoch).tolist()) == expected
    everything = Plan(shard_sizes=(5, 4, 3), batch_size=2, seed=3, pool_samples=4)
    assert plan.digest != everything.digest
    # The digest of older versions without skipped samples, so that their runs can resume.
    assert everything.digest == "74e2e1edbdba8d22"
    with pytest.raises(ConfigError, match="hold 8 samples and 4 too short ones, fewer than one"):
        Plan(shard_sizes=(12,), batch_size=9, seed=3, left_out=left_out)


@pytest.mark.parametrize("plan", list(plans()), ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_share_the_same_global_batches(plan: Plan, num_ranks: int):
    if plan.batch_size % num_ranks:
        with pytest.raises(ConfigError, match="does not divide"):
            plan.batch(0, 0, 0, num_ranks)
        return
    for epoch, step in itertools.product(range(2), range(min(plan.steps_per_epoch, 4))):
        full = plan.batch(epoch, step, 0, 1)
        parts = [plan.batch(epoch, step, r, num_ranks) for r in range(num_ranks)]
        assert {len(p) for p in parts} == {plan.batch_size // num_ranks}
        np.testing.assert_array_equal(np.concatenate(parts), full)


@pytest.mark.parametrize("plan", list(plans()), ids=str)
def test_a_run_that_changes_its_ranks_takes_the_same_samples(plan: Plan):
    """Three epochs; after each step the run may resume with another number of ranks."""
    rng = np.random.default_rng(len(plan.shard_sizes))
    divisors = [r for r in (1, 2, 4, 8) if plan.batch_size % r == 0]
    full = plan.steps_per_epoch * plan.batch_size
    for epoch in range(3):
        taken = []
        for step in range(plan.steps_per_epoch):
            ranks = int(rng.choice(divisors))
            taken += [plan.batch(epoch, step, rank, ranks) for rank in range(ranks)]
        taken = np.concatenate(taken)
        np.testing.assert_array_equal(taken, plan.epoch_order(epoch)[:full])
        assert len(set(taken.tolist())) == full
        assert plan.num_samples - full < plan.batch_size


def test_every_rank_has_the_same_full_batches_and_no_more():
    plan = Plan(shard_sizes=(10, 3), batch_size=4, seed=0)
    assert plan.steps_per_epoch == 3
    for rank in range(2):
        assert [len(plan.batch(0, step, rank, 2)) for step in range(3)] == [2, 2, 2]
        with pytest.raises(ValueError, match="step 3 is outside the epoch's 3"):
            plan.batch(0, 3, rank, 2)


def test_the_remaining_samples_of_epochs_differ():
    plan = Plan(shard_sizes=(50, 50, 3), batch_size=8, seed=0)
    left = [set(plan.epoch_order(e)[96:].tolist()) for e in range(8)]
    assert len(set.union(*left)) > 20


def test_reads_stay_within_a_pool_of_complete_shards():
    plan = Plan(shard_sizes=(100,) * 20, batch_size=10, seed=0, pool_samples=400)
    for start in range(0, 2000, 400):
        shards = {s // 100 for s in plan.epoch_order(1)[start : start + 400].tolist()}
        assert len(shards) == 4


def test_neighbours_in_a_pool_are_independent():
    plan = Plan(shard_sizes=(4096,), batch_size=1, seed=0)
    order = plan.epoch_order(0).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06


def test_digests_of_different_orders_differ():
    base = Plan(shard_sizes=(8, 8), batch_size=4, seed=0)
    same = Plan(shard_sizes=(8, 8), batch_size=4, seed=0)
    others = [
        Plan(shard_sizes=(8, 8), batch_size=4, seed=1),
        Plan(shard_sizes=(16,), batch_size=4, seed=0),
        Plan(shard_sizes=(8, 8), batch_size=2, seed=0),
    ]
    assert base.digest == same.digest
    assert len({base.digest, *(o.digest for o in others)}) == 4


def test_a_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ConfigError, match="hold 3 samples, fewer than one batch of 4"):
        Plan(shard_sizes=(3,), batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("num", "batch", "ranks"), list(itertools.product((1, 7, 64, 65), (1, 4), (1, 2, 3)))
)
def test_evaluation_takes_every_sample_once(num: int, batch: int, ranks: int):
    seen, steps = [], set()
    for rank in range(ranks):
        slots, valid = evaluation_slots(num, batch, rank, ranks)
        seen += slots[valid].tolist()
        steps.add(len(slots))
    assert sorted(seen) == list(range(num))
    assert len(steps) == 1
