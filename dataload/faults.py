"""Faulty samples at run time: log them, replace them, and stop when there are too many.

If `data.max_faults` allows it, a sample that cannot be read or decoded is replaced by the sample at
the same position one global batch later in the epoch's order (if that one is faulty too, by the
next, and so on; after the end of the epoch the search continues at its start). The window and the
views are those drawn for the replaced sample. So the content of a batch depends only on the data
set and the position: it is the same for any number of ranks, after any resume, and does not depend
on when the fault was found.

A fault is a wrong checksum, a table or header that does not agree with the manifest, or an error of
the decoder. Data sets of schema 1 have no checksums, and libjpeg decodes some damaged data without
a warning: for them only hashes (`data.check: hash`) find all damage, at the start.
"""

import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from strata.errors import ShardError
from strata.logs import get_logger

__all__ = ["Fault", "FaultLog", "SampleFaultError", "UndecodableError", "replace_faulty"]

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A sample that cannot be used."""

    sample: int
    """Index in the set."""
    key: str
    shard: str
    """File name of its shard."""
    reason: str
    """Message of the reader or the decoder."""

    def __str__(self) -> str:
        """Key, shard and reason on one line."""
        return f"{self.key} in {self.shard}: {self.reason}"


class UndecodableError(RuntimeError):
    """Samples of a batch do not decode.

    Args:
        faults: Their positions in the batch, each with the decoder's error.
    """

    def __init__(self, faults: Sequence[tuple[int, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(reason for _, reason in self.faults))


class SampleFaultError(ShardError):
    """Samples of a batch cannot be read or decoded.

    Args:
        faults: The faults, at least one.
        budget: Number of faults that the run allows.
    """

    def __init__(self, faults: Sequence[Fault], budget: int = 0) -> None:
        self.faults = tuple({f.sample: f for f in faults}.values())
        count = f"{len(self.faults)} sample{'s' if len(self.faults) > 1 else ''}"
        limit = f", data.max_faults allows {budget}" if budget else ""
        super().__init__(
            f"{count} failed to decode{limit}: {'; '.join(map(str, self.faults))}. Find all with "
            "tools/verify_shards.py and shard these videos again; training may replace a few: "
            "data.max_faults"
        )


class FaultLog:
    """Log of the faulty samples of a rank, with the limit on their number.

    Args:
        budget: Number of distinct samples that may fail.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._known: dict[int, Fault] = {}
        self._unreported: list[Fault] = []

    @property
    def known(self) -> Container[int]:
        """Indices of the samples that have failed."""
        return self._known

    def add(self, faults: Sequence[Fault]) -> None:
        """Add faults and log each new one as a warning.

        Raises:
            SampleFaultError: There are more than the limit; the message names all of them.
        """
        with self._lock:
            for fault in faults:
                if fault.sample not in self._known:
                    self._known[fault.sample] = fault
                    self._unreported.append(fault)
                    logger.warning("sample does not decode and is replaced: %s", fault)
            if len(self._known) > self._budget:
                raise SampleFaultError(list(self._known.values()), self._budget)

    def take_new(self) -> tuple[Fault, ...]:
        """New faults since the last call, for the batch that reports them."""
        with self._lock:
            new, self._unreported = tuple(self._unreported), []
        return new


def replace_faulty(
    samples: np.ndarray, order: np.ndarray, start: int, batch_size: int, known: Container[int]
) -> np.ndarray:
    """Replace the faulty samples of a batch; the module's docstring states the rule.

    Args:
        samples: Shape `[b]`: a rank's samples of a global batch, `order[start : start + b]`.
        order: The epoch's order, cut to full global batches.
        start: Position of the first sample in the order.
        batch_size: Samples in a global batch.
        known: Indices of samples that have failed.

    Returns:
        Shape `[b]`.

    Raises:
        ShardError: All possible replacements of a sample have failed.
    """
    chosen = samples.copy()
    for row, sample in enumerate(samples.tolist()):
        place, tries = start + row, 0
        while sample in known:
            place, tries = (place + batch_size) % len(order), tries + batch_size
            if tries >= len(order):
                raise ShardError(
                    f"no sample is left to replace sample {samples[row]}: all samples at its "
                    "position of a batch fail; shard the videos again"
                )
            sample = int(order[place])
        chosen[row] = sample
    return chosen
