"""Evaluation as a user starts it: all protocols from one run, resume, splits, errors."""

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.commands import TINY, fail_with_one_line, free_port, run, scrape, succeed
from tests.support.shard_folders import make_shards

QUICK = ("--features.num_clips", "2", "--device", "cpu")
TRAINING = ("--training.epochs", "2", "--training.batch_size", "4")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of a made data set; 22 training and 11 test videos of 4 classes."""
    root = tmp_path_factory.mktemp("sets") / "made"
    for n in (1, 2):
        make_shards(root / f"train{n:02d}", num_videos=22, num_classes=4, shard_size=9, seed=n)
        make_shards(root / f"test{n:02d}", num_videos=11, num_classes=4, shard_size=12, seed=10 + n)
    return root


@pytest.fixture(scope="module")
def pretrained(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    succeed(
        *("train/main.py", "--config", config, "--data.shards", sets / "train01"),
        *("--run", folder / "run", "--schedule.epochs", "1"),
    )
    return folder / "run"


def evaluate(name: str, pretrained: Path, out: Path, *more: str | Path, **how: Any) -> Any:
    command = ("eval/main.py", name, "--checkpoint", pretrained, "--out", out, *QUICK)
    text = succeed(*command, *more, **how)
    record = json.loads(out.read_text())
    assert f"protocol: {record['protocol']}" in text
    return record


def one_split(sets: Path, names: tuple[str, str] = ("--train", "--test")) -> tuple[str | Path, ...]:
    return names[0], sets / "train01", names[1], sets / "test01"


@pytest.mark.parametrize("name", ["retrieval", "linear", "finetune", "cached"])
def test_splits_and_their_mean_in_one_command(
    name: str, pretrained: Path, sets: Path, tmp_path: Path
):
    more = {"linear": TRAINING, "finetune": TRAINING, "cached": ("--variant", "cached")}
    record = evaluate(
        "linear" if name == "cached" else name,
        pretrained,
        tmp_path / "report.json",
        *("--data", f"[{sets}]", "--splits", "[1,2]", *more.get(name, ())),
    )
    first, second = record["results"]
    assert [r["split"] for r in record["results"]] == ["1", "2"]
    assert first["sets"]["train"]["num_videos"] == 22
    assert first["sets"]["train"]["manifest_digest"] != second["sets"]["train"]["manifest_digest"]
    figure = "R@1" if name == "retrieval" else "Top-1"
    values = [r["figures"]["measured"][figure] for r in record["results"]]
    assert record["figures"]["measured"][figure] == pytest.approx(np.mean(values))
    assert record["deviation"]["measured"][figure] == pytest.approx(np.std(values, ddof=1))
    assert record["by_data"]["made"]["num_splits"] == 2
    details = first["details"]
    counts = np.array(details["confusion"]["counts"])
    assert counts.sum() == 11
    assert values[0] == pytest.approx(counts.trace() / 11)
    assert sum(row["num_test"] for row in details["per_class"]) == 11
    if name == "retrieval":
        assert len(first["variants"]) == 12
        assert sum("statistics of the test set" in v for v in first["variants"]) == 4
        assert first["variants"]["high level, no centring"] == first["figures"]["measured"]
        assert len(details["neighbours"]) == 11
        assert len(details["neighbours"][0]["nearest"]) == 5
    elif name != "cached":
        assert details["curves"]["epoch"] == [0, 1]
        assert ("encoder frozen" in record["protocol"]) == (name == "linear")


def test_any_number_of_ranks_gives_the_same_report(pretrained: Path, sets: Path, tmp_path: Path):
    pair = one_split(sets)
    alone = evaluate("retrieval", pretrained, tmp_path / "one.json", *pair)
    # 22 and 11 videos do not divide by 3: ranks get unequal shares.
    out = tmp_path / "three.json"
    three = evaluate("retrieval", pretrained, out, *pair, ranks=3)
    assert [r["figures"] for r in three["results"]] == [r["figures"] for r in alone["results"]]
    assert [r["details"] for r in three["results"]] == [r["details"] for r in alone["results"]]


def test_it_answers_prometheus_while_it_works(pretrained: Path, sets: Path, tmp_path: Path):
    port, seen, done = free_port(), {}, threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            with suppress(OSError):
                seen.update(scrape(port))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        evaluate(
            "retrieval",
            pretrained,
            tmp_path / "report.json",
            *one_split(sets),
            *("--monitor.port", str(port), "--monitor.file_sd", tmp_path / "targets"),
            *("--features.videos_per_batch", "1", "--features.num_clips", "3"),
            *("--untrained_seeds", "[]"),
        )
    finally:
        done.set()
        watcher.join()
    # Of 33 videos in all; the last look is before the end.
    assert 1 <= seen["strata_samples_total"] <= 33
    assert seen["strata_clips_total"] == 3 * seen["strata_samples_total"]
    assert seen["strata_frames_decoded_total"] > 0
    assert not list((tmp_path / "targets").glob("*.json"))


def test_a_stopped_training_resumes_with_the_same_bits(
    pretrained: Path, sets: Path, tmp_path: Path
):
    command = ("eval/main.py", "finetune", "--checkpoint", pretrained, *QUICK, *one_split(sets))
    for folder, stops in (("whole", ()), ("stopped", ("3", "7"))):
        more = (*TRAINING, "--run", tmp_path / folder, "--out", tmp_path / f"{folder}.json")
        for stop in stops:
            said = succeed(*command, *more, "--training.max_steps", stop)
            assert f"stopped at step {stop}" in said
        succeed(*command, *more)
    mine, theirs = (
        load_file(tmp_path / f / "checkpoints" / "step-000000010" / "model.safetensors")
        for f in ("stopped", "whole")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    start = load_file(pretrained / "checkpoints" / "step-000000005" / "model.safetensors")
    name = "backbone.layer4.0.conv1.0.weight"
    assert not torch.equal(start[name], mine[name])


def test_a_frozen_encoder_is_left_to_the_bit(pretrained: Path, sets: Path, tmp_path: Path):
    evaluate(
        "linear",
        pretrained,
        tmp_path / "report.json",
        *(*one_split(sets), *TRAINING, "--run", tmp_path / "run"),
    )
    trained = load_file(tmp_path / "run" / "checkpoints" / "step-000000010" / "model.safetensors")
    start = load_file(pretrained / "checkpoints" / "step-000000005" / "model.safetensors")
    encoder = [name for name in trained if name.startswith("backbone.")]
    assert encoder
    assert all(torch.equal(trained[name], start[name]) for name in encoder)
    assert trained["norm.num_batches_tracked"] == 10
    command = ("eval/main.py", "linear", "--checkpoint", pretrained, *QUICK, *one_split(sets))
    line = fail_with_one_line(
        *command, *TRAINING, "--training.seed", "1", "--run", tmp_path / "run"
    )
    assert "belongs to another evaluation" in line


def test_features_are_exported_and_cached(pretrained: Path, sets: Path, tmp_path: Path):
    command = ("eval/main.py", "features", "--checkpoint", pretrained, *QUICK)
    command = (*command, "--features.stride", "2", "--shards", sets / "test01")
    cache = pretrained / "eval" / "features"
    before = set(cache.glob("*"))
    succeed(*command, "--out", tmp_path / "a.npz")
    (made,) = set(cache.glob("*")) - before
    content = np.load(tmp_path / "a.npz")
    assert content["high"].shape == (11, 2, 64)
    assert content["low"].shape == (11, 2, 16)
    assert content["keys"].tolist() == [f"video-{k:04d}" for k in range(11)]
    assert content["labels"].tolist() == [k % 4 for k in range(11)]
    assert content["classes"].tolist() == [f"class-{k}" for k in range(4)]
    changed = made.stat().st_mtime_ns
    succeed(*command, "--out", tmp_path / "b.npz")
    assert made.stat().st_mtime_ns == changed
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["high"], content["high"])
    made.write_bytes(made.read_bytes()[:-9])
    assert "are damaged" in fail_with_one_line(*command, "--out", tmp_path / "c.npz")
    made.unlink()


def test_sets_that_do_not_fit_are_refused(pretrained: Path, sets: Path, tmp_path: Path):
    linear = ("eval/main.py", "linear", "--checkpoint", pretrained, *QUICK)
    other = tmp_path / "other"
    make_shards(other, num_videos=6, num_classes=3, shard_size=6, seed=5)
    line = fail_with_one_line(*linear, "--train", sets / "train01", "--test", other)
    assert "have different classes (4 and 3: class-3)" in line
    gap = tmp_path / "gap"
    make_shards(gap, num_videos=22, num_classes=4, shard_size=9, seed=1, empty_class=2)
    for variant in ("cached", "augmented"):
        line = fail_with_one_line(
            *linear, "--train", gap, "--test", sets / "test01", "--variant", variant
        )
        assert "no training video (first: class-2)" in line
    record = evaluate(
        "retrieval",
        pretrained,
        tmp_path / "report.json",
        *("--train", gap, "--test", sets / "test01"),
    )
    assert record["results"][0]["details"]["queries_without_match"] == 3
    line = fail_with_one_line(*linear, "--train", sets / "train01")
    assert "give --train and --test, or --data" in line
    line = fail_with_one_line(*linear, "--data", f"[{sets}]", "--splits", "[3]")
    assert "train03 does not exist" in line
    line = fail_with_one_line(*linear, *one_split(sets), "--training.train", "all")
    assert "use finetune" in line


def test_a_checkpoint_of_another_encoder_is_refused(pretrained: Path, sets: Path):
    names = ("--gallery", "--query")
    command = ("eval/main.py", "retrieval", "--checkpoint", pretrained, *one_split(sets, names))
    assert "holds the encoder r3d18" in fail_with_one_line(*command, "--backbone", "s3d")
    done = run(*command, "--backbone", "resnet50")
    assert done.returncode == 2
