"""W&B's offline file and MLflow's local store have the same figures under the same names."""

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.telemetry.loggers import MlflowLogger, WandbLogger
from strata.telemetry.metrics import Metrics
from strata.train.config import MonitorConfig

SETTINGS = {"data.batch_size": 4, **{f"many.{k}": k for k in range(120)}}
EXPECTED = {
    "losses/instance": {1: 1.5, 2: 2.5, 3: 3.5},
    "stage": {1: 1.0, 2: 1.0, 3: 1.0},
    "probe/recall/R@1": {3: 0.5},
}


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after a header of 7 bytes."""
    place, parts = 7, []
    while place + 7 <= len(content):
        if (left := 32_768 - place % 32_768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # A complete record, or the last part of one.
            yield b"".join(parts)
            parts = []


def run(logger: WandbLogger | MlflowLogger, first: int, last: int) -> None:
    metrics = Metrics()
    metrics.add_listener(logger)
    metrics.record("start", step=first)
    for step in range(first + 1, last + 1):
        losses = {"instance": 0.5 + step}
        metrics.record("step", step=step, losses=losses, grad_norm=None, ok=True, stage=1)
    metrics.record("probe", step=last, recall={"R@1": 0.5}, protocol="words")
    logger.close()
    metrics.close()


def test_mlflow_has_every_number_and_one_run_for_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow", reason="the optional package mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    folder = tmp_path / "run"
    run(MlflowLogger(folder, SETTINGS), 0, 2)
    run(MlflowLogger(folder, SETTINGS), 2, 3)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("strata")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["data.batch_size"] == "4"
    assert len(found.data.params) == 121
    for name, values in EXPECTED.items():
        history = client.get_metric_history(found.info.run_id, name.replace("@", "_at_"))
        kept = {entry.step: entry.value for entry in history}
        assert {k: kept[k] for k in values} == values
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing:/here")
    with pytest.raises(ConfigError, match="correct MLFLOW_TRACKING_URI"):
        MlflowLogger(folder, SETTINGS)


def test_wandb_has_every_number_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    folder = tmp_path / "run"
    folder.mkdir()
    run(WandbLogger(folder, SETTINGS), 0, 3)
    (path,) = folder.rglob("*.wandb")
    found: dict[str, dict[int, float]] = {}
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        items = {("/".join(i.nested_key) or i.key): i.value_json for i in record.history.item}
        for name, value in items.items():
            found.setdefault(name, {})[int(items["step"])] = float(value)
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    for file in folder.rglob("*"):
        assert not file.is_file() or b"kkkkkkkk" not in file.read_bytes()


def test_without_the_package_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"install strata-video\[{name}\]"):
            MonitorConfig(wandb=name == "wandb", mlflow=name == "mlflow")
