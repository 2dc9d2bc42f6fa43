"""The typed result of an evaluation, from which report.json and the page are made.

docs/evaluation.md documents the fields of report.json.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import strata
from strata.code_digest import commit
from strata.eval.accuracy import Accuracy, ClassSpace
from strata.eval.protocols.features import Features
from strata.eval.protocols.retrieval import RECALL_AT
from strata.eval.sets import SetPair
from strata.files import write_atomic

__all__ = [
    "REPORT_SCHEMA",
    "ClassCounts",
    "Classified",
    "Cue",
    "Cues",
    "EvaluationResult",
    "Figures",
    "Kind",
    "Measurement",
    "PairResult",
    "Retrieved",
    "Role",
    "Row",
    "Shares",
    "classified",
    "mean_of",
    "retrieved",
    "write_json",
]

REPORT_SCHEMA = 1
"""Raised when a field of report.json changes its meaning."""

Kind = Literal["retrieval", "linear", "finetune", "temporal_cam"]
Role = Literal["measured", "untrained", "training", "chance"]
Shares = dict[str, float]
"""Shares in [0, 1] by figure (`R@1`, `Top-1`, ...)."""
Figures = dict[str, Shares]
"""Shares by the name of their row."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one network, of chance, or of the training set."""

    name: str
    role: Role
    shares: Shares


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """How the test videos of each class were predicted."""

    names: tuple[str, ...]
    """K class names."""
    shares: Mapping[str, Sequence[float | None]]
    """By figure: K shares in [0, 1], None for a class without test videos. The page shows the
    first figure."""
    confusion: np.ndarray
    """Shape `[K, K]`: test videos by class (row) and prediction (column)."""

    def __post_init__(self) -> None:
        if self.confusion.shape != (len(self.names), len(self.names)):
            raise ValueError(
                f"a confusion matrix of shape {self.confusion.shape} for {len(self.names)} classes"
            )

    @property
    def num_test(self) -> list[int]:
        """Test videos of each class."""
        return self.confusion.sum(axis=1).tolist()

    def to_json(self) -> dict[str, Any]:
        """`per_class` and `confusion` of the report."""
        rows = [
            {"class": name, "num_test": count, **{f: v[k] for f, v in self.shares.items()}}
            for k, (name, count) in enumerate(zip(self.names, self.num_test, strict=True))
        ]
        confusion = {"classes": list(self.names), "counts": self.confusion.tolist()}
        return {"per_class": rows, "confusion": confusion}


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """The gallery videos nearest to each query; N queries, `shown` neighbours each."""

    by_class: ClassCounts
    """Of the nearest neighbour."""
    nearest: np.ndarray
    """Shape `[N, shown]`: samples of the training set, nearest first."""
    similarity: np.ndarray
    """Shape `[N, shown]`: cosines."""
    num_unmatched: int
    """Queries whose class has no video in the gallery."""

    def to_json(self, sets: SetPair) -> dict[str, Any]:
        """`details` of the report."""
        gallery, queries = sets.train, sets.test
        names, queries_keys, gallery_keys = queries.manifest.classes, queries.keys, gallery.keys
        neighbours = [
            {
                "query": queries_keys[q],
                "class": names[queries.labels[q]],
                "nearest": [
                    {
                        "key": gallery_keys[g],
                        "class": names[gallery.labels[g]],
                        "similarity": float(value),
                        "right": bool(gallery.labels[g] == queries.labels[q]),
                    }
                    for g, value in zip(self.nearest[q], self.similarity[q], strict=True)
                ],
            }
            for q in range(len(self.nearest))
        ]
        more = {"neighbours": neighbours, "queries_without_match": self.num_unmatched}
        return self.by_class.to_json() | more


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The predictions of a classifier for N test videos."""

    by_class: ClassCounts
    predictions: tuple[str, ...]
    """N class names."""
    run: Path | None = None
    """Folder of the training; None for the cached probe, which has none."""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of the training: `step`, `epoch`, `loss` (nats) and `top1`."""

    def to_json(self, sets: SetPair) -> dict[str, Any]:
        """`details` of the report."""
        found = self.by_class.to_json()
        found["predictions"] = dict(zip(sets.test.keys, self.predictions, strict=True))
        if self.run is not None:
            found |= {"run": str(self.run), "curves": dict(self.curves)}
        return found


@dataclass(frozen=True, kw_only=True)
class Cue:
    """Where a network saw the direction of time in a video."""

    key: str
    label: str
    num_clips: int
    num_frames: int
    logit: float
    """Mean over the clips; above 0 for the original order."""
    logit_reversed: float
    """The same of the reversed clips."""
    picture: Path
    video: Path
    sheet: bytes
    """JPEG: frames, and the class activation maps over them."""

    def to_json(self) -> dict[str, Any]:
        """One of `cues` of the report."""
        return {
            "key": self.key,
            "class": self.label,
            "num_clips": self.num_clips,
            "num_frames": self.num_frames,
            "logit": self.logit,
            "logit_reversed": self.logit_reversed,
            "picture": str(self.picture),
            "video": str(self.video),
        }


@dataclass(frozen=True, kw_only=True)
class Cues:
    """The activation maps of some test videos."""

    shown: tuple[Cue, ...]

    def to_json(self, sets: SetPair) -> dict[str, Any]:
        """`details` of the report."""
        return {"cues": [cue.to_json() for cue in self.shown]}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of one protocol on one pair of sets."""

    rows: tuple[Row, ...]
    variants: Figures = field(default_factory=dict)
    """The same figures under other settings, by their description."""
    details: Retrieved | Classified | Cues | None = None
    """Of the first measured network."""

    def values(self, role: Role, figure: str) -> list[float]:
        """One figure of all rows of a role."""
        return [row.shares[figure] for row in self.rows if row.role == role]

    @property
    def measured(self) -> Row:
        """The first measured network."""
        return next(row for row in self.rows if row.role == "measured")


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """All measurements on one training set and one test set."""

    sets: SetPair
    measured: Mapping[Kind, Measurement]

    @property
    def figures(self) -> Figures:
        """Figures of all protocols by the row's name."""
        found: Figures = {}
        for measurement in self.measured.values():
            for row in measurement.rows:
                found[row.name] = found.get(row.name, {}) | row.shares
        return found

    @property
    def variants(self) -> Figures:
        """Variants of all protocols."""
        return {k: v for m in self.measured.values() for k, v in m.variants.items()}

    def to_json(self) -> dict[str, Any]:
        """One of `results` of the report."""
        details: dict[str, Any] = {
            kind: {} if m.details is None else m.details.to_json(self.sets)
            for kind, m in self.measured.items()
        }
        return {
            "data": self.sets.data,
            "split": self.sets.split,
            "sets": self.sets.facts(),
            "figures": self.figures,
            "variants": self.variants,
            "details": details if len(details) > 1 else next(iter(details.values())),
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The result of an evaluation with everything that determined it."""

    name: str
    """Like `linear-cached`; different for each report of a run."""
    protocols: Mapping[Kind, str]
    """Each protocol in words."""
    is_untrained: bool
    """Whether the measured network is an untrained one."""
    checkpoint: Path
    checkpoint_digest: str
    step: int
    """Of the checkpoint."""
    settings: Mapping[str, Any]
    """Of the evaluation, resolved; plain values."""
    num_ranks: int
    device: str
    pretraining: Mapping[str, Any]
    """Configuration of the pretraining; plain values."""
    pretraining_manifest_digest: str
    pairs: tuple[PairResult, ...]
    remark: str = ""
    """The user's sentence on the page, above the figures."""

    @property
    def protocol(self) -> str:
        """All protocols in words."""
        return "; ".join(self.protocols.values())

    @property
    def by_data(self) -> dict[str, list[PairResult]]:
        """The pairs of each data set: its splits."""
        found: dict[str, list[PairResult]] = {}
        for pair in self.pairs:
            found.setdefault(pair.sets.data, []).append(pair)
        return found

    @property
    def incomplete(self) -> str:
        """The sentence that heads a report of sets that lack listed videos; else empty."""
        lacking = [
            f"{pair.sets.data} {pair.sets.split} {name}: "
            f"{facts['num_listed'] - facts['num_videos']:,} of {facts['num_listed']:,}"
            for pair in self.pairs
            for name, facts in pair.sets.facts().items()
            if facts["num_listed"] != facts["num_videos"]
        ]
        if not lacking:
            return ""
        return (
            "INCOMPLETE: listed videos are missing (absent or rejected, by name in "
            "samples.jsonl), so these figures may not stand beside others': " + "; ".join(lacking)
        )

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        by_data = {}
        for data, pairs in self.by_data.items():
            mean, deviation = mean_of([pair.figures for pair in pairs])
            by_data[data] = {"num_splits": len(pairs), "mean": mean, "deviation": deviation}
        # A mean over data sets has no meaning.
        only = next(iter(by_data.values())) if len(by_data) == 1 else {"mean": {}, "deviation": {}}
        both = {"protocols": dict(self.protocols)} if len(self.protocols) > 1 else {}
        return {
            "incomplete": self.incomplete,
            "schema": REPORT_SCHEMA,
            "strata": strata.__version__,
            "commit": commit(),
            "evaluation": self.name,
            "protocol": self.protocol,
            **both,
            "checkpoint": str(self.checkpoint),
            "checkpoint_digest": self.checkpoint_digest,
            "step": self.step,
            "settings": self.settings,
            "num_ranks": self.num_ranks,
            "device": self.device,
            "pretraining": self.pretraining,
            "pretraining_manifest_digest": self.pretraining_manifest_digest,
            "figures": only["mean"],
            "deviation": only["deviation"],
            "by_data": by_data,
            "results": [pair.to_json() for pair in self.pairs],
        }


def classified(
    accuracy: Accuracy,
    space: ClassSpace,
    *,
    run: Path | None = None,
    curves: Mapping[str, Sequence[float]] | None = None,
) -> Classified:
    """The details of a classifier; the arguments are fields of `Classified`."""
    shares = [None if math.isnan(value) else value for value in accuracy.by_class.tolist()]
    return Classified(
        by_class=ClassCounts(
            names=space.names, shares={"top1": shares}, confusion=accuracy.confusion
        ),
        predictions=tuple(space.names[k] for k in accuracy.predictions),
        run=run,
        curves=curves or {},
    )


def retrieved(
    queries: Features, gallery: Features, nearest: np.ndarray, similarity: np.ndarray, shown: int
) -> Retrieved:
    """The details of a retrieval.

    Args:
        queries: Of the test set.
        gallery: Of the training set.
        nearest: Shape `[N, max(RECALL_AT)]` or fewer columns: gallery samples, nearest first.
        similarity: Their cosines.
        shown: How many neighbours of each query the report names.
    """
    space = ClassSpace.of(gallery.labels, queries.labels, queries.classes, learned=False)
    truth, first = space.index(queries.labels), space.index(gallery.labels[nearest[:, 0]])
    confusion = np.zeros((len(space), len(space)), np.int64)
    np.add.at(confusion, (truth, first), 1)
    hits = gallery.labels[nearest] == queries.labels[:, None]
    shares: dict[str, list[float | None]] = {}
    for count in RECALL_AT:
        found = hits[:, :count].any(axis=1)
        shares[f"R@{count}"] = [
            float(found[truth == k].mean()) if (truth == k).any() else None
            for k in range(len(space))
        ]
    return Retrieved(
        by_class=ClassCounts(names=space.names, shares=shares, confusion=confusion),
        nearest=nearest[:, :shown],
        similarity=similarity[:, :shown],
        num_unmatched=int((~np.isin(queries.labels, gallery.labels)).sum()),
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


def write_json(result: EvaluationResult, path: Path) -> None:
    """Write report.json, atomically; folders are made.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result.to_json(), indent=1, allow_nan=False))
