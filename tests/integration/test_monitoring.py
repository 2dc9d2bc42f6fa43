"""A real Prometheus scrapes a real run of two ranks; each query of dashboards and rules runs.

A scrape that a busy machine delays past its limit takes all series away until the next, so what
must be there is asked for until it is.
"""

import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from strata.telemetry.catalogue import CATALOGUE
from strata.tools.dashboards import ROOT, dashboards, metric_names
from strata.tools.render_dashboards import draw, literal
from strata.tools.render_dashboards import prometheus as asking
from tests.support.commands import TINY, free_port, records, scrape
from tests.support.forked import ForkServer, Rank
from tests.support.prometheus import Prometheus, stop

ENTRIES = {entry.name: entry for entry in CATALOGUE}
PAGES = dashboards()


@dataclass(frozen=True)
class Watched:
    """A run that continues, and the Prometheus that watches it."""

    prometheus: Prometheus
    run: Path
    exporter: int

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The answer to an instant query."""
        return self.prometheus.query(expr)

    def eventually(
        self, expr: str, enough: Callable[[list[dict[str, Any]]], Any] = bool
    ) -> list[dict[str, Any]]:
        """The first answer that is enough, of half a minute's."""
        return self.prometheus.eventually(expr, enough)


def _wait(what: str, ready: Any, ranks: list[Rank]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for rank in ranks:
            assert not rank.over.is_set(), f"a rank ended: {rank.text()[-3000:]}"
        try:
            if ready():
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.5)
    raise AssertionError(f"{what} did not come: {ranks[0].text()[-3000:]}")


@pytest.fixture(scope="module")
def watched(
    server: ForkServer, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("monitoring")
    prometheus = Prometheus(folder, interval="1s")
    tiny = folder / "tiny.yaml"
    # All that the demo of a run does, and reports of each step.
    changed = {
        "monitor": TINY["monitor"] | {"verdict_s": 0},
        "checkpoint": {"every_steps": 6},
        # Late enough that Prometheus sees the first stage too.
        "schedule": TINY["schedule"] | {"second_stage_epoch": 5, "lr_drop_epochs": [30]},
    }
    tiny.write_text(yaml.safe_dump(TINY | changed))
    exporter, run = free_port(), folder / "run"
    ranks = server.start(
        *("--config", tiny, "--data.shards", shards / "train", "--run", run),
        *("--schedule.epochs", "10000", "--monitor.port", str(exporter)),
        *("--monitor.file_sd", folder / "targets", "--monitor.root", folder),
        *("--probe.every_epochs", "100", "--probe.num_clips", "1"),
        *("--probe.train", shards / "train", "--probe.test", shards / "test"),
        ranks=2,
        # It leaves the processors to Prometheus and to what looks at it.
        hook="tests.support.faults:slow_steps",
    )
    found = Watched(prometheus, run, exporter)
    try:
        _wait(
            "a checkpoint, a rate of both ranks and a switch of stages",
            lambda: (
                found.query("strata:checkpoint:age_seconds")
                and len(found.query("rate(strata_steps_total[20s]) > 0")) == 2
                and found.query("changes(strata_stage[1h]) > 0")
                and found.query("strata:step_duration:p95_5m")
            ),
            ranks,
        )
        yield found
    finally:
        stop(prometheus.process)


def test_both_ranks_are_found_and_labelled(watched: Watched):
    up = watched.eventually('up{job="strata"} == 1', lambda found: len(found) == 2)
    labels = [series["metric"] for series in up]
    assert {(found["run"], found["rank"], found["role"]) for found in labels} == {
        ("run", "0", "train"),
        ("run", "1", "train"),
    }
    assert len({found["node"] for found in labels}) == 1


def _reasons(query: str, shown: set[str]) -> list[str]:
    """Why a query may have no data: what the catalogue says of metrics that are not exported."""
    missing = [
        ENTRIES[name] for name in metric_names(query) if not any(s.startswith(name) for s in shown)
    ]
    return [
        entry.absent or f"only in {', '.join(entry.roles)}"
        for entry in missing
        if entry.absent or "train" not in entry.roles
    ]


def test_every_query_has_data_or_a_reason(watched: Watched):
    shown = {name.partition("{")[0] for name in scrape(watched.exporter)}
    queries = {
        (uid, panel["title"], literal(target["expr"], page), target["legendFormat"])
        for uid, page in PAGES.items()
        for panel in page["panels"]
        for target in panel.get("targets", ())
    }
    for path in (ROOT / "monitoring" / "rules").glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            queries |= {
                (path.name, rule["record"], rule["expr"], "")
                for rule in group["rules"]
                if "record" in rule
            }
            for rule in group["rules"]:
                if "alert" in rule:
                    # What an alert looks at may be there without its firing.
                    watched.query(rule["expr"])
    without = {}
    for where, title, query, legend in sorted(queries):
        if "< 0.001" in query:
            # A condition, whether the graph is the identity, which need not hold.
            watched.query(query)
            continue
        reasons = _reasons(query, shown)
        if title.startswith("Stalled"):
            reasons = ["The run makes steps."]
        # Health figures are there after a few more steps.
        soon = not reasons or reasons[0].startswith("Before `monitor.health_every`")
        found = watched.eventually(query) if soon else watched.query(query)
        if not found:
            without[f"{where}: {title}"] = reasons[0]
        for series in found:
            assert set(re.findall(r"{{(\w+)}}", legend)) <= set(series["metric"]), (title, legend)
    # A machine without GPUs: all else must be there.
    for title, reason in without.items():
        page, _, panel = title.partition(": ")
        gpu = page == "gpu" or "GPU" in panel or panel in ("JPEG engines", "Video decoders")
        gpu = gpu or panel.startswith("Stalled")
        assert gpu or panel in ("Videos per second", "Frames per second"), (title, reason)


def test_annotations_and_variables_have_data(watched: Watched):
    for page in PAGES.values():
        for annotation in page["annotations"]["list"]:
            query = literal(annotation["expr"], page)
            # A stage's switch is seen for a minute; it may be longer ago.
            query = query.replace("[1m]", "[1h]")
            for series in watched.eventually(query):
                if "useValueForTime" in annotation:
                    assert abs(float(series["value"][1]) / 1000 - time.time()) < 3600
        for variable in page["templating"]["list"][1:]:  # The first one is the data source.
            source = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
            assert source, variable
            name, label = source.groups()
            if not name.startswith("strata_gpu_"):
                assert all(label in series["metric"] for series in watched.eventually(name))


def test_the_dashboards_are_drawn(watched: Watched, tmp_path: Path):
    done = subprocess.run(
        [
            *(sys.executable, "tools/render_dashboards.py", "--url", watched.prometheus.url),
            *("--out", tmp_path, "--minutes", "1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for uid, page in PAGES.items():
        with Image.open(tmp_path / f"dashboard-{uid}.png") as picture:
            assert picture.width == 1200
            colours = picture.convert("RGB").getcolors(picture.width * picture.height)
            assert colours is not None
            assert len(colours) > 20
        axes = draw(page, asking(watched.prometheus.url, minutes=1)).axes
        texts = {" ".join(text.get_text().split()) for each in axes for text in each.texts}
        assert any(
            re.fullmatch(r"run: (data|compute|communication|host|checkpoint)", t) for t in texts
        )
        assert any("no data, as is normal where there is no GPU" in t for t in texts)
        assert not any("{{" in t for t in texts)
        assert any(each.collections for each in axes)


def test_no_alert_fires_on_a_sound_run(watched: Watched):
    firing = watched.query('ALERTS{alertstate="firing"}')
    assert not firing, firing


def test_the_catalogue_is_what_is_exported(watched: Watched):
    shown = {name.partition("{")[0] for name in scrape(watched.exporter)}
    known = {n for n in shown if n in ENTRIES}
    for name in shown - known:
        family = name.rpartition("_")[0]
        assert family in ENTRIES, f"{name} is not in the catalogue"
        assert ENTRIES[family].kind == "histogram", name
    for entry in CATALOGUE:
        if "train" in entry.roles and not entry.absent:
            assert any(n.startswith(entry.name) for n in shown), f"{entry.name} is not exported"


def test_the_bottleneck_is_reported_with_its_numbers(watched: Watched):
    verdicts = records(watched.run, "verdict")
    assert verdicts
    assert sum(verdicts[-1]["shares"].values()) == pytest.approx(1)
    # Between the settings of two of its series a scrape may see none or two.
    (chosen,) = watched.eventually('strata_bound{rank="0"} == 1', lambda found: len(found) == 1)
    assert chosen["metric"]["by"] in verdicts[-1]["shares"]
