"""A result as `report.json` and as a table in the terminal. docs/evaluation.md has the schema."""

import json
import math
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import strata
from strata.config import plain
from strata.eval.accuracy import Accuracy, ClassSpace
from strata.eval.protocols.features import Features
from strata.eval.protocols.retrieval import RECALL_AT

__all__ = [
    "RECORD_SCHEMA",
    "Figures",
    "PairResult",
    "accuracy_result",
    "commit",
    "mean_of",
    "retrieval_result",
    "set_sizes",
    "table",
    "write_record",
]

RECORD_SCHEMA = 1
"""Raised when a field of the record changes its meaning."""

Figures = dict[str, dict[str, float]]
"""Shares in [0, 1]: by row (`measured`, `chance`, ...), by figure (`R@1`, `Top-1`, ...)."""


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """What was measured on one training set and one test set."""

    data: str
    split: str
    sets: Mapping[str, Any]
    """Of `train` and `test`: folder, manifest digest, videos listed and those that are there."""
    figures: Figures
    variants: Figures = field(default_factory=dict)
    """The same figures under other settings, by their description."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """By class, confusion, neighbours, curves."""


@cache
def commit() -> str:
    """The code's commit, where it runs from a checkout."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "not in a checkout"


def accuracy_result(accuracy: Accuracy, space: ClassSpace, keys: Sequence[str]) -> dict[str, Any]:
    """What a page shows of a classifier: by class, confusion matrix, each video's prediction."""
    counts = accuracy.confusion.sum(axis=1)
    return {
        "per_class": [
            {"class": name, "num_test": int(n), "top1": None if math.isnan(value) else value}
            for name, n, value in zip(space.names, counts, accuracy.by_class.tolist(), strict=True)
        ],
        "confusion": {"classes": list(space.names), "counts": accuracy.confusion.tolist()},
        "predictions": {
            key: space.names[k] for key, k in zip(keys, accuracy.predictions, strict=True)
        },
    }


def retrieval_result(
    queries: Features,
    gallery: Features,
    nearest: np.ndarray,
    similarity: np.ndarray,
    shown: int,
) -> dict[str, Any]:
    """What a page shows of a retrieval: by class, confusion of the first, neighbours by query."""
    space = ClassSpace.of(gallery.labels, queries.labels, queries.classes, learned=False)
    truth, first = space.index(queries.labels), space.index(gallery.labels[nearest[:, 0]])
    confusion = np.zeros((len(space), len(space)), np.int64)
    np.add.at(confusion, (truth, first), 1)
    per_class = []
    for k, name in enumerate(space.names):
        mine = truth == k
        hits = gallery.labels[nearest[mine]] == space.present[k]
        row: dict[str, Any] = {"class": name, "num_test": int(mine.sum())}
        for count in RECALL_AT:
            row[f"R@{count}"] = float(hits[:, :count].any(axis=1).mean()) if mine.any() else None
        per_class.append(row)
    neighbours = [
        {
            "query": queries.keys[q],
            "class": queries.classes[queries.labels[q]],
            "nearest": [
                {
                    "key": gallery.keys[g],
                    "class": gallery.classes[gallery.labels[g]],
                    "similarity": float(value),
                    "right": bool(gallery.labels[g] == queries.labels[q]),
                }
                for g, value in zip(nearest[q, :shown], similarity[q, :shown], strict=True)
            ],
        }
        for q in range(len(queries.keys))
    ]
    unmatched = ~np.isin(queries.labels, gallery.labels)
    return {
        "per_class": per_class,
        "confusion": {"classes": list(space.names), "counts": confusion.tolist()},
        "neighbours": neighbours,
        "queries_without_match": int(unmatched.sum()),
    }


def set_sizes(sets: Sequence[Mapping[str, Any]]) -> str:
    """How many videos the lists name and how many were evaluated; of several splits in order."""
    parts = []
    for name, verb in (("train", "used"), ("test", "evaluated")):
        pairs = dict.fromkeys(
            f"listed {s[name]['num_listed']:,}, {verb} {s[name]['num_videos']:,}" for s in sets
        )
        parts.append(f"{name} {' / '.join(pairs)}")
    return "; ".join(parts)


def _incomplete(results: Sequence[PairResult]) -> str:
    """The sentence that heads a report of sets without some of the listed videos; else empty."""
    found = [
        f"{result.data} {result.split} {name}: {s['num_listed'] - s['num_videos']:,} of "
        f"{s['num_listed']:,}"
        for result in results
        for name, s in result.sets.items()
        if s["num_listed"] != s["num_videos"]
    ]
    if not found:
        return ""
    return (
        "INCOMPLETE: listed videos are missing (absent or rejected, by name in samples.jsonl), so "
        f"these figures may not stand beside others': {'; '.join(found)}"
    )


def mean_of(results: Sequence[Figures]) -> tuple[Figures, Figures]:
    """Mean over several results of the figures that all have, and sample standard deviation.

    Returns:
        Means, and deviations; the latter empty for a single result.
    """
    means: Figures = {}
    spreads: Figures = {}
    for row, figures in results[0].items():
        for name in figures:
            values = [r[row][name] for r in results if name in r.get(row, {})]
            if len(values) == len(results):
                means.setdefault(row, {})[name] = statistics.fmean(values)
                if len(values) > 1:
                    spreads.setdefault(row, {})[name] = statistics.stdev(values)
    return means, spreads


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


def write_record(
    path: Path, head: Mapping[str, Any], results: Sequence[PairResult]
) -> dict[str, Any]:
    """Write `report.json`: whole or not at all.

    Args:
        path: The file.
        head: What decided the figures: evaluation, protocol, checkpoint, settings.
        results: One for each training and test set.

    Returns:
        The record.
    """
    by_data: dict[str, Any] = {}
    for data in dict.fromkeys(r.data for r in results):
        mine = [r.figures for r in results if r.data == data]
        mean, spread = mean_of(mine)
        by_data[data] = {"num_splits": len(mine), "mean": mean, "deviation": spread}
    # A mean over data sets would tell nothing.
    only = next(iter(by_data.values())) if len(by_data) == 1 else {"mean": {}, "deviation": {}}
    record = {
        "incomplete": _incomplete(results),
        "schema": RECORD_SCHEMA,
        "strata": strata.__version__,
        "commit": commit(),
        **head,
        "figures": only["mean"],
        "deviation": only["deviation"],
        "by_data": by_data,
        "results": [plain(r) for r in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
    temporary.replace(path)
    return record
