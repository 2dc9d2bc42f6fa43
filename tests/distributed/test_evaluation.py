"""Evaluation results are equal on one, two and three ranks with uneven numbers of samples."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.errors import ConfigError, NotFiniteError
from strata.eval.classifier.run import ClassifierRun, ClassifierTask
from strata.eval.protocols.features import FeatureConfig, extract_features
from strata.eval.protocols.named import PROTOCOLS
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.run.checkpoint import CheckpointConfig
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


def interrupted(world: World, sets: Path, root: Path) -> dict[str, Any]:
    """A training that rank 1 stops and resumes, one with a bad step, and one that may skip it."""
    config = dataclasses.replace(PROTOCOLS["ours"].finetune, epochs=2, batch_size=6)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(keep=1, every_steps=3))

    def run(name: str, **changes: Any) -> ClassifierRun:
        return ClassifierRun(
            encoder(),
            ShardReader(sets / "train"),
            ShardReader(sets / "test"),
            dataclasses.replace(config, **changes),
            CLIPS.clips(),
            folder=root / name,
            described={},
            world=world,
            device=CPU,
        )

    def weight(run: ClassifierRun) -> torch.Tensor:
        return run.model.linear.weight.detach().clone()

    step, keep = ClassifierTask.step, ClassifierTask._keep

    def signalled(self: ClassifierTask, batch: Any, state: Any) -> Any:
        if world.rank == 1 and state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, state)

    def spoiled(self: ClassifierTask, num: int, number: int) -> Any:
        kept = keep(self, num, number)
        assert kept is not None
        return kept * float("nan") if world.rank == 1 and number == 4 else kept

    found: dict[str, Any] = {}
    plain = run("plain")
    found["finished"], found["plain"] = plain.fit(), weight(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierTask, "step", signalled)
        stopped = run("stopped")
        found["stopped"] = stopped.fit(), stopped.state.step
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_DFL)
    again = run("stopped")
    found["resumed"] = again.fit(), weight(again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierTask, "_keep", spoiled)
        bad = run("bad")
        with pytest.raises(NotFiniteError) as error:
            bad.fit()
        found["error"] = str(error.value)
        left = run("left", max_skipped_steps=1)
        found["left"] = left.fit(), left.state.num_skipped, weight(left)
    return found


def test_a_classifier_stops_resumes_and_skips_like_pretraining(sets: Path, tmp_path: Path):
    for found in run_ranks(interrupted, 2, sets, tmp_path):
        assert found["finished"]
        assert found["stopped"] == (False, 2)
        assert found["resumed"][0]
        assert torch.equal(found["resumed"][1], found["plain"])
        named = r"step 5 \(epoch 1, step 1 of it\): not finite: loss terms cross_entropy; on rank 1"
        assert re.match(rf"{named} with samples video-\d+, ", found["error"])
        assert "training.max_skipped_steps is 0" in found["error"]
        assert found["left"][:2] == (True, 1)
        assert torch.isfinite(found["left"][2]).all()
    (bad,) = (tmp_path / "bad" / "checkpoints").glob("step-*")
    assert bad.name == "step-000000003"
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "left" / "log.jsonl").open()]
    assert kinds.count("skipped_step") == 1


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
