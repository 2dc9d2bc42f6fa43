"""Training as a user starts it: what a run writes, metrics, errors of one line."""

import json
import shutil
import time
import urllib.error
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.support.commands import (
    TINY,
    fail_with_one_line,
    free_port,
    records,
    scrape,
    succeed,
)
from tests.support.forked import ForkServer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def whole(tiny: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run: 18 steps, 3 epochs, both stages, a learning-rate drop."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    words = ("--config", tiny, "--data.shards", shards / "train", "--run", run)
    said = succeed("train/main.py", *words)
    # The end says where the encoder is and which command comes next.
    assert f"the encoder is in {run}/checkpoints/step-" in said
    assert f"deepspeed eval/main.py compare --checkpoint {run} --train {shards / 'train'}" in said
    for made in run.rglob("*.safetensors"):
        assert made.stat().st_mode & 0o777 == (run / "log.jsonl").stat().st_mode & 0o777
    return run


def test_both_stages_run(whole: Path):
    steps = records(whole, "step")
    assert [r["step"] for r in steps] == list(range(1, 19))
    assert [r["stage"] for r in steps] == [1] * 6 + [2] * 12
    assert set(steps[0]["losses"]) == {"instance", "prototype", "total"}
    assert set(steps[6]["losses"]) == {
        "instance",
        "prototype",
        "total",
        *(f"{t}_{v}" for t in ("graph", "augmentation") for v in ("low", "mid")),
        *(f"retrieval_{v}" for v in ("low", "mid", "high")),
    }
    assert [r["learning_rate"] for r in steps] == pytest.approx([1e-3] * 12 + [1e-4] * 6)
    assert "graph_off_diagonal_mass" in steps[1]["health"]
    weights = {"instance": 1, "prototype": 0.5}
    for level, weight in (("mid", 0.5), ("low", 0.3)):
        weights |= {f"{t}_{level}": weight for t in ("graph", "augmentation", "retrieval")}
    weights["retrieval_high"] = 1
    total = sum(w * steps[-1]["losses"][name] for name, w in weights.items())
    assert steps[-1]["losses"]["total"] == pytest.approx(total, rel=1e-5)


def test_a_run_writes_config_log_and_checkpoints(whole: Path):
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 4
    assert json.loads((whole / "deepspeed.json").read_text())["train_batch_size"] == 4
    folders = sorted(p.name for p in (whole / "checkpoints").iterdir())
    steps = [f"step-{step:09d}" for step in (6, 12, 18)]
    assert folders == ["history.json", "latest", *steps]
    (start,) = records(whole, "start")
    assert start["chance"]["instance"] == pytest.approx(1.9459101)  # log 7
    assert start["plan"]["last_step"] == 18
    assert start["plan"]["stages"]["2"]["flops_per_step"] > 1e9


def test_metrics_are_served_while_training(
    server: ForkServer, tiny: Path, shards: Path, tmp_path: Path
):
    port = free_port()
    trainer = server.fork(
        *("train/main.py", "--config", tiny, "--data.shards", shards / "train"),
        *("--run", tmp_path / "run", "--monitor.port", str(port), "--schedule.epochs", "200"),
    )
    found: dict[str, float] = {}
    deadline = time.monotonic() + 90
    while found.get("strata_step", 0) < 8:
        assert time.monotonic() < deadline
        assert not trainer.over.is_set(), trainer.text()
        time.sleep(0.1)
        with suppress(urllib.error.URLError, ConnectionError):
            found = scrape(port)
    trainer.kill()
    steps = found["strata_steps_total"]
    assert found["strata_samples_total"] == 4 * steps
    assert found["strata_frames_decoded_total"] == 4 * 32 * steps
    assert found["strata_clips_total"] == 8 * 6 + 12 * (steps - 6)
    assert found["strata_step_duration_seconds_count"] == steps
    assert found["strata_bytes_read_total"] > 0
    assert found['strata_activity_seconds_total{activity="data"}'] > 0
    assert found['strata_loss{term="instance"}'] > 0
    assert found['strata_loss_chance{term="instance"}'] == pytest.approx(1.9459101)
    assert found["strata_learning_rate"] == pytest.approx(1e-3)
    assert found["strata_stage"] == 2
    assert not any("gpu" in name for name in found)


def train(tiny: Path, shards: Path, run: Path, *more: str | Path) -> str:
    return fail_with_one_line(
        "train/main.py", "--config", tiny, "--data.shards", shards, "--run", run, *more
    )


def test_an_unknown_key_is_named(tiny: Path, shards: Path, tmp_path: Path):
    line = train(tiny, shards / "train", tmp_path / "r", "--data.batchsize", "4")
    assert "data.batchsize" in line
    assert "--help" in line
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("modle: {width: 8}\n")
    line = train(tiny, shards / "train", tmp_path / "r", "--config", wrong)
    assert "modle" in line


def test_a_value_out_of_range_is_named(tiny: Path, shards: Path, tmp_path: Path):
    line = train(tiny, shards / "train", tmp_path / "r", "--method.temperature", "0")
    assert "method.temperature" in line
    line = train(tiny, shards / "train", tmp_path / "r", "--data.clips.clip_frames", "12")
    assert "steps at the high level and a long one of 3, which do not line up" in line


def test_missing_folders_are_named(tiny: Path, shards: Path, tmp_path: Path):
    assert "does not exist" in train(tiny, tmp_path / "nowhere", tmp_path / "r")
    (tmp_path / "empty").mkdir()
    line = train(tiny, tmp_path / "empty", tmp_path / "r")
    assert "has no manifest.json" in line
    assert "tools/shard.py" in line


def test_a_finished_run_is_not_overwritten(whole: Path, tiny: Path, shards: Path):
    line = train(tiny, shards / "train", whole)
    assert "already holds step-000000018" in line
    assert "--resume auto" in line


def test_another_architecture_is_refused(whole: Path, tiny: Path, shards: Path):
    line = train(tiny, shards / "train", whole, "--resume", "auto", "--model.width", "16")
    assert "belongs to another architecture" in line
    assert "in the checkpoint and" in line


def test_other_data_are_refused(whole: Path, tiny: Path, shards: Path):
    line = train(tiny, shards / "test", whole, "--resume", "auto")
    assert "was trained on other data" in line


def test_an_evaluation_without_checkpoint_says_so(shards: Path, tmp_path: Path):
    line = fail_with_one_line(
        "eval/main.py",
        "retrieval",
        *("--checkpoint", tmp_path, "--train", shards / "train", "--test", shards / "test"),
    )
    assert "holds no complete checkpoint" in line
    assert "did you mean retrieval?" in fail_with_one_line("eval/main.py", "retrievel")


def test_an_altered_checkpoint_is_refused(whole: Path, tiny: Path, shards: Path, tmp_path: Path):
    run = Path(shutil.copytree(whole, tmp_path / "copy"))
    path = run / "checkpoints" / "step-000000018" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    line = train(tiny, shards / "train", run, "--resume", "auto")
    assert "model.safetensors is missing or altered" in line
