"""The catalogue's names, the endpoint, and what a machine without NVML shows."""

import json
import socket
from pathlib import Path

import pynvml
import pytest

from strata.hardware import GpuCollector
from strata.metrics import CATALOGUE, Metrics
from tests.commands import scrape


def test_names_follow_prometheus():
    assert len({m.name for m in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert metric.name.startswith("strata_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")


def test_what_is_set_is_served_and_logged(tmp_path: Path):
    metrics = Metrics(tmp_path / "log.jsonl")
    port = metrics.serve("127.0.0.1", 0)
    assert port
    metrics.set("strata_loss", 1.5, term="instance")
    metrics.add("strata_samples_total", 8)
    metrics.observe("strata_step_duration_seconds", 0.2)
    found = scrape(port)
    assert found['strata_loss{term="instance"}'] == 1.5
    assert found["strata_samples_total"] == 8
    assert found["strata_step_duration_seconds_count"] == 1
    metrics.record("step", step=3)
    metrics.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3


def test_a_taken_port_warns_and_goes_on(caplog: pytest.LogCaptureFixture):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert Metrics().serve("127.0.0.1", port) is None
    assert f"127.0.0.1:{port}" in caplog.text
    assert "--monitor.port" in caplog.text


class FakeNvml:
    """NVML as documented: one GPU without JPEG engine, percentages, milliwatts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, present: bool):
        def init():
            if not present:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

        def unsupported(_):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        answers = {
            "nvmlInit": init,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetUtilizationRates": lambda _: type("U", (), {"gpu": 87}),
            "nvmlDeviceGetMemoryInfo": lambda _: type("M", (), {"used": 2**30}),
            "nvmlDeviceGetPowerUsage": lambda _: 350_000,
            "nvmlDeviceGetTemperature": lambda _, __: 61,
            "nvmlDeviceGetDecoderUtilization": lambda _: [12, 1000],
            "nvmlDeviceGetJpgUtilization": unsupported,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)


def test_gpu_readings_have_base_units(monkeypatch: pytest.MonkeyPatch):
    FakeNvml(monkeypatch, present=True)
    families = {f.name: f.samples[0] for f in GpuCollector("abc").collect()}
    values = {name: sample.value for name, sample in families.items()}
    assert values == pytest.approx(
        {
            "strata_gpu_utilization_ratio": 0.87,
            "strata_gpu_memory_used_bytes": 2**30,
            "strata_gpu_power_watts": 350,
            "strata_gpu_temperature_celsius": 61,
            "strata_gpu_decoder_utilization_ratio": 0.12,
        }
    )
    assert families["strata_gpu_power_watts"].labels == {"gpu": "GPU-abc"}


def test_without_nvml_nothing_is_shown(monkeypatch: pytest.MonkeyPatch):
    FakeNvml(monkeypatch, present=False)
    assert list(GpuCollector("abc").collect()) == []
