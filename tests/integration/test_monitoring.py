"""A real Prometheus scrapes a real run of two ranks; each query of dashboards and rules runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from strata.catalogue import CATALOGUE
from strata.tools.dashboards import PAGES, ROOT, expand, metric_names
from tests.commands import TINY, free_port, records, scrape

ENTRIES = {entry.name: entry for entry in CATALOGUE}


@dataclass(frozen=True)
class Watched:
    """A run that goes on, and the Prometheus that watches it."""

    url: str
    run: Path
    exporter: int

    def query(self, expr: str) -> list[dict[str, Any]]:
        """What Prometheus answers to an instant query."""
        asked = urllib.parse.urlencode({"query": expr})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{asked}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]["result"]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; a launcher does not always take its ranks along."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(what: str, ready: Any, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        for process in processes:
            assert process.poll() is None, f"{process.args} ended: {log.read_text()[-3000:]}"
        try:
            if ready():
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.5)
    raise AssertionError(f"{what} did not come: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def watched(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus: install Debian's package (apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("monitoring")
    shutil.copytree(ROOT / "monitoring" / "rules", folder / "rules")
    settings = (ROOT / "monitoring" / "prometheus.yml").read_text()
    for slow in ("scrape_interval: 5s", "evaluation_interval: 15s", "refresh_interval: 5s"):
        assert slow in settings
        settings = settings.replace(slow, slow.split()[0] + " 1s")
    (folder / "prometheus.yml").write_text(settings)
    tiny = folder / "tiny.yaml"
    # All that the demo of a run does, and reports of each step.
    changed = {"monitor": TINY["monitor"] | {"verdict_s": 0}, "checkpoint": {"every_steps": 6}}
    tiny.write_text(yaml.safe_dump(TINY | changed))
    port, exporter, run = free_port(), free_port(), folder / "run"
    log = folder / "log"
    with log.open("wb") as out:
        trainer = subprocess.Popen(
            [
                *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"),
                *("--master_port", str(free_port()), "train/main.py", "--config", str(tiny)),
                *("--data.shards", str(shards / "train"), "--run", str(run)),
                *("--schedule.epochs", "10000", "--monitor.port", str(exporter)),
                *("--monitor.file_sd", str(folder / "targets")),
            ],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        prometheus = subprocess.Popen(
            [
                *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    found = Watched(f"http://127.0.0.1:{port}", run, exporter)
    both = [trainer, prometheus]
    try:
        _wait(
            "a checkpoint and a rate of both ranks",
            lambda: (
                found.query("strata:checkpoint:age_seconds")
                and len(found.query("rate(strata_steps_total[20s]) > 0")) == 2
                and found.query("strata_stage == 2")
                and found.query("strata:step_duration:p95_5m")
            ),
            both,
            log,
        )
        yield found
    finally:
        _stop(trainer)
        _stop(prometheus)


def test_both_ranks_are_found_and_labelled(watched: Watched):
    labels = [series["metric"] for series in watched.query('up{job="strata"} == 1')]
    assert {(found["run"], found["rank"], found["role"]) for found in labels} == {
        ("run", "0", "train"),
        ("run", "1", "train"),
    }
    assert len({found["node"] for found in labels}) == 1


def test_every_query_has_data_or_a_reason(watched: Watched):
    shown = {name.partition("{")[0] for name in scrape(watched.exporter)}
    queries = {
        (page.uid, panel.title, expand(query, page, literal=True))
        for page in PAGES
        for panel in page.panels
        for query, _ in panel.queries
    }
    for path in (ROOT / "monitoring" / "rules").glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            # What an alert looks at must be there, whether or not it fires.
            queries |= {
                (path.name, rule["record"], rule["expr"])
                for rule in group["rules"]
                if "record" in rule
            }
            for rule in group["rules"]:
                if "alert" in rule:
                    watched.query(rule["expr"])
    reasons = {}
    for where, title, query in sorted(queries):
        if watched.query(query):
            continue
        missing = [
            ENTRIES[name]
            for name in metric_names(query)
            if not any(s.startswith(name) for s in shown)
        ]
        stated = [
            entry.absent or f"only in {', '.join(entry.roles)}"
            for entry in missing
            if entry.absent or "train" not in entry.roles
        ]
        assert stated, f"{where}: {title}: no data and no reason: {query}"
        reasons[f"{where}: {title}"] = stated[0]
    # A machine without GPUs: all else must be there.
    for title in reasons:
        page, _, panel = title.partition(": ")
        allowed = ("Norm of the gradient", "MFU: model FLOPs utilisation", "Samples a kilojoule")
        gpu = page == "gpu" or panel in ("JPEG engines", "Video decoders")
        assert gpu or panel in allowed or panel.endswith("s a second"), (title, reasons[title])


def test_no_alert_fires_on_a_sound_run(watched: Watched):
    firing = watched.query('ALERTS{alertstate="firing"}')
    assert not firing, firing


def test_the_catalogue_is_what_is_exported(watched: Watched):
    shown = {name.partition("{")[0] for name in scrape(watched.exporter)}
    shown = {n for n in shown if not n.endswith("_created")}
    known = {n for n in shown if n in ENTRIES}
    for name in shown - known:
        family = name.rpartition("_")[0]
        assert family in ENTRIES, f"{name} is not in the catalogue"
        assert ENTRIES[family].kind == "histogram", name
    for entry in CATALOGUE:
        if "train" in entry.roles and not entry.absent:
            assert any(n.startswith(entry.name) for n in shown), f"{entry.name} is not exported"


def test_the_verdict_is_said_with_its_numbers(watched: Watched):
    verdicts = records(watched.run, "verdict")
    assert verdicts
    assert sum(verdicts[-1]["shares"].values()) == pytest.approx(1)
    (chosen,) = watched.query('strata_bound{rank="0"} == 1')
    assert chosen["metric"]["by"] in verdicts[-1]["shares"]
