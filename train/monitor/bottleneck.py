"""Find the bottleneck of a run from measured times: data, compute, network, host, checkpoint.

All ranks wait for the slowest, so the shares are those of the rank whose own time (the interval
without communication) is the largest. The other ranks' time in collectives is mostly waiting for
it, so only the communication of the slowest rank measures the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

__all__ = ["DATA_PARTS", "PARTS", "Bottleneck", "RankTimes", "Utilisation", "find_bottleneck"]

PARTS = ("data", "compute", "communication", "host", "checkpoint")
DATA_PARTS = ("read", "decode", "graph")
_STRAGGLES = 1.2
"""Own time relative to the median of the others from which a rank is a straggler."""
_SATURATED = 0.9
"""Utilisation from which a decoding engine of the GPU counts as the loader's bottleneck."""


_DATA_WORDS = {
    "read": "storage",
    "decode": "decoding: an engine is saturated",
    "graph": "decoding and augmentation",
}


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """One rank's seconds in an interval; those of `PARTS` add up to the interval."""

    data_s: float
    """Seconds in which the device (or CPU) was idle because the batch was not ready."""
    compute_s: float
    """Seconds of forward, backward and update, without communication."""
    communication_s: float
    """Seconds in collectives, including the wait for slower ranks."""
    host_s: float
    """The remaining seconds: Python, reports, late kernel launches."""
    checkpoint_s: float
    """Seconds in which training waited for a checkpoint."""
    optimizer_s: float
    """The part of `compute_s` in the optimizer's update."""
    read_s: float = 0.0
    """Seconds of the loader's thread to read coded bytes."""
    graph_s: float = 0.0
    """Seconds of the loader's thread to decode and augment."""
    num_steps: float = 0.0

    @property
    def wall_s(self) -> float:
        """The interval."""
        return sum(getattr(self, f"{part}_s") for part in PARTS)

    @property
    def own_s(self) -> float:
        """Seconds without communication: the time that this rank would need alone."""
        return self.wall_s - self.communication_s

    @property
    def data_wait_ratio(self) -> float:
        """Share of the interval spent waiting for the loader."""
        return self.data_s / (self.wall_s or 1.0)

    def rate(self, items_per_step: int) -> float:
        """Items per second."""
        return items_per_step * self.num_steps / self.wall_s if self.wall_s > 0 else 0.0

    def values(self) -> list[float]:
        """The times as numbers, to be gathered from the ranks."""
        return [getattr(self, f.name) for f in fields(self)]

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "RankTimes":
        """The inverse of `values`."""
        return cls(**{f.name: v for f, v in zip(fields(cls), values, strict=True)})

    def __add__(self, other: "RankTimes") -> "RankTimes":
        """Sum of two intervals."""
        pairs = zip(self.values(), other.values(), strict=True)
        return RankTimes.from_values([a + b for a, b in pairs])


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Utilisation of the GPU's engines, from 0 to 1; None if unknown."""

    gpu: float | None = None
    decoder: float | None = None
    jpeg: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """The bottleneck of an interval, with the times that it was derived from."""

    bound_by: str
    """One of `PARTS`."""
    data_by: str
    """The slowest part of the loader, one of `DATA_PARTS`: `read`; `graph`, which decodes and
    augments; or `decode`, if a decoding engine is saturated."""
    shares: dict[str, float]
    """Shares of the slowest rank's time by part; they sum to 1."""
    slowest_rank: int
    straggler_ratio: float | None
    """Own time of the slowest rank relative to the median of the others; None on one rank."""
    optimizer_share: float
    """Share of the interval in the optimizer's update, which is part of compute."""
    read_share: float
    """Share of the interval in which the slowest rank's loader read coded bytes."""
    graph_share: float
    """Share of the interval in which the slowest rank's loader decoded and augmented."""
    utilisation: Utilisation

    @property
    def straggles(self) -> bool:
        """Whether the other ranks wait for one slow rank."""
        return self.straggler_ratio is not None and self.straggler_ratio >= _STRAGGLES

    def text(self) -> str:
        """The bottleneck and its numbers as one line of text."""
        what = self.bound_by
        if what == "data":
            what += f" ({_DATA_WORDS[self.data_by]})"
        shares = ", ".join(f"{part} {share:.0%}" for part, share in self.shares.items())
        shares += f" (compute with the optimizer's {self.optimizer_share:.0%})"
        line = (
            f"bound by {what}: {shares}; the loader reads {self.read_share:.0%} and decodes "
            f"{self.graph_share:.0%} of the time"
        )
        for name, value in vars(self.utilisation).items():
            if value is not None:
                line += f"; {name} busy {value:.0%}"
        if self.straggler_ratio is not None:
            line += f"; slowest rank {self.slowest_rank}, {self.straggler_ratio:.2f} of the others"
            line += ", which wait for it" if self.straggles else ""
        return line


def find_bottleneck(
    ranks: Sequence[RankTimes], utilisation: Utilisation | None = None
) -> Bottleneck:
    """Find the bottleneck of an interval.

    Args:
        ranks: Times of all ranks, in their order.
        utilisation: Utilisation of this rank's GPU in the interval. If the GPU was idle in time
            measured as compute, kernels were launched late and that time counts as the host's.
    """
    utilisation = utilisation or Utilisation()
    slowest = max(range(len(ranks)), key=lambda r: ranks[r].own_s)
    times = ranks[slowest]
    wall_s = times.wall_s or 1.0
    shares = {part: getattr(times, f"{part}_s") / wall_s for part in PARTS}
    if utilisation.gpu is not None:
        idle = shares["compute"] + shares["communication"] - utilisation.gpu
        late = min(max(idle, 0.0), shares["compute"])
        shares["compute"] -= late
        shares["host"] += late
    data_by = "read"
    if times.graph_s >= times.read_s:
        engines = max(utilisation.decoder or 0.0, utilisation.jpeg or 0.0)
        data_by = "decode" if engines >= _SATURATED else "graph"
    others = [r.own_s for n, r in enumerate(ranks) if n != slowest]
    return Bottleneck(
        bound_by=max(shares, key=lambda part: shares[part]),
        data_by=data_by,
        shares=shares,
        slowest_rank=slowest,
        straggler_ratio=times.own_s / max(median(others), 1e-9) if others else None,
        optimizer_share=times.optimizer_s / wall_s,
        read_share=times.read_s / wall_s,
        graph_share=times.graph_s / wall_s,
        utilisation=utilisation,
    )
