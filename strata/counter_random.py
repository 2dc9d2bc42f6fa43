"""Random numbers as a pure function of (seed, stream, indices): Philox4x32-10, vectorised.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011. A draw does not
depend on earlier draws, so it does not depend on batch, rank, worker or resume.
"""

from enum import IntEnum

import numpy as np

__all__ = ["Stream", "permutation", "philox4x32", "uniforms"]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


class Stream(IntEnum):
    """The purpose of a draw; draws of streams with different numbers are independent.

    Three purposes have the number 4, since the losses of runs, the bytes of shards and the members
    of test sets that exist depend on it. A new purpose gets a number of its own.
    """

    PLAN = 1
    """Order of samples within a pool."""
    WINDOW = 2
    """Place and stride of a window."""
    VIEW = 3
    """Parameters of a view."""
    TIME_ORDER = 4
    """Altered orders of time steps, by sample; `view` is the level and view."""
    SHARD_PLACES = 4
    """Order in which videos are divided among shards, by place in the list; epoch 0, `view` 0."""
    TEST_SPLIT = 4
    """Videos of a class that form the test set; the epoch is the label + 1, `view` 1."""
    SHARD_ORDER = 5
    """Order of shards in an epoch."""
    FRAME = 6
    """Parameters of single frames of a view."""
    PLAIN_SHARDS = 7
    """Order of shards in an epoch of `strata.dataload.webdataset`."""
    PLAIN_CLIP = 8
    """Place of a clip of `strata.dataload.webdataset`, by sample."""


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Compute random words by ten rounds of Philox on 4x32-bit counters.

    Args:
        counter: Shape `[N, 4]`, values in [0, 2^32).
        key: Two 32-bit words.

    Returns:
        Shape `[N, 4]`, uint32: independent random words.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(
    seed: int, stream: Stream, epoch: int, items: np.ndarray, view: int, count: int
) -> np.ndarray:
    """Draw uniform random numbers in [0, 1) for each item.

    Args:
        seed: The run's seed, in [0, 2^32).
        stream: What the draws are for.
        epoch: In [0, 2^16).
        items: Shape `[N]`: sample indices, in [0, 2^32).
        view: Which view of the sample, in [0, 2^8).
        count: Draws for each item.

    Returns:
        Shape `[N, count]`, float64; 32 random bits each.
    """
    blocks = -(-count // 4)
    num_items = len(items)
    counter = np.zeros((num_items, blocks, 4), np.uint64)
    counter[:, :, 0] = np.arange(blocks, dtype=np.uint64)[None, :]
    counter[:, :, 1] = np.asarray(items, np.uint64)[:, None]
    counter[:, :, 2] = np.uint64(epoch)
    counter[:, :, 3] = np.uint64((view << 8) | int(stream))
    words = philox4x32(counter.reshape(-1, 4), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.reshape(num_items, blocks * 4)[:, :count].astype(np.float64) * 2.0**-32


def permutation(seed: int, stream: Stream, epoch: int, length: int, view: int = 0) -> np.ndarray:
    """Draw a random order of `range(length)` by sorting one 64-bit draw for each element.

    Returns:
        Shape `[length]`, int64.
    """
    pair = uniforms(seed, stream, epoch, np.arange(length), view, 2)
    return np.lexsort((pair[:, 1], pair[:, 0])).astype(np.int64)
