"""Retrieval during pretraining: the figures of the evaluation, and no trace in the run."""

import json
import time
import urllib.error
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from strata.errors import ConfigError
from strata.train.representation.online_retrieval import ProbeConfig
from tests.support.commands import TINY, free_port, records, scrape, succeed
from tests.support.forked import ForkServer
from tests.support.shard_folders import make_shards


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 gallery and 11 query videos: neither divides by the ranks or fills the batches."""
    folder = tmp_path_factory.mktemp("labelled")
    make_shards(folder / "gallery", num_videos=23, num_classes=4, shard_size=9, seed=3)
    make_shards(folder / "query", num_videos=11, num_classes=4, shard_size=12, seed=4)
    return folder


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """Of a run of 18 steps in 3 epochs, stage 2 from the second."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"checkpoint": {"keep": 9}}))
    return ["--config", path, "--data.shards", shards / "train"]


@pytest.fixture(scope="module")
def probed(plain: list[str | Path], labelled: Path) -> list[str | Path]:
    sets = ("--probe.train", labelled / "gallery", "--probe.test", labelled / "query")
    return [*plain, *sets, "--probe.every_epochs", "2", "--probe.videos_per_batch", "3"]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:09d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")


def assert_same(run: Path, other: Path, step: int = 18) -> None:
    """Weights, batch statistics, queue, Adam's state and random state, to the bit."""
    mine, theirs = state(run, step), state(other, step)
    assert "random.cpu" in mine
    assert any("running_var" in name for name in mine)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def measured(run: Path) -> dict[int, dict[str, float]]:
    return {r["step"]: r["recall"] for r in records(run, "probe")}


def losses(run: Path) -> dict[int, dict[str, float]]:
    return {r["step"]: r["losses"] for r in records(run, "step")}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_probed_run_has_the_same_bits(
    ranks: int,
    server: ForkServer,
    plain: list[str | Path],
    probed: list[str | Path],
    labelled: Path,
    tmp_path: Path,
):
    server.finish(*plain, "--run", tmp_path / "plain", ranks=ranks)
    server.finish(*probed, "--run", tmp_path / "probed", ranks=ranks)
    assert_same(tmp_path / "probed", tmp_path / "plain")
    assert losses(tmp_path / "probed") == losses(tmp_path / "plain")
    # Before training, every second epoch, at the end; stopped and resumed, in between and at one.
    found = records(tmp_path / "probed", "probe")
    assert [(r["epoch"], r["step"]) for r in found] == [(0, 0), (2, 12), (3, 18)]
    assert "2 clips of 16 frames at stride 1" in found[0]["protocol"]
    assert found[0]["chance"]["R@1"] == pytest.approx(0.25, abs=0.02)
    if ranks == 1:
        return
    parts = [*probed, "--run", tmp_path / "parts", "--resume", "auto"]
    for stop in ("9", "12"):
        server.finish(*parts, "--stop_after_steps", stop, ranks=ranks)
    server.finish(*parts, ranks=ranks)
    assert_same(tmp_path / "parts", tmp_path / "plain")
    assert measured(tmp_path / "parts") == measured(tmp_path / "probed")
    assert [r["step"] for r in records(tmp_path / "parts", "probe")] == [0, 12, 12, 18]
    # With the evaluation's clips and sets it has the evaluation's figures, of rank 0's network.
    out = tmp_path / "report.json"
    succeed(
        *("eval/main.py", "retrieval", "--checkpoint", tmp_path / "probed", "--device", "cpu"),
        *("--train", labelled / "gallery", "--test", labelled / "query", "--out", out),
        *("--features.num_clips", "2", "--retrieval.variants", "false"),
    )
    figures = json.loads(out.read_text())["figures"]
    last = records(tmp_path / "probed", "probe")[-1]
    assert last["recall"] == figures["measured"]
    assert last["chance"] == pytest.approx(figures["chance"])


def test_the_probe_is_exported_as_metrics(
    server: ForkServer, probed: list[str | Path], tmp_path: Path
):
    port, run = free_port(), tmp_path / "run"
    more = ("--run", run, "--monitor.port", str(port), "--schedule.epochs", "200")
    (rank,) = server.start(*probed, *more)
    found: dict[str, float] = {}
    deadline = time.monotonic() + 90
    while found.get("strata_probe_epoch", 0) < 2:
        assert time.monotonic() < deadline
        assert not rank.over.is_set(), rank.text()
        time.sleep(0.1)
        try:
            found = scrape(port)
        except (urllib.error.URLError, ConnectionError):
            continue
    rank.kill()
    rank.wait()
    recall = measured(run)[6 * int(found["strata_probe_epoch"])]
    for k in (1, 5, 10, 20, 50):
        assert found[f'strata_probe_recall_ratio{{k="{k}"}}'] == recall[f"R@{k}"]
    accuracy = {r["step"]: r["accuracy"] for r in records(run, "probe")}
    for readout, value in accuracy[6 * int(found["strata_probe_epoch"])].items():
        assert found[f'strata_probe_accuracy_ratio{{readout="{readout}"}}'] == value
    assert found['strata_probe_chance_ratio{k="1"}'] == pytest.approx(0.25, abs=0.02)
    assert found['strata_activity_seconds_total{activity="probe"}'] > 0
    # What was trained on alone is counted.
    assert found["strata_samples_total"] == 4 * found["strata_steps_total"]


def test_what_does_not_fit_is_refused(
    server: ForkServer, probed: list[str | Path], labelled: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=r"give --probe\.train and --probe\.test"):
        ProbeConfig(every_epochs=1, train=labelled / "gallery")
    make_shards(tmp_path / "other", num_videos=6, num_classes=3, shard_size=6, seed=5)
    more = ("--run", tmp_path / "run", "--probe.test", tmp_path / "other")
    assert "have different classes (4 and 3" in server.finish(*probed, *more, code=2)
    assert not (tmp_path / "run").exists()
