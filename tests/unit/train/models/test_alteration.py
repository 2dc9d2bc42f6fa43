import itertools
import math

import numpy as np
import pytest
import torch

from strata.counter_random import Stream, uniforms
from strata.errors import ConfigError
from strata.train.models.alteration import draw_permutations, time_orders


def draws(num_clips: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniforms(seed, Stream.TIME_ORDER, 0, np.arange(num_clips), 0, 2))


def evenly_spaced(num_clips: int) -> torch.Tensor:
    """One draw in each of `num_clips` equal parts of [0, 1)."""
    middle = (torch.arange(num_clips, dtype=torch.float64) + 0.5) / num_clips
    return torch.stack([middle, torch.zeros_like(middle)], dim=1)


@pytest.mark.parametrize("num_steps", [3, 4, 5])
def test_every_other_permutation_is_drawn_alike_and_those_two_never(num_steps: int):
    num_orders = math.factorial(num_steps) - 2
    orders = draw_permutations(evenly_spaced(3 * num_orders), num_steps).tolist()
    every = set(itertools.permutations(range(num_steps)))
    every -= {tuple(range(num_steps)), tuple(reversed(range(num_steps)))}
    counts = {order: orders.count(list(order)) for order in every}
    assert set(counts.values()) == {3}
    assert sum(counts.values()) == len(orders)


@pytest.mark.parametrize("num_steps", [4, 8, 16, 18])
def test_rows_are_permutations_at_any_length(num_steps: int):
    orders = draw_permutations(draws(200), num_steps)
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(1).values, torch.arange(num_steps).expand(200, -1))
    # Where steps end up is close to uniform: the mean of each column is that of 0..T-1.
    spread = math.sqrt((num_steps**2 - 1) / 12 / 200)
    assert (orders.double().mean(0) - (num_steps - 1) / 2).abs().max() < 4 * spread


@pytest.mark.parametrize("num_steps", [3, 4, 8, 18])
def test_the_ends_of_the_range_are_neither_identity_nor_reversal(num_steps: int):
    last = 1 - 2.0**-32
    ends = torch.tensor([[0.0, 0.0], [last, last]], dtype=torch.float64)
    first_order, last_order = draw_permutations(ends, num_steps)
    identity = torch.arange(num_steps)
    for order in (first_order, last_order):
        assert not torch.equal(order, identity)
        assert not torch.equal(order, identity.flip(0))
    assert first_order.tolist() == [*range(num_steps - 2), num_steps - 1, num_steps - 2]


def test_a_clip_s_order_is_its_own_draw():
    full = draw_permutations(draws(10), 8)
    assert torch.equal(draw_permutations(draws(10)[4:7], 8), full[4:7])


@pytest.mark.parametrize("num_steps", [1, 2, 19])
def test_lengths_without_such_a_permutation_are_refused(num_steps: int):
    with pytest.raises(ConfigError, match=f"cannot shuffle {num_steps} time steps: 3 to 18"):
        draw_permutations(draws(2), num_steps)


def test_time_orders():
    permutations = draw_permutations(draws(5), 4)
    both = [[[0, 1, 2, 3]] * 5, [[3, 2, 1, 0]] * 5]
    assert time_orders(5, 4).tolist() == both
    assert time_orders(5, 4, permutations).tolist() == [*both, permutations.tolist()]
