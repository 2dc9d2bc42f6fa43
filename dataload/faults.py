"""Count, name and bound the samples that do not decode.

With a budget, a sample that cannot be read or decoded gives its place in the batch to the sample
that stands at the same place one global batch later in the epoch's order (the one after that if it
fails too, and so on, from the end of the epoch to its beginning), with the window and the views
drawn for the place's own sample. So the pictures of a batch depend on the set and the position
alone: the same on any number of ranks, after any resume, and whenever the fault was found.

A fault is a checksum that differs, a table or header that is not the manifest's, or an error of the
decoder. Data sets of schema 1 have no checksums, and libjpeg decodes some damage without an error:
there only hashes (`data.check: hash`) find all of it, at the start.
"""

import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from strata.errors import ShardError
from strata.logs import get_logger

__all__ = ["Fault", "FaultLog", "SampleFaultError", "replace_faulty"]

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
    """What the reader or the decoder said."""

    def __str__(self) -> str:
        """Key, shard and reason on one line."""
        return f"{self.key} in {self.shard}: {self.reason}"


class SampleFaultError(ShardError):
    """Samples of a batch cannot be read or decoded.

    Args:
        faults: Which, at least one.
        budget: How many the run may meet.
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
    """What a rank has met so far, and whether it is too much.

    Args:
        budget: Different samples that may fail.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._known: dict[int, Fault] = {}
        self._unreported: list[Fault] = []

    @property
    def known(self) -> Container[int]:
        """Sample indices that have failed."""
        return self._known

    def add(self, faults: Sequence[Fault]) -> None:
        """Name new faults in the log, once each.

        Raises:
            SampleFaultError: There are more than the budget allows; it names all met so far.
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
        """Faults met since the last call, for the batch that reports them."""
        with self._lock:
            new, self._unreported = tuple(self._unreported), []
        return new


def replace_faulty(
    samples: np.ndarray, order: np.ndarray, start: int, batch_size: int, known: Container[int]
) -> np.ndarray:
    """Give the places of faulty samples to others, as the module says.

    Args:
        samples: Shape `[b]`: a rank's samples of a global batch, `order[start : start + b]`.
        order: The epoch's order, cut to whole global batches.
        start: Place of the first sample in the order.
        batch_size: Samples in a global batch.
        known: Samples that have failed.

    Returns:
        Shape `[b]`.

    Raises:
        ShardError: All samples that could take a place have failed.
    """
    chosen = samples.copy()
    for row, sample in enumerate(samples.tolist()):
        place, tries = start + row, 0
        while sample in known:
            place, tries = (place + batch_size) % len(order), tries + batch_size
            if tries >= len(order):
                raise ShardError(
                    f"no sample is left to replace sample {samples[row]}: all that stand at its "
                    "place of a batch fail; shard the videos again"
                )
            sample = int(order[place])
        chosen[row] = sample
    return chosen
