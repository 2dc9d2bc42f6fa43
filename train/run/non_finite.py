"""Reports on non-finite steps: collected on the device, read only if the step was skipped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strata.dataload.loader import Batch
from strata.distributed import gather_objects
from strata.train.method.objective import LossTerms

__all__ = ["NonFiniteFlags", "Report", "mean_terms"]

_SHOWN = 8
"""Number of samples that a message names; the log has all of them."""


def mean_terms(parts: Sequence[LossTerms]) -> LossTerms:
    """Average the loss terms and metrics over the micro-batches of an accumulated batch."""
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
        parts: Sequence[LossTerms],
        bad_samples: Sequence[Tensor],
        *,
        skipped: Tensor,
        step: int,
        batch: Batch,
    ) -> "NonFiniteFlags":
        """Compute the flags of a step from its micro-batches without waiting for the device."""
        names = (*parts[0].terms, "total")
        values = torch.stack(
            [torch.stack([*part.terms.values(), part.total.detach()]) for part in parts]
        )
        return NonFiniteFlags(
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
