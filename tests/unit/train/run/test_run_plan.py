"""Content of the run plan, and printing it without starting a run."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml

from strata.config import parse_config
from strata.dataload.augment_choice import AugmentChoice
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.train.config import TrainConfig
from strata.train.main import main
from strata.train.method.schedules import ScheduleConfig
from strata.train.run.run_plan import RunPlan, describe_run, stage_epochs
from tests.support.commands import TINY


def page(shards: Path, *more: str, ranks: int = 2, step: int = 5) -> RunPlan:
    config = parse_config(
        TrainConfig,
        ["--data.shards", str(shards / "train"), "--run", "runs/a", *more],
        prog="test",
        description="",
    )
    reader = ShardReader(config.data.shards)
    return describe_run(
        config,
        world=World(rank=0, size=ranks),
        device=torch.device("cpu"),
        reader=reader,
        plan=open_plan(reader, config.data, config.seed),
        step=step,
        augment_choice=AugmentChoice("cpu", {"gpu": 900.0, "cpu": 1000.0}),
    )


def test_the_plan_describes_the_run(shards: Path):
    sizes = ("--data.batch_size", "4", "--data.size", "32", "--model.width", "8")
    plan = page(shards, *sizes, "--stop_after_steps", "400", "--checkpoint.every_steps", "50")
    lines = dict(plan.lines)
    assert lines["world"] == "2 ranks on CPU, float32, ZeRO 0"
    assert lines["batch"].startswith("4 videos, 2 a rank; clips of 16 and 32 frames, 32x32 pixels")
    assert lines["steps"].startswith("6 an epoch, 300 epochs: 5 of 400 done; order ")
    assert "24 videos" in lines["data"]
    assert lines["augmentation"] == (
        "on the CPU, as measured: 900 on the GPU, 1,000 on the CPU samples/s"
    )
    assert lines["hours"].startswith("unknown until the speed is measured; --plan_rate")
    assert "epochs 0 to 49" in lines["stage 1"]
    assert lines["stage 1"].endswith(": 1 instance + 0.5 prototype")
    assert "epochs 50 to 299" in lines["stage 2"]
    assert "0.3 retrieval_low" in lines["stage 2"]
    assert lines["learning rate"] == "0.001 from epoch 0, 0.0001 from epoch 200"
    assert "in stage 2" in lines["memory"]
    assert lines["checkpoints"] == "every 50 steps, the last 3 kept; resume never"
    assert "http://127.0.0.1:9480/metrics" in lines["figures"]
    record = plan.record
    assert record["plan_digest"] in lines["steps"]
    one = page(shards, *sizes, ranks=1).record["stages"]
    for stage, cost in record["stages"].items():
        # For the global batch, on any number of ranks.
        assert cost["flops_per_step"] == one[stage]["flops_per_step"]
        assert cost["memory_bytes_per_rank"]["activations"] * 2 == pytest.approx(
            one[stage]["memory_bytes_per_rank"]["activations"], rel=0.01
        )
    starts = {
        line.index(text)
        for line, (_, text) in zip(plan.text().splitlines(), plan.lines, strict=True)
    }
    assert len(starts) == 1, "the block is not aligned"


def test_the_cache_is_listed_with_its_size(shards: Path):
    sizes = ("--data.batch_size", "4", "--data.size", "32", "--model.width", "8")
    assert page(shards, *sizes).record["cache_bytes"] == 0
    plan = page(shards, *sizes, "--data.cache", "host")
    # 838 frames at 64x48, 3 bytes a pixel and 4 a column, as the CPU augments.
    assert dict(plan.lines)["cache"] == "8 MiB on the host, once a node: 838 decoded frames"
    assert plan.record["cache_bytes"] == 838 * (64 * 48 * 3 + 4 * 64)


def test_skipped_videos_are_listed_by_name(shards: Path):
    sizes = ("--data.batch_size", "4", "--data.size", "32", "--model.width", "8")
    plan = page(shards, *sizes)
    assert "left out" not in dict(plan.lines)
    assert plan.record["left_out"] == []
    # Videos have 33, 34, 35, 36, 37, 33, ... frames, and the window 36.
    aligned = ("--method.weights.retrieval_low=0", "--method.weights.retrieval_mid=0")
    aligned = (*aligned, "--method.weights.retrieval_high=0")
    plan = page(shards, *sizes, *aligned, "--data.clips.clip_frames", "18")
    left_out = plan.record["left_out"]
    assert left_out == [f"video-{k:04d}" for k in range(24) if 33 + k % 5 < 36]
    named = "video-0000 (33), video-0001 (34), video-0002 (35), video-0005 (33), video-0006 (34)"
    assert dict(plan.lines)["left out"] == (
        f"15 of 24 videos have fewer than the window's 36 frames: {named} and 10 more, all named "
        "in log.jsonl"
    )


def test_a_graph_that_may_be_the_identity_is_described(shards: Path):
    sizes = ("--data.batch_size", "4", "--data.size", "32", "--model.width", "8")
    plan = dict(page(shards, *sizes).lines)["graph"]
    assert plan.startswith("4 videos and 1000 prototypes: 0.003 other videos for each prototype")
    assert "so few that the graph may be the identity" in plan
    plan = dict(page(shards, *sizes, "--method.num_prototypes", "2").lines)["graph"]
    assert "1.5 other videos" in plan
    assert "may be the identity" not in plan
    without = [f"--method.weights.graph_{level}=0" for level in ("low", "mid")]
    assert "graph" not in dict(page(shards, *sizes, *without).lines)
    assert "graph" not in dict(page(shards, *sizes, "--schedule.epochs", "50").lines)


def test_stages_that_the_run_does_not_reach_are_not_listed():
    assert stage_epochs(ScheduleConfig(epochs=10, second_stage_epoch=20)) == {1: (0, 10)}
    assert stage_epochs(ScheduleConfig(epochs=10, second_stage_epoch=0)) == {2: (0, 10)}


def test_plan_only_prints_the_plan_and_writes_nothing(
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    logger = logging.getLogger("strata")
    for name in ("propagate", "level", "handlers"):
        # Restored at the end: the command configures logging for the complete process.
        value = getattr(logger, name)
        monkeypatch.setattr(logger, name, list(value) if name == "handlers" else value)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    run = tmp_path / "run"
    words = ["--config", str(config), "--data.shards", str(shards / "train"), "--run", str(run)]
    main([*words, "--plan_only", "true"])
    assert "0 of 18 done" in capsys.readouterr().out
    assert not run.exists()


def test_the_plan_gives_hours_from_a_given_or_the_measured_speed(shards: Path, tmp_path: Path):
    sizes = ("--data.batch_size", "4", "--data.size", "32", "--model.width", "8")
    sizes = (*sizes, "--stop_after_steps", "95", "--run", str(tmp_path))
    given = dict(page(shards, *sizes, "--plan_rate", "0.2").lines)["hours"]
    # 90 steps of 4 videos.
    assert given == "0.5 for 90 steps at 0.2 samples/s, as given; without evaluation"
    rates = [9.0, *[0.1] * 20]
    lines = [{"kind": "step", "step": n, "samples_per_second": r} for n, r in enumerate(rates)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = dict(page(shards, *sizes).lines)["hours"]
    assert measured.startswith("1 for 90 steps at 0.1 samples/s, as this run's log measured last")
