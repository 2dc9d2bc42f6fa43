"""The figures of a result as tables: for the page, and as text for the terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from strata.eval.results import EvaluationResult, Figures, Kind, PairResult, mean_of

__all__ = [
    "KIND_TITLES",
    "FigureLine",
    "figure_lines",
    "full_text",
    "pairs_title",
    "set_sizes",
    "share_range",
    "summary",
    "table",
    "wilson",
]

KIND_TITLES: dict[Kind, str] = {
    "retrieval": "Retrieval",
    "linear": "Linear probe",
    "finetune": "Finetune",
    "temporal_cam": "Original or reversed",
}
"""What the figures of each protocol are called."""


@dataclass(frozen=True, kw_only=True)
class FigureLine:
    """One figure of one data set, beside its baselines; shares are in [0, 1]."""

    name: str
    """Like `Retrieval R@1`."""
    data: str
    """The data set, its splits, and how many videos were listed and evaluated."""
    measured: tuple[float, ...]
    """Of each network and split."""
    untrained: tuple[float, ...]
    """Of each untrained network of the same architecture, and split."""
    chance: float
    """Mean over the splits."""
    num_test: int
    """Test videos, of all splits together."""

    def interval(self, role: Literal["measured", "untrained"]) -> tuple[float, float] | None:
        """The 95 % interval that this number of test videos leaves, around the mean; None without.

        Wilson's score interval of a share; it does not cover the choice of seeds.
        """
        values = getattr(self, role)
        return wilson(statistics.fmean(values), self.num_test) if values else None

    @property
    def lead(self) -> str:
        """A sentence if the pretrained network is not ahead of the untrained one; else empty."""
        mine, theirs = self.interval("measured"), self.interval("untrained")
        if mine is None or theirs is None:
            return ""
        ahead = statistics.fmean(self.measured) - statistics.fmean(self.untrained)
        if ahead <= 0:
            return f"{self.name}: pretrained is not ahead of untrained."
        if mine[0] <= theirs[1]:
            return (
                f"{self.name}: pretrained is ahead of untrained by {100 * ahead:.1f} points, which "
                f"{self.num_test:,} test videos are too few to establish."
            )
        return ""


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of `count` independent trials."""
    z = 1.96
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return max(centre - half, 0.0), min(centre + half, 1.0)


def figure_lines(result: EvaluationResult, kind: Kind) -> list[FigureLine]:
    """The figures that a protocol measured, for each data set."""
    lines = []
    for pairs in result.by_data.values():
        found = [pair.measured[kind] for pair in pairs]
        sizes = set_sizes([pair.sets.facts() for pair in pairs])
        for figure in found[0].measured.shares:
            lines.append(
                FigureLine(
                    name=f"{KIND_TITLES[kind]} {figure}",
                    data=f"{pairs_title(pairs)}; {sizes}",
                    measured=tuple(v for m in found for v in m.values("measured", figure)),
                    untrained=tuple(v for m in found for v in m.values("untrained", figure)),
                    chance=statistics.fmean(v for m in found for v in m.values("chance", figure)),
                    num_test=sum(pair.sets.facts()["test"]["num_videos"] for pair in pairs),
                )
            )
    return lines


def pairs_title(pairs: Sequence[PairResult]) -> str:
    """A data set and its split or splits, in words."""
    first = pairs[0].sets
    if len(pairs) == 1:
        return first.title
    return f"{first.data}, mean of splits {', '.join(pair.sets.split for pair in pairs)}"


def share_range(values: Sequence[float]) -> str:
    """The mean in percent, with the lowest and the highest where there are several."""
    if not values:
        return "not measured"
    mean = f"{statistics.fmean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def set_sizes(sets: Sequence[Mapping[str, Any]]) -> str:
    """How many videos the lists name and how many were evaluated; of several splits in order."""
    parts = []
    for name, verb in (("train", "used"), ("test", "evaluated")):
        pairs = dict.fromkeys(
            f"listed {s[name]['num_listed']:,}, {verb} {s[name]['num_videos']:,}" for s in sets
        )
        parts.append(f"{name} {' / '.join(pairs)}")
    return "; ".join(parts)


def table(figures: Figures, spreads: Figures | None = None, indent: str = "  ") -> str:
    """Figures as text, one row a line."""
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    width = max([len(row) for row in figures] + [8])
    lines = [indent + " " * width + "".join(f"{name:>10}" for name in names)]
    for row, values in figures.items():
        cells = [f"{values[n]:10.2%}" if n in values else f"{'':>10}" for n in names]
        line = indent + f"{row:<{width}}" + "".join(cells)
        if spreads and row in spreads:
            first = next(iter(spreads[row]))
            line += f"   (deviation of {first}: {spreads[row][first]:.2%})"
        lines.append(line)
    return "\n".join(lines)


def summary(result: EvaluationResult) -> str:
    """Each figure beside its baselines, as text."""
    rows = [("", "pretrained", "untrained", "chance")]
    for kind in result.protocols:
        for line in figure_lines(result, kind):
            ranges = (share_range(line.measured), share_range(line.untrained))
            rows.append((line.name, *ranges, f"{line.chance:.1%}"))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    text = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def full_text(result: EvaluationResult) -> str:
    """All figures of a result as text."""
    lines = [result.incomplete] if result.incomplete else []
    lines += [f"{result.name} of {result.checkpoint}", f"  protocol: {result.protocol}"]
    for pair in result.pairs:
        lines.append(f"  {pair.sets.data} {pair.sets.split}: {set_sizes([pair.sets.facts()])}")
        lines.append(table(pair.figures, indent="    "))
        if pair.variants:
            lines.append(table(pair.variants, indent="    "))
    for data, pairs in result.by_data.items():
        if len(pairs) > 1:
            lines.append(f"  {data}, mean of {len(pairs)} splits")
            lines.append(table(*mean_of([pair.figures for pair in pairs]), indent="    "))
    return "\n".join([*lines, "", summary(result)])
