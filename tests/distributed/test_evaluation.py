"""Evaluation results are equal on one, two and three ranks with uneven numbers of samples."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.errors import ConfigError
from strata.eval.classifier.run import ClassifierRun
from strata.eval.protocols.features import FeatureConfig, extract_features
from strata.eval.protocols.named import PROTOCOLS
from strata.train.models.backbones import BackboneConfig, build_backbone
from tests.support.rank_processes import run_ranks
from tests.support.shard_folders import make_shards

CPU = torch.device("cpu")
CLIPS = FeatureConfig(num_clips=3, size=32, clip_frames=8, videos_per_batch=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 training and 11 test videos of 3 classes."""
    root = tmp_path_factory.mktemp("sets")
    make_shards(root / "train", num_videos=19, num_classes=3, shard_size=8, seed=1)
    make_shards(root / "test", num_videos=11, num_classes=3, shard_size=11, seed=2)
    return root


def encoder():
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(width=8))


def features(world: World, sets: Path, cache: Path | None) -> dict[str, np.ndarray]:
    found = extract_features(
        encoder(),
        ShardReader(sets / "test"),
        CLIPS,
        world=world,
        device=CPU,
        network="a",
        cache=cache,
    )
    return dict(found.levels)


def probe(world: World, sets: Path, folder: Path) -> tuple[Any, ...]:
    config = dataclasses.replace(PROTOCOLS["ours"].linear, epochs=2, batch_size=6)
    run = ClassifierRun(
        encoder(),
        ShardReader(sets / "train"),
        ShardReader(sets / "test"),
        config,
        CLIPS.clips(),
        folder=folder,
        described={},
        world=world,
        device=CPU,
    )
    run.fit()
    accuracy = run.test()
    weight = run.model.linear.weight.detach().clone()
    return weight, accuracy.top1, accuracy.confusion


def finetuned(world: World, sets: Path, folder: Path) -> Any:
    """Evaluate weights that were finetuned before, on any number of ranks."""
    config = dataclasses.replace(PROTOCOLS["ours"].finetune, epochs=1, batch_size=6)
    run = ClassifierRun(
        encoder(),
        ShardReader(sets / "train"),
        ShardReader(sets / "test"),
        config,
        CLIPS.clips(),
        folder=folder,
        described={},
        world=world,
        device=CPU,
    )
    run.fit()
    accuracy = run.test()
    return accuracy.top1, accuracy.confusion, accuracy.predictions


def test_features_do_not_depend_on_ranks(sets: Path, tmp_path: Path):
    (want,) = run_ranks(features, 1, sets, None)
    assert want["high"].shape == (11, 3, 64)
    for num_ranks in (2, 3):
        for got in run_ranks(features, num_ranks, sets, tmp_path / str(num_ranks)):
            for level, value in want.items():
                np.testing.assert_array_equal(got[level], value)
    # One rank can use a cache that three ranks wrote.
    (got,) = run_ranks(features, 1, sets, tmp_path / "3")
    np.testing.assert_array_equal(got["mid"], want["mid"])


def test_a_linear_probe_does_not_depend_on_ranks(sets: Path, tmp_path: Path):
    ((weight, top1, confusion),) = run_ranks(probe, 1, sets, tmp_path / "1")
    for num_ranks in (2, 3):
        for got in run_ranks(probe, num_ranks, sets, tmp_path / str(num_ranks)):
            torch.testing.assert_close(got[0], weight, rtol=1e-4, atol=1e-6)
            assert got[1] == top1
            np.testing.assert_array_equal(got[2], confusion)


def test_finetuned_weights_are_tested_alike_on_any_ranks(sets: Path, tmp_path: Path):
    # Two ranks train; runs on one and three ranks find the training complete and only test.
    want = run_ranks(finetuned, 2, sets, tmp_path / "run")[0]
    for num_ranks in (1, 3):
        for got in run_ranks(finetuned, num_ranks, sets, tmp_path / "run"):
            assert got[0] == want[0]
            np.testing.assert_array_equal(got[1], want[1])
            np.testing.assert_array_equal(got[2], want[2])


def test_a_batch_that_does_not_divide_is_refused(sets: Path, tmp_path: Path):
    config = dataclasses.replace(PROTOCOLS["ours"].finetune, batch_size=5)
    train, test = (ShardReader(sets / name) for name in ("train", "test"))
    with pytest.raises(ConfigError, match="does not divide by 2 ranks"):
        ClassifierRun(
            encoder(),
            train,
            test,
            config,
            CLIPS.clips(),
            folder=tmp_path,
            described={},
            world=World(rank=0, size=2),
            device=CPU,
        )
