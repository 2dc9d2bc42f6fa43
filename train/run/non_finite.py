"""What was not finite in a step: found on the device, read only when a step was left out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strata.dataload.loader import Batch
from strata.distributed import gather_objects
from strata.train.method.model import LossTerms

__all__ = ["Finding", "Report", "mean_terms"]

_SHOWN = 8
"""Samples named in a message; the log has all."""


def mean_terms(parts: Sequence[LossTerms]) -> LossTerms:
    """The mean of each figure over the parts of an accumulated batch."""
    if len(parts) == 1:
        return parts[0]

    def mean(of: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([each[name] for each in of]).mean(0) for name in of[0]}

    return LossTerms(
        total=torch.stack([part.total.detach() for part in parts]).mean(0),
        terms=mean([part.terms for part in parts]),
        health=mean([part.health for part in parts]),
    )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rank's view of one step; what is a tensor stays on the device."""

    step: int
    """Steps done before it."""
    epoch: int
    epoch_step: int
    terms: tuple[str, ...]
    bad_terms: Tensor
    """bool `[number of terms]`: the term was not finite on this rank."""
    samples: np.ndarray
    bad_samples: Tensor
    """bool `[b]`: the sample's embedding was not finite."""
    skipped: Tensor
    """bool, the same on all ranks."""

    @staticmethod
    def of(
        parts: Sequence[LossTerms],
        bad_samples: Sequence[Tensor],
        *,
        skipped: Tensor,
        step: int,
        batch: Batch,
    ) -> "Finding":
        """Gather the flags of a step's parts, without waiting for the device."""
        names = (*parts[0].terms, "total")
        values = torch.stack(
            [torch.stack([*part.terms.values(), part.total.detach()]) for part in parts]
        )
        return Finding(
            step=step,
            epoch=batch.epoch,
            epoch_step=batch.step,
            terms=names,
            bad_terms=~torch.isfinite(values).all(0),
            samples=batch.samples,
            bad_samples=torch.cat(list(bad_samples)),
            skipped=skipped,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What all ranks say of a step that was left out."""

    step: int
    """Its number, from 1."""
    epoch: int
    epoch_step: int
    terms: dict[int, list[str]]
    """By rank, the terms that were not finite; all empty where only the gradient was not."""
    samples: dict[int, list[str]]
    """By rank, the samples whose embeddings were not finite."""
    batches: dict[int, list[str]]
    """By rank, the samples of the batch."""

    @staticmethod
    def gathered(finding: Finding, rank: int, keys: Sequence[str]) -> "Report":
        """Join the ranks' findings. All ranks call it."""
        bad = finding.bad_samples.cpu().numpy()
        mine = (
            rank,
            [t for t, b in zip(finding.terms, finding.bad_terms.tolist(), strict=True) if b],
            [keys[s] for s in finding.samples[bad]],
            [keys[s] for s in finding.samples],
        )
        every = gather_objects(mine)
        return Report(
            step=finding.step + 1,
            epoch=finding.epoch,
            epoch_step=finding.epoch_step,
            terms={r: terms for r, terms, _, _ in every},
            samples={r: samples for r, _, samples, _ in every if samples},
            batches={r: batch for r, _, _, batch in every},
        )

    @property
    def ranks(self) -> list[int]:
        """Where it began: ranks whose own embeddings are at fault, else those with bad terms."""
        return sorted(self.samples) or [r for r, terms in self.terms.items() if terms]

    def concerns(self, rank: int) -> bool:
        """Whether a rank's batch is worth a look; all are where only the gradient is at fault."""
        return not self.ranks or rank in self.ranks

    def __str__(self) -> str:
        """One line: step, terms, ranks, samples."""
        where = f"step {self.step} (epoch {self.epoch}, step {self.epoch_step} of it)"
        terms = sorted({term for some in self.terms.values() for term in some} - {"total"})
        if not self.ranks:
            return f"{where}: the gradient is not finite, though all losses are"
        what = f"loss terms {', '.join(terms)}" if terms else "the total loss"
        places = []
        for rank in self.ranks:
            names = self.samples.get(rank) or self.batches[rank]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            places.append(f"rank {rank} with samples {', '.join(names[:_SHOWN])}{more}")
        return f"{where}: not finite: {what}; on {'; '.join(places)}"
