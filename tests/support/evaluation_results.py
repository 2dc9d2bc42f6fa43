"""Results of evaluations as the protocols make them, from random features of small sets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from strata.dataload.reader import ShardReader
from strata.eval.accuracy import ClassSpace, measure_accuracy
from strata.eval.protocols.features import Features
from strata.eval.protocols.retrieval import RECALL_AT, retrieve
from strata.eval.results import (
    EvaluationResult,
    Kind,
    Measurement,
    PairResult,
    Row,
    Shares,
    classified,
    retrieved,
)
from strata.eval.sets import open_pair


def random_features(reader: ShardReader, seed: int) -> Features:
    values = np.random.default_rng(seed).normal(size=(reader.num_samples, 2, 6))
    levels = {level: values.astype(np.float32) for level in ("low", "mid", "high")}
    return Features(levels, reader.labels, reader.keys, reader.manifest.classes)


def recalls(share: float) -> Shares:
    return {f"R@{k}": share for k in RECALL_AT}


def _features(shards: Path) -> tuple[Features, Features]:
    names = ("train", "test")
    gallery, queries = (
        random_features(ShardReader(shards / n), k) for k, n in enumerate(names, start=1)
    )
    return gallery, queries


def retrieval_measurement(shards: Path, share: float) -> Measurement:
    """Of the shards' folders train and test, with given figures and true details."""
    gallery, queries = _features(shards)
    found = retrieve(queries.videos("high"), gallery.videos("high"), "none", max(RECALL_AT))
    return Measurement(
        rows=(
            Row(name="measured", role="measured", shares=recalls(share)),
            Row(name="untrained, seed 0", role="untrained", shares=recalls(0.2)),
            Row(name="chance", role="chance", shares=recalls(0.1)),
        ),
        variants={"low level, no centring": recalls(share / 2)},
        details=retrieved(queries, gallery, *found, 5),
    )


def classifier_measurement(shards: Path) -> Measurement:
    """Of a classifier with random probabilities and without an untrained baseline."""
    gallery, queries = _features(shards)
    space = ClassSpace.of(gallery.labels, queries.labels, queries.classes, learned=True)
    probabilities = np.random.default_rng(3).dirichlet(np.ones(len(space)), len(queries.keys))
    accuracy = measure_accuracy(probabilities, space.index(queries.labels))
    return Measurement(
        rows=(
            Row(name="measured", role="measured", shares={"Top-1": 0.7}),
            Row(name="chance", role="chance", shares={"Top-1": 0.125}),
        ),
        details=classified(accuracy, space),
    )


def evaluation_result(
    shards: Path, checkpoint: Path, **measured: Sequence[Measurement]
) -> EvaluationResult:
    """A result; of each kind one measurement for each split, all on the same sets."""
    num_splits = len(next(iter(measured.values())))
    pairs = []
    for n in range(num_splits):
        kinds: dict[Kind, Measurement] = {kind: m[n] for kind, m in measured.items()}  # type: ignore[misc]
        sets = open_pair(shards / "train", shards / "test", data="made", split=str(n + 1))
        pairs.append(PairResult(sets=sets, measured=kinds))
    return EvaluationResult(
        name="-".join(measured),
        protocols={kind: f"a protocol of {kind}" for kind in pairs[0].measured},
        is_untrained=False,
        checkpoint=checkpoint,
        checkpoint_digest="c0ffee",
        step=1000,
        settings={"features": {"num_clips": 10}},
        num_ranks=2,
        device="cpu",
        pretraining={"model": {"name": "r3d18"}},
        pretraining_manifest_digest="abad1dea",
        pairs=tuple(pairs),
    )
