"""Draw the probe's figures of one or several pretrainings over their steps.

python tools/learning_curve.py --runs '{paper: runs/a, difference: runs/b}' --out curve.svg
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import msgspec
from matplotlib.figure import Figure

from strata.config import parse_config
from strata.errors import ConfigError, exit_with_one_line
from strata.files import open_atomic
from strata.logs import read_json_lines

__all__ = ["CurveCommand", "Learning", "draw", "main", "read_learning"]

_PANELS = {"R@1": "Retrieval R@1, %", "linear": "Linear Top-1, %"}


@dataclass(frozen=True, kw_only=True)
class CurveCommand:
    """Settings of the drawing."""

    runs: dict[str, Path]
    """Folders of pretrainings with `probe.every_epochs`, by the name that the picture shows."""
    out: Path
    """The picture, an SVG."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("runs is empty; use for instance --runs '{paper: runs/a}'")


@dataclass(frozen=True, kw_only=True)
class Learning:
    """A run's curves: points of step and percent, by the figure's name."""

    points: dict[str, list[tuple[int, float]]]
    chance: float
    """R@1 at chance, in percent."""


class _Recall(msgspec.Struct, frozen=True):
    r1: float = msgspec.field(name="R@1")


class _Probe(msgspec.Struct, frozen=True):
    """The fields of an online probe's record that are drawn; shares in [0, 1]."""

    step: int
    recall: _Recall
    chance: _Recall
    accuracy: dict[str, float | None] = msgspec.field(default_factory=dict)


def read_learning(run: Path) -> Learning:
    """Read the probe's records of a run's log; repeated ones count once.

    Raises:
        ConfigError: The run has no log, or its log no valid record of a probe.
    """
    log = run / "log.jsonl"
    if not log.is_file():
        raise ConfigError(f"{log} is not there; give the folder of a pretraining")
    records, _ = read_json_lines(log)
    try:
        found = [msgspec.convert(r, _Probe) for r in records if r["kind"] == "probe"]
    except msgspec.ValidationError as error:
        raise ConfigError(f"{log} has a record of a probe that is not valid: {error}") from error
    probes = {probe.step: probe for probe in found}
    if not probes:
        raise ConfigError(f"{log} has no record of a probe; pretrain with --probe.every_epochs")
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in _PANELS}
    for step in sorted(probes):
        # A log of before the classifiers has retrieval alone.
        shares = {"R@1": probes[step].recall.r1, "linear": probes[step].accuracy.get("linear")}
        for name, share in shares.items():
            if share is not None:
                points[name].append((step, 100 * share))
    return Learning(points=points, chance=100 * probes[max(probes)].chance.r1)


def draw(runs: dict[str, Learning]) -> Figure:
    """A panel for each figure that was measured, a line for each run, chance dashed."""
    panels = {k: v for k, v in _PANELS.items() if any(run.points[k] for run in runs.values())}
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for number, (label, run) in enumerate(runs.items()):
            steps, values = zip(*run.points[name], strict=True) if run.points[name] else ((), ())
            axis.plot(steps, values, marker="o", ms=3, label=label, c=f"C{number}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step of pretraining")
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    chance = math.fsum(run.chance for run in runs.values()) / len(runs)
    axes[0].axhline(chance, ls="--", c="gray", lw=1, label="chance")
    axes[0].legend(fontsize=8)
    return figure


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    command = parse_config(
        CurveCommand, argv, prog="tools/learning_curve.py", description="Draw learning curves."
    )
    figure = draw({name: read_learning(run) for name, run in command.runs.items()})
    # The same picture has the same bytes.
    with (
        matplotlib.rc_context({"svg.hashsalt": "strata"}),
        open_atomic(command.out) as file,
    ):
        figure.savefig(file, format="svg", metadata={"Date": None})
    print(f"wrote {command.out}")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
