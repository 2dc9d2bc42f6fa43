"""Steps that are not finite: flags on the device, reports, and how many a run may skip."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strata.dataload.loader import Batch
from strata.distributed import World, gather_objects
from strata.errors import NotFiniteError
from strata.logs import get_logger
from strata.telemetry.metrics import Metrics
from strata.train.engine import Engine

__all__ = ["NonFiniteFlags", "Report", "SkippedSteps"]

logger = get_logger(__name__)

_SHOWN = 8
"""Number of samples that a message names; the log has all of them."""


@dataclass(frozen=True, kw_only=True)
class NonFiniteFlags:
    """Non-finite flags of one step on one rank; the tensors stay on the device."""

    step: int
    """Number of steps done before this one."""
    epoch: int
    epoch_step: int
    terms: tuple[str, ...]
    bad_terms: Tensor
    """bool `[number of terms]`: the term was not finite on this rank."""
    samples: np.ndarray
    bad_samples: Tensor
    """bool `[b]`: the sample's embedding was not finite."""
    skipped: Tensor
    """bool, whether the gradient is not finite; the same on all ranks."""

    @staticmethod
    def of(
        terms: Mapping[str, Tensor],
        bad_samples: Tensor,
        *,
        skipped: Tensor,
        step: int,
        batch: Batch,
    ) -> "NonFiniteFlags":
        """Compute the flags of a step without waiting for the device.

        Args:
            terms: Loss terms by name, each of the shape `[parts of the batch]`.
            bad_samples: bool `[b]`: the sample's embedding is not finite.
            skipped: bool, whether the step was skipped.
            step: Steps done before this one.
            batch: The batch of the step.
        """
        values = torch.stack(list(terms.values()))
        return NonFiniteFlags(
            step=step,
            epoch=batch.epoch,
            epoch_step=batch.step,
            terms=tuple(terms),
            bad_terms=~torch.isfinite(values).all(1),
            samples=batch.samples,
            bad_samples=bad_samples,
            skipped=skipped,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The joint report of all ranks on a skipped step."""

    step: int
    """Number of the step, from 1."""
    epoch: int
    epoch_step: int
    terms: dict[int, list[str]]
    """Non-finite loss terms of each rank; all empty if only the gradient was not finite."""
    samples: dict[int, list[str]]
    """Samples of each rank with embeddings that were not finite."""
    batches: dict[int, list[str]]
    """All samples of each rank's batch."""

    @staticmethod
    def gathered(flags: NonFiniteFlags, rank: int, keys: Sequence[str]) -> "Report":
        """Join the flags of all ranks. All ranks call it."""
        bad = flags.bad_samples.cpu().numpy()
        mine = (
            rank,
            [t for t, b in zip(flags.terms, flags.bad_terms.tolist(), strict=True) if b],
            [keys[s] for s in flags.samples[bad]],
            [keys[s] for s in flags.samples],
        )
        every = gather_objects(mine)
        return Report(
            step=flags.step + 1,
            epoch=flags.epoch,
            epoch_step=flags.epoch_step,
            terms={r: terms for r, terms, _, _ in every},
            samples={r: samples for r, _, samples, _ in every if samples},
            batches={r: batch for r, _, _, batch in every},
        )

    @property
    def ranks(self) -> list[int]:
        """Ranks with non-finite embeddings; if there are none, ranks with non-finite terms."""
        return sorted(self.samples) or [r for r, terms in self.terms.items() if terms]

    def concerns(self, rank: int) -> bool:
        """Whether a rank's batch may be the cause; all may if only the gradient is not finite."""
        return not self.ranks or rank in self.ranks

    def __str__(self) -> str:
        """One line with step, terms, ranks and samples."""
        where = f"step {self.step} (epoch {self.epoch}, step {self.epoch_step} of it)"
        terms = sorted({term for some in self.terms.values() for term in some} - {"total"})
        if not self.ranks:
            return f"{where}: the gradient is not finite, although all losses are"
        what = f"loss terms {', '.join(terms)}" if terms else "the total loss"
        places = []
        for rank in self.ranks:
            names = self.samples.get(rank) or self.batches[rank]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            places.append(f"rank {rank} with samples {', '.join(names[:_SHOWN])}{more}")
        return f"{where}: not finite: {what}; on {'; '.join(places)}"


class SkippedSteps:
    """Counts and reports the steps that a run skipped, and ends a run that skips too many.

    Args:
        engine: Which skips a step whose loss or gradient is not finite.
        allowed: Steps of the run that may be skipped.
        keys: Names of the samples.
        world: This rank and its peers.
        metrics: Receives the count and the reports.
        settings: Prefix of the settings that the advice of an error names, such as `engine`.
        dump: Called with the report on a step whose batch this rank may be the cause of.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        allowed: int,
        keys: Sequence[str],
        world: World,
        metrics: Metrics,
        settings: str,
        dump: Callable[[Report], None] | None = None,
    ) -> None:
        self._engine, self._allowed, self._keys = engine, allowed, keys
        self._world, self._metrics, self._dump = world, metrics, dump
        self._settings = settings
        self._flags: list[NonFiniteFlags] = []
        self._seen = 0

    def note(self, flags: NonFiniteFlags) -> None:
        """Keep the flags of a step until `judge` reads them."""
        self._flags.append(flags)

    def judge(self, before: int) -> int:
        """Read the flags since the last call; all ranks call it. Waits for the device.

        Args:
            before: Steps that the run had skipped at the last call.

        Returns:
            Steps that it has skipped now.

        Raises:
            NotFiniteError: More than allowed.
        """
        flags, self._flags = self._flags, []
        new = self._engine.num_skipped() - self._seen
        if new == 0:
            return before
        self._seen += new
        self._metrics.add("strata_skipped_steps_total", new)
        reports = [
            Report.gathered(each, self._world.rank, self._keys)
            for each in flags
            if bool(each.skipped)
        ]
        for report in reports:
            self._metrics.record("skipped_step", **dataclasses.asdict(report))
            logger.warning("%s; the step was skipped", report)
            if self._dump is not None and report.concerns(self._world.rank):
                self._dump(report)
        if before + new > self._allowed:
            name = self._settings
            clip = ", with --engine.grad_clip 1" if name == "engine" else ""
            raise NotFiniteError(
                f"{reports[0]}; {before + new} steps were skipped, {name}.max_skipped_steps is "
                f"{self._allowed}. Resume from the last checkpoint with a smaller "
                f"--{name}.learning_rate{clip} or with more --{name}.max_skipped_steps"
            )
        return before + new
