"""From a command's settings to a result: load encoders, extract features, measure, write."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from strata.config import plain
from strata.dataload.reader import ShardReader
from strata.dataload.videos import refuse_mixed_payloads
from strata.distributed import World, all_equal, current_world, join_world, leave_world
from strata.errors import CheckpointError, ConfigError
from strata.eval.features import FeatureConfig, Features, extract_features
from strata.eval.linear import LinearConfig, linear_probe
from strata.eval.retrieval import (
    RECALL_AT,
    RetrievalConfig,
    chance_recall,
    recall_at,
    retrieve,
)
from strata.train.checkpoint import (
    RunState,
    backbone_config,
    find_checkpoint,
    load_backbone,
    read_state,
)
from strata.train.engine import EngineConfig, choose_device
from strata.train.models.backbones import Backbone, build_backbone

__all__ = [
    "CompareEvaluation",
    "LinearEvaluation",
    "RetrievalEvaluation",
    "run_compare",
    "run_linear",
    "run_retrieval",
]


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """What all evaluations share."""

    checkpoint: Path
    """A run's folder, whose newest checkpoint is taken, or a checkpoint's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """How a video becomes features."""
    out: Path | None = None
    """File for the result; by default under the checkpoint's run, in eval/."""


@dataclass(frozen=True, kw_only=True)
class _OneNetwork(_Evaluation):
    """An evaluation of one network."""

    weights: Literal["pretrained", "untrained"] = "pretrained"
    """untrained draws the same network anew from the seed: the baseline."""
    seed: int = 0
    """Of the untrained weights."""

    @property
    def untrained_seed(self) -> int | None:
        """The seed of an untrained network, or None for the checkpoint's weights."""
        return self.seed if self.weights == "untrained" else None


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation(_OneNetwork):
    """Settings of `eval/main.py retrieval`."""

    gallery: Path
    """Shards of the training set."""
    query: Path
    """Shards of the test set."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """What the protocol leaves open."""


@dataclass(frozen=True, kw_only=True)
class LinearEvaluation(_OneNetwork):
    """Settings of `eval/main.py linear`."""

    train: Path
    """Shards of the training set."""
    test: Path
    """Shards of the test set."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """What the protocol leaves open."""


@dataclass(frozen=True, kw_only=True)
class CompareEvaluation(_Evaluation):
    """Settings of `eval/main.py compare`: both protocols, beside untrained networks and chance."""

    train: Path
    """Shards of the training set: the gallery, and what the probe learns from."""
    test: Path
    """Shards of the test set."""
    untrained_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the untrained networks."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """What retrieval leaves open."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """What the linear probe leaves open."""


class _Bench:
    """A formed world, a checkpoint, and a way to the features of its network or an untrained one.

    Args:
        config: The evaluation's settings.
        found: The checkpoint's folder.
        world: This rank and its peers.
        device: Where to compute.
    """

    def __init__(
        self, config: _Evaluation, found: Path, world: World, device: torch.device
    ) -> None:
        self.world, self._device, self._found = world, device, found
        self.state: RunState = read_state(found)
        data = self.state.config["data"]
        self.features = dataclasses.replace(
            config.features,
            size=config.features.size or data["size"],
            clip_frames=config.features.clip_frames or data["clips"]["clip_frames"],
        )
        self._config = config
        self._results = found.parent.parent / "eval"
        self._identity = (found / "complete.json").read_text(encoding="utf-8")
        all_equal("checkpoint", self._identity)

    def _network(self, untrained_seed: int | None) -> tuple[Backbone, str]:
        """An encoder on the device, and what identifies its weights."""
        if untrained_seed is None:
            return load_backbone(self._found).to(self._device), self._identity
        torch.manual_seed(untrained_seed)
        backbone = build_backbone(backbone_config(self.state.config))
        identity = json.dumps([self.state.config["model"], "untrained", untrained_seed])
        return backbone.to(self._device), identity

    def pair(
        self, first: Path, second: Path, untrained_seed: int | None
    ) -> tuple[Features, Features]:
        """Features of the training and the test set, whose classes must be the same.

        Raises:
            ConfigError: They are not, or one is decoded otherwise than the other.
        """
        readers = [ShardReader(first), ShardReader(second)]
        one, two = (r.manifest.classes for r in readers)
        if one != two:
            differing = ", ".join(sorted(set(one) ^ set(two))[:3]) or "another order"
            raise ConfigError(
                f"{first} and {second} have different classes ({len(one)} and {len(two)}: "
                f"{differing}); shard both from one data set"
            )
        refuse_mixed_payloads(readers)
        backbone, identity = self._network(untrained_seed)
        train, test = (
            extract_features(
                backbone,
                reader,
                self.features,
                world=self.world,
                device=self._device,
                network=identity,
                cache=self._results / "features",
            )
            for reader in readers
        )
        return train, test

    def write(self, name: str, result: Mapping[str, Any]) -> None:
        """Leave a result as JSON, with all that decided it, and print its figures."""
        if not self.world.is_first:
            return
        path = self._config.out or self._results / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "evaluation": name,
            "step": self.state.step,
            "settings": plain(dataclasses.replace(self._config, features=self.features)),
            "pretraining": self.state.config,
            "pretraining_manifest_digest": self.state.manifest_digest,
            **result,
        }
        path.write_text(json.dumps(record, indent=2), encoding="utf-8")
        print(f"{name} of {self._found}")
        for row, figures in result["figures"].items():
            print(f"  {row:<22}" + "".join(f"{k} {v:7.2%}   " for k, v in figures.items()))
        print(f"  written to {path}", flush=True)


@contextmanager
def _bench(config: _Evaluation) -> Iterator[_Bench]:
    found = find_checkpoint(config.checkpoint)
    if found is None:
        raise CheckpointError(
            f"{config.checkpoint} holds no whole checkpoint; pretrain with train/main.py first, "
            "or mend --checkpoint"
        )
    device = choose_device(EngineConfig(device=config.device), current_world())
    world = join_world(device)
    try:
        yield _Bench(config, found, world, device)
    finally:
        leave_world()


def _retrieval_figures(
    gallery: Features, queries: Features, config: RetrievalConfig
) -> dict[str, dict[str, float]]:
    nearest = retrieve(queries.videos(), gallery.videos(), config, max(RECALL_AT))
    recalls = recall_at(queries.labels, gallery.labels, nearest)
    chance = chance_recall(queries.labels, gallery.labels)
    return {
        "measured": {f"R@{k}": v for k, v in recalls.items()},
        "chance": {f"R@{k}": v for k, v in chance.items()},
    }


def _linear_figures(
    train: Features, test: Features, config: LinearConfig
) -> dict[str, dict[str, float]]:
    # Only classes that occur are outputs; a part of a data set keeps its own numbering.
    present = np.unique(np.concatenate([train.labels, test.labels]))
    result = linear_probe(
        train.clips,
        np.searchsorted(present, train.labels),
        test.clips,
        np.searchsorted(present, test.labels),
        len(present),
        config,
    )
    return {
        "measured": {"Top-1": result.top1, "Top-5": result.top5},
        "training": {"Top-1": result.train_top1},
        "chance": {"Top-1": 1 / len(present), "Top-5": min(5, len(present)) / len(present)},
    }


def _set_facts(train: Features, test: Features) -> dict[str, Any]:
    present = np.unique(np.concatenate([train.labels, test.labels]))
    return {
        "num_train": len(train.labels),
        "num_test": len(test.labels),
        "classes": [train.classes[k] for k in present],
    }


def _name(protocol: str, config: _OneNetwork) -> str:
    seed = config.untrained_seed
    return protocol if seed is None else f"{protocol}-untrained-{seed}"


def run_retrieval(config: RetrievalEvaluation) -> None:
    """Retrieve each test video's nearest training videos and report R@k."""
    with _bench(config) as bench:
        gallery, queries = bench.pair(config.gallery, config.query, config.untrained_seed)
        figures = _retrieval_figures(gallery, queries, config.retrieval)
        facts = _set_facts(gallery, queries)
        bench.write(_name("retrieval", config), {"figures": figures, **facts})


def run_linear(config: LinearEvaluation) -> None:
    """Train a linear classifier on frozen features and report Top-1 and Top-5."""
    with _bench(config) as bench:
        train, test = bench.pair(config.train, config.test, config.untrained_seed)
        figures = _linear_figures(train, test, config.probe)
        bench.write(_name("linear", config), {"figures": figures, **_set_facts(train, test)})


def run_compare(config: CompareEvaluation) -> None:
    """Both protocols on the checkpoint and on untrained networks of the same architecture."""
    with _bench(config) as bench:
        figures: dict[str, dict[str, float]] = {}
        facts: dict[str, Any] = {}
        networks: list[int | None] = [None, *config.untrained_seeds]
        for seed in networks:
            name = "pretrained" if seed is None else f"untrained, seed {seed}"
            train, test = bench.pair(config.train, config.test, seed)
            facts = _set_facts(train, test)
            recalls = _retrieval_figures(train, test, config.retrieval)
            accuracy = _linear_figures(train, test, config.probe)
            figures[name] = recalls["measured"] | accuracy["measured"]
            figures["chance"] = recalls["chance"] | accuracy["chance"]
        bench.write("compare", {"figures": figures, **facts})
