"""The catalogue's form, the endpoint with password and TLS, a taken port, target files."""

import base64
import json
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from strata.distributed import World
from strata.errors import ConfigError, NotFiniteError
from strata.telemetry import scrape as scraping
from strata.telemetry.metrics import CATALOGUE, ExporterConfig, Metrics
from strata.telemetry.scrape import ScrapeServer, open_server
from strata.telemetry.serve import export_process
from strata.telemetry.targets import Target, TargetFile, run_name
from tests.support.commands import free_port, scrape

UNITS = {
    "seconds": ("_seconds", "_seconds_total"),
    "bytes": ("_bytes", "_bytes_total", "_bytes_read_total"),
    "ratio": ("_ratio",),
    "bytes/second": ("_bytes_per_second",),
    "samples/second": ("_samples_per_second",),
    "operations/second": ("_flops_per_second",),
    "watts": ("_watts",),
    "joules": ("_joules_total",),
    "celsius": ("_celsius",),
    "hertz": ("_hertz",),
    "unix time": ("_timestamp_seconds",),
}


def test_names_follow_prometheus_and_carry_their_unit():
    assert len({m.name for m in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert metric.name.startswith("strata_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert metric.advice.endswith("."), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert metric.max_series >= 1
        if metric.unit in UNITS:
            assert metric.name.endswith(UNITS[metric.unit]), metric.name
        assert (
            metric.kind != "gauge"
            or metric.absent
            or metric.name
            in (
                "strata_loss_chance",
                "strata_process_resident_memory_bytes",
                "strata_build_info",
                "strata_finished",
            )
        ), f"{metric.name}: when is it absent?"


def served(metrics: Metrics, config: ExporterConfig) -> ScrapeServer:
    server = open_server(metrics.registry, config, 0)
    assert server is not None
    return server


def test_what_is_set_is_served_and_logged(tmp_path: Path):
    metrics = Metrics(tmp_path / "log.jsonl")
    server = served(metrics, ExporterConfig())
    metrics.set("strata_loss", 1.5, term="instance")
    metrics.add("strata_samples_total", 8)
    metrics.observe("strata_step_duration_seconds", 0.2)
    found = scrape(server.server_port)
    assert found['strata_loss{term="instance"}'] == 1.5
    assert found["strata_samples_total"] == 8
    assert found["strata_step_duration_seconds_count"] == 1
    assert not [name for name in found if "_created" in name]
    assert found["strata_steps_total"] == 0
    # What nobody set is absent: 0 would be a lie, and set off alerts.
    assert "strata_grad_norm" not in found
    assert "strata_checkpoint_last_success_timestamp_seconds" not in found
    metrics.record("step", step=3)
    server.close()
    metrics.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3


def test_labels_cannot_grow_without_bound():
    metrics = Metrics()
    for number in range(16):
        metrics.set("strata_loss", 0.0, term=f"t{number}")
    metrics.set("strata_loss", 1.0, term="t3")
    with pytest.raises(ValueError, match="16 series already"):
        metrics.set("strata_loss", 0.0, term="one-more")


def test_a_role_has_its_own_metrics():
    with pytest.raises(KeyError):
        Metrics(role="preprocess").add("strata_steps_total", 1)
    Metrics(role="preprocess").add("strata_frames_sharded_total", 1)


def test_a_taken_port_is_a_warning(caplog: pytest.LogCaptureFixture):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert open_server(Metrics().registry, ExporterConfig(), port) is None
    assert f"127.0.0.1:{port}" in caplog.text
    assert "--monitor.port" in caplog.text


def test_a_password_is_asked_for(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("prometheus:sésame\n", encoding="utf-8")
    metrics = Metrics()
    server = served(metrics, ExporterConfig(password_file=secret))
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    for given in (None, "prometheus:wrong", "prometheus:s\xe9same\n"):
        request = urllib.request.Request(url)
        if given is not None:
            word = base64.b64encode(given.encode()).decode()
            request.add_header("Authorization", f"Basic {word}")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=5)
    request = urllib.request.Request(url)
    word = base64.b64encode("prometheus:sésame".encode()).decode()
    request.add_header("Authorization", f"Basic {word}")
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert b"strata_build_info" in answer.read()
    server.close()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost that is its own authority, and its key."""
    certificate, key = folder / "c.pem", folder / "k.pem"
    made = subprocess.run(
        [
            *"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split(),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-out", certificate, "-keyout", key),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    return certificate, key


def test_tls(tmp_path: Path):
    certificate, key = make_certificate(tmp_path)
    metrics = Metrics()
    server = served(metrics, ExporterConfig(certificate=certificate, key=key))
    context = ssl.create_default_context(cafile=str(certificate))
    url = f"https://127.0.0.1:{server.server_port}/metrics"
    with urllib.request.urlopen(url, timeout=5, context=context) as answer:
        assert b"strata_build_info" in answer.read()
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(url, timeout=5)
    server.close()
    key.write_text("no key")
    with pytest.raises(ConfigError, match="do not fit"):
        served(Metrics(), ExporterConfig(certificate=certificate, key=key))


def test_mutual_tls_refuses_clients_without_a_certificate(tmp_path: Path):
    certificate, key = make_certificate(tmp_path)
    metrics = Metrics()
    config = ExporterConfig(certificate=certificate, key=key, client_authority=certificate)
    server = served(metrics, config)
    url = f"https://127.0.0.1:{server.server_port}/metrics"
    context = ssl.create_default_context(cafile=str(certificate))
    with pytest.raises((ssl.SSLError, urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(url, timeout=5, context=context)
    context.load_cert_chain(certificate, key)
    with urllib.request.urlopen(url, timeout=5, context=context) as answer:
        assert b"strata_build_info" in answer.read()
    server.close()


def test_settings_that_do_not_fit_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"monitor\.port"):
        ExporterConfig(port=70_000)
    with pytest.raises(ConfigError, match="belong together"):
        ExporterConfig(certificate=tmp_path / "c")
    with pytest.raises(ConfigError, match="is not a file"):
        ExporterConfig(password_file=tmp_path / "gone")
    wrong = tmp_path / "wrong"
    wrong.write_text("nocolon")
    with pytest.raises(ConfigError, match="user:password"):
        ExporterConfig(password_file=wrong)


def test_a_run_is_called_by_its_path(tmp_path: Path):
    config = ExporterConfig(root=tmp_path)
    # Every run of a grid is called "run" by its last folder.
    assert run_name(config, tmp_path / "grid" / "a" / "run") == "grid/a/run"
    assert run_name(config, tmp_path / "grid" / "b" / "run") == "grid/b/run"
    assert run_name(ExporterConfig(), tmp_path / "run") == str(tmp_path / "run")
    assert run_name(ExporterConfig(name="mine"), tmp_path) == "mine"


def test_target_files_list_processes_for_prometheus(tmp_path: Path):
    config = ExporterConfig(file_sd=tmp_path / "targets", host="0.0.0.0", node="n7")
    files = []
    for run, rank in (("x/run", 0), ("x/run", 1), ("y/run", 0), ("x-run", 0)):
        target = Target.of(config, 9480 + rank, run=run, rank=rank, role="train")
        files.append(TargetFile(config, target))
    TargetFile(config, None)
    made = sorted((tmp_path / "targets").iterdir())
    # Names that read alike are files of their own.
    assert len(made) == 4
    (entry,) = (e for e in map(read_target, made) if e["labels"]["rank"] == "1")
    assert entry["targets"] == [f"{socket.gethostname()}:9481"]
    assert entry["labels"] == {
        **{"run": "x/run", "node": "n7", "rank": "1", "role": "train"},
        "__scheme__": "http",
    }
    files[1].add_reason(NotFiniteError("a loss is NaN"))
    ended = [e["labels"].get("ended") for e in map(read_target, made)]
    assert sorted(filter(None, ended)) == ["NotFiniteError"]
    for file in files:
        file.remove()
    assert not list((tmp_path / "targets").iterdir())


def read_target(path: Path) -> dict[str, Any]:
    (entry,) = json.loads(path.read_text())
    return entry


def exported(config: ExporterConfig, run: str = "a") -> AbstractContextManager[Metrics]:
    return export_process(config, role="evaluate", run=run, world=World(), places={})


def test_a_second_live_run_of_a_name_is_refused(tmp_path: Path):
    config = ExporterConfig(port=free_port(), file_sd=tmp_path)
    with exported(config):
        with pytest.raises(ConfigError, match=r"called 'a' \(evaluate\).*monitor\.name"):
            exported(ExporterConfig(port=free_port(), file_sd=tmp_path)).__enter__()
        with exported(ExporterConfig(port=free_port(), file_sd=tmp_path), run="b"):
            assert len(list(tmp_path.glob("*.json"))) == 2
    assert not list(tmp_path.iterdir())


def test_targets_are_served_without_a_shared_folder(monkeypatch: pytest.MonkeyPatch):
    # Who asks for targets is waited for at the end, and the test does not ask again.
    monkeypatch.setattr(scraping, "LAST_SCRAPE_S", 0.1)
    config = ExporterConfig(port=free_port())
    with (
        exported(config),
        urllib.request.urlopen(f"http://127.0.0.1:{config.port}/targets", timeout=5) as answer,
    ):
        assert answer.headers["Content-Type"] == "application/json"
        (entry,) = json.load(answer)
    assert entry["targets"] == [f"127.0.0.1:{config.port}"]
    assert entry["labels"]["run"] == "a"


def test_the_end_is_seen_by_the_next_scrape(tmp_path: Path):
    """A finished process waits for one more scrape; one that nobody watches does not."""
    seen: list[float] = []
    config = ExporterConfig(port=free_port(), file_sd=tmp_path)

    def scrape_twice() -> None:
        scrape(config.port)
        worked.set()
        ended.wait(10)
        time.sleep(0.3)
        seen.append(scrape(config.port)["strata_finished"])

    worked, ended = threading.Event(), threading.Event()
    prometheus = threading.Thread(target=scrape_twice)
    with exported(config):
        prometheus.start()
        worked.wait(10)
        ended.set()
    prometheus.join()
    assert seen == [1]
    # A fault leaves the target, with its reason.
    with pytest.raises(NotFiniteError), exported(config):
        raise NotFiniteError("a loss is NaN")
    (left,) = tmp_path.glob("*.json")
    assert read_target(left)["labels"]["ended"] == "NotFiniteError"
