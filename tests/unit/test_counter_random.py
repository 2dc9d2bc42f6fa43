"""The counter-based generator against published answers, and the properties we rely on."""

import numpy as np
import pytest

from strata.counter_random import Stream, permutation, philox4x32, uniforms

# The known-answer tests of Random123 for philox4x32-10.
PUBLISHED = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox4x32(np.array([counter], np.uint64), key)[0].tolist() == answer


def test_a_draw_depends_on_its_own_item_alone():
    together = uniforms(3, Stream.VIEW, 5, np.arange(10), 1, 6)
    alone = uniforms(3, Stream.VIEW, 5, np.array([7]), 1, 6)
    np.testing.assert_array_equal(together[7], alone[0])
    longer = uniforms(3, Stream.VIEW, 5, np.array([7]), 1, 9)
    np.testing.assert_array_equal(longer[0, :6], alone[0])


@pytest.mark.parametrize(
    "other",
    [
        (4, Stream.VIEW, 5, 1),
        (3, Stream.WINDOW, 5, 1),
        (3, Stream.VIEW, 6, 1),
        (3, Stream.VIEW, 5, 2),
        (3 + 2**32, Stream.VIEW, 5, 1),
    ],
)
def test_every_part_of_the_key_matters(other):
    seed, stream, epoch, view = other
    items = np.arange(50)
    base = uniforms(3, Stream.VIEW, 5, items, 1, 4)
    assert not np.isclose(base, uniforms(seed, stream, epoch, items, view, 4)).any(axis=1).all()


def test_draws_are_uniform():
    draws = uniforms(0, Stream.VIEW, 0, np.arange(20_000), 0, 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = draws.size / 20
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_permutation_is_one():
    order = permutation(1, Stream.PLAN, 2, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert (order != permutation(1, Stream.PLAN, 3, 1000)).any()


@pytest.mark.parametrize(
    ("stream", "order"),
    [
        (Stream.PLAN, [4, 1, 3, 2, 5, 0]),
        (Stream.WINDOW, [5, 0, 3, 4, 1, 2]),
        (Stream.VIEW, [4, 2, 1, 3, 0, 5]),
        (Stream.TIME_ORDER, [1, 5, 4, 3, 0, 2]),
        (Stream.SHARD_PLACES, [1, 5, 4, 3, 0, 2]),
        (Stream.TEST_SPLIT, [1, 5, 4, 3, 0, 2]),
        (Stream.SHARD_ORDER, [2, 3, 0, 5, 4, 1]),
        (Stream.FRAME, [5, 3, 1, 2, 4, 0]),
    ],
)
def test_streams_give_the_numbers_of_earlier_versions(stream, order):
    """Losses of runs, bytes of shards and members of test sets depend on them."""
    assert permutation(7, stream, 2, 6, view=1).tolist() == order
