"""The order of samples, a pure function of seed, epoch, world size, rank and position.

Shards are put into a random order and their samples concatenated; this sequence is cut into pools
of some thousand samples, and each pool is shuffled. Shards were shuffled when they were written, so
reads are nearly sequential and the order is still random. Every rank gets the same number of full
batches; a global batch is the same set of samples for any number of ranks. Samples that the run
cannot use are removed from the sequence before it is cut.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from strata.counter_random import Stream, permutation
from strata.errors import ConfigError

__all__ = ["Plan", "evaluation_slots"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of samples of a complete run."""

    shard_sizes: tuple[int, ...]
    """Samples in each shard; sample indices are consecutive over the shards in order."""
    batch_size: int
    """Samples in a global batch."""
    seed: int
    """In [0, 2^64)."""
    pool_samples: int = 16_384
    """Samples shuffled together; covers all of UCF101; for larger sets see docs/benchmarks.md."""
    left_out: tuple[int, ...] = ()
    """Indices of samples that are skipped, ascending."""

    def __post_init__(self) -> None:
        """Check that there is at least one batch.

        Raises:
            ConfigError: The set is smaller than one global batch, or a size is not positive.
        """
        if self.batch_size < 1 or self.pool_samples < 1:
            raise ConfigError("data.batch_size and data.pool_samples must be 1 or more")
        if self.num_samples < self.batch_size:
            short = f" and {len(self.left_out)} too short ones" if self.left_out else ""
            raise ConfigError(
                f"the shards hold {self.num_samples} samples{short}, fewer than one batch of "
                f"{self.batch_size}; use a smaller data.batch_size or more data"
            )

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch: those of all shards without `left_out`."""
        return sum(self.shard_sizes) - len(self.left_out)

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch; the remaining samples are skipped in this epoch."""
        return self.num_samples // self.batch_size

    @property
    def digest(self) -> str:
        """Digest of the order; equal digests mean equal batches."""
        content = (self.shard_sizes, self.batch_size, self.seed, self.pool_samples)
        # Without skipped samples the digest is that of older versions, which had no such list.
        content = repr((*content, self.left_out) if self.left_out else content)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def epoch_order(self, epoch: int) -> np.ndarray:
        """All samples of an epoch without `left_out`, each once, in the epoch's order.

        Returns:
            Shape `[num_samples]`, int64.
        """
        return _epoch_order(self.shard_sizes, self.left_out, self.pool_samples, self.seed, epoch)

    def batch(self, epoch: int, step: int, rank: int, num_ranks: int) -> np.ndarray:
        """Sample indices of a rank's part of one global batch.

        Args:
            epoch: From 0.
            step: Step within the epoch, in [0, steps_per_epoch).
            rank: In [0, num_ranks).
            num_ranks: A divisor of the batch size.

        Returns:
            Shape `[batch_size / num_ranks]`, int64: sample indices.

        Raises:
            ConfigError: The batch does not divide by the ranks.
        """
        if self.batch_size % num_ranks:
            raise ConfigError(
                f"data.batch_size {self.batch_size} does not divide by {num_ranks} ranks; "
                "use a multiple"
            )
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is outside the epoch's {self.steps_per_epoch}")
        local = self.batch_size // num_ranks
        start = step * self.batch_size + rank * local
        return self.epoch_order(epoch)[start : start + local]


@lru_cache(maxsize=4)
def _epoch_order(
    shard_sizes: tuple[int, ...],
    left_out: tuple[int, ...],
    pool_samples: int,
    seed: int,
    epoch: int,
) -> np.ndarray:
    runs = np.split(np.arange(sum(shard_sizes)), np.cumsum(shard_sizes)[:-1])
    shards = permutation(seed, Stream.SHARD_ORDER, epoch, len(shard_sizes))
    line = np.concatenate([runs[s] for s in shards])
    line = line[~np.isin(line, left_out)]
    for number, start in enumerate(range(0, len(line), pool_samples)):
        pool = line[start : start + pool_samples]
        # The pool's number is part of the counter, so pools are shuffled independently.
        order = permutation(seed + (number << 32), Stream.PLAN, epoch, len(pool))
        line[start : start + pool_samples] = pool[order]
    line.flags.writeable = False
    return line


def evaluation_slots(
    num_samples: int, batch_size: int, rank: int, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """A rank's share of an evaluation pass over every sample exactly once.

    Args:
        num_samples: Samples in the set.
        batch_size: Samples in a rank's batch.
        rank: In [0, num_ranks).
        num_ranks: Ranks that share the pass.

    Returns:
        Sample indices and a mask, both of shape `[steps, batch_size]`, the same number of steps on
        every rank. Where the mask is False the index repeats a sample, to be dropped.
    """
    per_step = batch_size * num_ranks
    steps = -(-num_samples // per_step)
    flat = np.arange(steps * per_step)
    valid = flat < num_samples
    slots = np.minimum(flat, num_samples - 1).reshape(steps, num_ranks, batch_size)
    return slots[:, rank], valid.reshape(steps, num_ranks, batch_size)[:, rank]
