"""From a command's settings to a result: load the encoder, extract features, measure, write."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from strata.config import plain
from strata.dataload.reader import ShardReader
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
    backbone_config,
    find_checkpoint,
    load_backbone,
    read_state,
)
from strata.train.engine import EngineConfig, choose_device
from strata.train.models.backbones import Backbone, build_backbone

__all__ = ["LinearEvaluation", "RetrievalEvaluation", "run_linear", "run_retrieval"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which weights are evaluated."""

    checkpoint: Path
    """A run's folder, whose newest checkpoint is taken, or a checkpoint's folder."""
    weights: Literal["pretrained", "untrained"] = "pretrained"
    """untrained draws the same network anew from the seed: the baseline."""
    seed: int = 0
    """Of the untrained weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """How a video becomes features."""
    out: Path | None = None
    """File for the result; by default under the checkpoint's run, in eval/."""


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation(Network):
    """Settings of `eval/main.py retrieval`."""

    gallery: Path
    """Shards of the training set."""
    query: Path
    """Shards of the test set."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """What the protocol leaves open."""


@dataclass(frozen=True, kw_only=True)
class LinearEvaluation(Network):
    """Settings of `eval/main.py linear`."""

    train: Path
    """Shards of the training set."""
    test: Path
    """Shards of the test set."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """What the protocol leaves open."""


@dataclass(frozen=True)
class _Ready:
    """An encoder on a formed world."""

    world: World
    device: torch.device
    backbone: Backbone
    features: FeatureConfig
    network: str
    checkpoint: Path
    cache: Path


@contextmanager
def _ready(config: Network) -> Iterator[_Ready]:
    found = find_checkpoint(config.checkpoint)
    if found is None:
        raise CheckpointError(
            f"{config.checkpoint} holds no whole checkpoint; pretrain with train/main.py first, "
            "or mend --checkpoint"
        )
    state = read_state(found)
    if config.weights == "untrained":
        torch.manual_seed(config.seed)
        backbone = build_backbone(backbone_config(state.config))
        network = json.dumps([state.config["model"], "untrained", config.seed])
    else:
        backbone = load_backbone(found)
        network = (found / "complete.json").read_text(encoding="utf-8")
    data = state.config["data"]
    features = dataclasses.replace(
        config.features,
        size=config.features.size or data["size"],
        clip_frames=config.features.clip_frames or data["clips"]["clip_frames"],
    )
    device = choose_device(EngineConfig(device=config.device), current_world())
    world = join_world(device)
    try:
        all_equal("network", network)
        yield _Ready(
            world,
            device,
            backbone.to(device),
            features,
            network,
            found,
            found.parent.parent / "eval" / "features",
        )
    finally:
        leave_world()


def _pair(ready: _Ready, first: Path, second: Path) -> tuple[Features, Features]:
    """Features of the training and the test set, whose classes must be the same."""
    readers = [ShardReader(first), ShardReader(second)]
    one, two = (r.manifest.classes for r in readers)
    if one != two:
        missing = sorted(set(one) ^ set(two))[:3]
        raise ConfigError(
            f"{first} and {second} have different classes ({len(one)} and {len(two)}; for example "
            f"{', '.join(missing) or 'another order'}); shard both from one data set"
        )
    train, test = (
        extract_features(
            ready.backbone,
            reader,
            ready.features,
            world=ready.world,
            device=ready.device,
            network=ready.network,
            cache=ready.cache,
        )
        for reader in readers
    )
    return train, test


def _present(train: Features, test: Features) -> list[str]:
    """Names of the classes that occur."""
    return [train.classes[k] for k in np.unique(np.concatenate([train.labels, test.labels]))]


def _write(ready: _Ready, config: Network, protocol: str, result: dict[str, Any]) -> None:
    """Leave the result as JSON, with all that decided it, and print it."""
    if not ready.world.is_first:
        return
    state = read_state(ready.checkpoint)
    name = protocol if config.weights == "pretrained" else f"{protocol}-untrained-{config.seed}"
    path = config.out or ready.cache.parent / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "protocol": protocol,
        "weights": config.weights,
        "step": state.step if config.weights == "pretrained" else 0,
        "settings": plain(dataclasses.replace(config, features=ready.features)),
        "pretraining": state.config,
        "pretraining_manifest_digest": state.manifest_digest,
        **result,
    }
    path.write_text(json.dumps(record, indent=2), encoding="utf-8")
    print(f"{protocol}, {config.weights} network of {ready.checkpoint}")
    for row, figures in result["figures"].items():
        print(f"  {row:<12}" + "".join(f"{k} {v:7.2%}   " for k, v in figures.items()))
    print(f"  written to {path}", flush=True)


def run_retrieval(config: RetrievalEvaluation) -> None:
    """Retrieve each test video's nearest training videos and report R@k."""
    with _ready(config) as ready:
        gallery, queries = _pair(ready, config.gallery, config.query)
        nearest = retrieve(queries.videos(), gallery.videos(), config.retrieval, max(RECALL_AT))
        recalls = recall_at(queries.labels, gallery.labels, nearest)
        chance = chance_recall(queries.labels, gallery.labels)
        _write(
            ready,
            config,
            "retrieval",
            {
                "figures": {
                    "measured": {f"R@{k}": v for k, v in recalls.items()},
                    "chance": {f"R@{k}": v for k, v in chance.items()},
                },
                "num_queries": len(queries.labels),
                "num_gallery": len(gallery.labels),
                "classes": _present(gallery, queries),
            },
        )


def run_linear(config: LinearEvaluation) -> None:
    """Train a linear classifier on frozen features and report Top-1 and Top-5."""
    with _ready(config) as ready:
        train, test = _pair(ready, config.train, config.test)
        # Only classes that occur are outputs; a subset of a data set keeps its own numbering.
        present = np.unique(np.concatenate([train.labels, test.labels]))
        result = linear_probe(
            train.clips,
            np.searchsorted(present, train.labels),
            test.clips,
            np.searchsorted(present, test.labels),
            len(present),
            config.probe,
        )
        top5 = min(5, len(present)) / len(present)
        _write(
            ready,
            config,
            "linear",
            {
                "figures": {
                    "measured": {"Top-1": result.top1, "Top-5": result.top5},
                    "training": {"Top-1": result.train_top1},
                    "chance": {"Top-1": 1 / len(present), "Top-5": top5},
                },
                "num_train": len(train.labels),
                "num_test": len(test.labels),
                "classes": _present(train, test),
            },
        )
