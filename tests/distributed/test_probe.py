"""Online retrieval uses rank 0's network on all ranks and changes none of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.eval.protocols.features import FeatureConfig, extract_features
from strata.eval.protocols.retrieval import retrieve
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone
from strata.train.representation.knn import recall_at
from strata.train.representation.online_retrieval import OnlineProbe, ProbeConfig
from tests.support.rank_processes import run_ranks
from tests.support.shard_folders import make_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 gallery and 11 query videos of 3 classes: neither divides by the ranks."""
    root = tmp_path_factory.mktemp("sets")
    make_shards(root / "gallery", num_videos=19, num_classes=3, shard_size=8, seed=1)
    make_shards(root / "query", num_videos=11, num_classes=3, shard_size=11, seed=2)
    return root


def encoder(rank: int) -> Backbone:
    """The same weights on all ranks, with different batch norm statistics."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=8))
    seen = torch.Generator().manual_seed(rank)
    for name, buffer in backbone.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.empty_like(buffer).exponential_(generator=seen))
    return backbone


def of_the_evaluation(world: World, sets: Path) -> dict[int, float]:
    """R@k of rank 0's network computed by the code of the evaluation."""
    features = FeatureConfig(num_clips=2, size=32, clip_frames=8)
    gallery, queries = (
        extract_features(
            encoder(0),
            ShardReader(sets / name),
            features,
            world=world,
            device=CPU,
            network="a",
            cache=None,
        )
        for name in ("gallery", "query")
    )
    nearest, _ = retrieve(queries.videos("high"), gallery.videos("high"), "none", 50)
    return recall_at(queries.labels, gallery.labels, nearest)


def measure(world: World, sets: Path) -> dict[str, Any]:
    """Measured results, and what the measurement changed on this rank."""
    backbone = encoder(world.rank).train()
    config = ProbeConfig(
        every_epochs=1, train=sets / "gallery", test=sets / "query", videos_per_batch=2
    )
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    random, beats = torch.get_rng_state(), []
    figures = OnlineProbe(config, size=32, clip_frames=8).measure(
        backbone, world=world, device=CPU, beat=beats.append
    )
    after = backbone.state_dict()
    return {
        "figures": figures.recall,
        "accuracy": figures.accuracy,
        "chance": figures.chance,
        "changed": [name for name, value in before.items() if not torch.equal(value, after[name])],
        "random": torch.equal(random, torch.get_rng_state()),
        "training": all(module.training for module in backbone.modules()),
        "beats": len(beats),
    }


def test_the_same_figures_on_any_ranks_and_nothing_is_changed(sets: Path):
    found = {ranks: run_ranks(measure, ranks, sets) for ranks in (1, 2, 3)}
    (one,) = found[1]
    (expected,) = run_ranks(of_the_evaluation, 1, sets)
    assert 0 < expected[1] < expected[5]
    assert set(one["accuracy"]) == {"knn", "linear"}
    assert one["chance"][1] == pytest.approx(1 / 3, abs=0.02)
    for ranks in found.values():
        for rank in ranks:
            assert rank["figures"] == expected
            assert rank["accuracy"] == one["accuracy"]
            assert rank["changed"] == []
            assert rank["random"]
            assert rank["training"]
            assert rank["beats"] >= 4
