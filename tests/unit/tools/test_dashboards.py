"""Dashboards, rules, docs and catalogue agree; each alert fires when it should and only then."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from strata.catalogue import CATALOGUE
from strata.tools.dashboards import PAGES, ROOT, dashboard, expand, files, metric_names

NAMES = {entry.name for entry in CATALOGUE}
RULES = ROOT / "monitoring" / "rules"
GRAFANA_UNITS = {
    *("short", "percentunit", "s", "bytes", "Bps", "watt", "celsius", "hertz", "flops"),
}
GRAFANA_PANELS = {"timeseries", "stat", "row"}


def rules() -> list[dict[str, Any]]:
    found = []
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += group["rules"]
    return found


def test_generated_files_are_those_of_the_catalogue():
    for path, content in files().items():
        assert path.read_text() == content, f"{path}: run python tools/dashboards.py"


def test_every_metric_is_on_a_dashboard():
    shown = {name for page in PAGES for panel in page.panels for name in panel.metrics}
    assert shown <= NAMES
    assert NAMES - shown == {"strata_loss_chance"} - shown, NAMES - shown


def test_rules_use_the_catalogue_and_what_is_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        used = metric_names(re.sub(r"strata:[a-z0-9_:]+", "", rule["expr"]))
        assert used <= NAMES, rule
        assert set(re.findall(r"strata:[a-z0-9_:]+", rule["expr"])) <= recorded, rule
        if "alert" in rule:
            assert rule["annotations"]["action"]
            assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_a_dashboard_is_whole(page: Any):
    made = json.loads(json.dumps(dashboard(page)))
    assert made["uid"] == f"strata-{page.uid}"
    variables = {v["name"] for v in made["templating"]["list"]}
    assert {"run", "node"} <= variables
    assert [a["name"] for a in made["annotations"]["list"]] == ["Checkpoint", "Stage"]
    numbers = [p["id"] for p in made["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        assert panel["type"] in GRAFANA_PANELS
        assert panel["title"]
        grid = panel["gridPos"]
        assert 0 <= grid["x"] < grid["x"] + grid["w"] <= 24
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"] in GRAFANA_UNITS
        assert panel["description"]
        assert panel["targets"]
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert metric_names(target["expr"]) <= NAMES
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, target
            assert target["datasource"]["uid"] == "strata"
    for panel in page.panels:
        for query, _ in panel.queries:
            assert "$" not in expand(query, page, literal=True)


def test_provisioning_and_compose_name_what_is_there():
    folder = ROOT / "monitoring"
    source = yaml.safe_load((folder / "grafana/provisioning/datasources/strata.yaml").read_text())
    assert source["datasources"][0]["uid"] == "strata"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for service in compose.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), "pin the image"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (folder / source).exists(), source
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / "grafana/dashboards" / Path(home).name).exists()


_T = '{run="a", node="n", rank="0", role="train", job="strata"}'


def _with(**labels: str) -> str:
    return _T[:-1] + "".join(f', {name}="{value}"' for name, value in labels.items()) + "}"


_GPU = _with(gpu="G")
# For each alert: series (by promtool's notation) at which it fires and at which it does not, with
# a step of a minute, after so many minutes.
ALERTS: dict[str, tuple[int, dict[str, str], dict[str, str]]] = {
    "StrataGpuIdle": (
        6,
        {f"strata_gpu_utilization_ratio{_GPU}": "0.01x10"},
        {f"strata_gpu_utilization_ratio{_GPU}": "0.01x3 0.9x10"},
    ),
    "StrataGpuLost": (
        1,
        {f"strata_gpu_up{_GPU}": "1 0"},
        {f"strata_gpu_up{_GPU}": "1 1"},
    ),
    "StrataDataBound": (
        6,
        {"strata_bound" + _with(by="data"): "1x10"},
        {"strata_bound" + _with(by="data"): "1x3 0x10"},
    ),
    "StrataDecoderSaturated": (
        12,
        {
            f"strata_gpu_jpeg_utilization_ratio{_GPU}": "0.99x15",
            f"strata_data_wait_seconds_total{_T}": "0+30x15",
        },
        {
            f"strata_gpu_jpeg_utilization_ratio{_GPU}": "0.99x15",
            f"strata_data_wait_seconds_total{_T}": "0x15",
        },
    ),
    "StrataLossNotFinite": (
        2,
        {"strata_loss" + _with(term="total"): "1 2 NaN"},
        {"strata_loss" + _with(term="total"): "1 2 3"},
    ),
    "StrataLossAtChance": (
        35,
        {
            "strata_loss" + _with(term="instance"): "6.2x40",
            "strata_loss_chance" + _with(term="instance"): "6.23x40",
        },
        {
            "strata_loss" + _with(term="instance"): "6.2x20 4x20",
            "strata_loss_chance" + _with(term="instance"): "6.23x40",
        },
    ),
    "StrataCollapse": (
        12,
        {"strata_health" + _with(measure="embedding_std"): "0.01x15"},
        {"strata_health" + _with(measure="embedding_std"): "0.8x15"},
    ),
    "StrataStraggler": (
        7,
        {f"strata_straggler_ratio{_T}": "1.8x10"},
        {f"strata_straggler_ratio{_T}": "1.1x10"},
    ),
    "StrataNoCheckpoint": (
        70,
        {f"strata_checkpoint_last_success_timestamp_seconds{_T}": "0x80"},
        {f"strata_checkpoint_last_success_timestamp_seconds{_T}": "0+60x80"},
    ),
    "StrataNeverCheckpoint": (
        70,
        {f"strata_step{_T}": "1+1x80"},
        {
            f"strata_step{_T}": "1+1x80",
            f"strata_checkpoint_last_success_timestamp_seconds{_T}": "0+60x80",
        },
    ),
    "StrataDiskFilling": (
        90,
        {
            "strata_disk_free_bytes" + _with(place="run"): "1000-5x100",
            "strata_disk_size_bytes" + _with(place="run"): "2000x100",
        },
        {
            "strata_disk_free_bytes" + _with(place="run"): "1000x100",
            "strata_disk_size_bytes" + _with(place="run"): "2000x100",
        },
    ),
    "StrataExporterDown": (2, {f"up{_T}": "1 0x10"}, {f"up{_T}": "1x10"}),
}


def test_every_alert_is_tested():
    assert set(ALERTS) == {rule["alert"] for rule in rules() if "alert" in rule}


def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool: install Debian's package prometheus (apt-get install prometheus)")
    return found


def test_promtool_accepts_the_configuration():
    command = [promtool(), "check", "config", ROOT / "monitoring" / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout + done.stderr


def _fires(alert: str, minutes: int, series: dict[str, str], tmp_path: Path) -> bool:
    """Whether promtool says that the alert fires: it fails a test that expects silence."""
    test = {
        "rule_files": [str(path) for path in sorted(RULES.glob("*.yml"))],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "alert_rule_test": [
                    {"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": []}
                ],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool(), "test", "rules", str(path)], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode:
        assert "got:[" in said, said
        assert alert in said
    return done.returncode != 0


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_an_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path):
    minutes, firing, quiet = ALERTS[alert]
    assert _fires(alert, minutes, firing, tmp_path)
    assert not _fires(alert, minutes, quiet, tmp_path)
