"""Dashboards, rules, docs and catalogue agree; each alert fires when it should and only then."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg

from strata.errors import StrataError
from strata.telemetry.catalogue import CATALOGUE
from strata.tools.dashboards import ROOT, Panel, dashboards, files, metric_names
from strata.tools.render_dashboards import draw, literal

NAMES = {entry.name for entry in CATALOGUE}
RULES = ROOT / "monitoring" / "rules"
GRAFANA_UNITS = {
    *("short", "percentunit", "s", "bytes", "Bps", "watt", "celsius", "hertz", "flops"),
}
GRAFANA_PANELS = {"timeseries", "stat", "row"}
PAGES = dashboards()


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
    shown = {
        name
        for made in PAGES.values()
        for panel in made["panels"]
        for target in panel.get("targets", ())
        for name in metric_names(target["expr"])
    }
    assert shown <= NAMES
    assert NAMES - shown == {"strata_loss_chance"} - shown, NAMES - shown


def test_rules_use_the_catalogue_and_what_is_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        used = metric_names(re.sub(r"strata:[a-z0-9_:]+", "", rule["expr"]))
        assert used <= NAMES, rule
        assert set(re.findall(r"strata:[a-z0-9_:]+", rule["expr"])) <= recorded, rule


def test_each_alert_has_a_paragraph_and_a_panel_and_names_no_rank_or_term():
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    panels = {
        (page["uid"], str(panel["id"])): panel
        for page in PAGES.values()
        for panel in page["panels"]
    }
    for rule in rules():
        if "alert" not in rule:
            continue
        notes = rule["annotations"]
        assert notes["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert f"\n## {rule['alert']}\n" in runbook
        panel = panels[notes["__dashboardUid__"], notes["__panelId__"]]
        assert notes["dashboard"].startswith(
            f"/d/{notes['__dashboardUid__']}?viewPanel={panel['id']}"
        )
        assert rule["labels"]["severity"] in ("warning", "critical")
        for labels in re.findall(r"^\(?(?:\w+) by \(([\w, ]+)\)", rule["expr"]):
            assert not {"rank", "term"} & set(labels.split(", ")), rule["alert"]


@pytest.mark.parametrize("uid", PAGES)
def test_a_dashboard_is_complete(uid: str):
    made = json.loads(json.dumps(PAGES[uid]))
    assert made["uid"] == f"strata-{uid}"
    variables = {v["name"] for v in made["templating"]["list"]}
    assert {"run", "node", "datasource"} <= variables
    # The source is chosen at the import, or is the default one where files provision.
    assert [source["name"] for source in made["__inputs"]] == ["DS_PROMETHEUS"]
    (source,) = (v for v in made["templating"]["list"] if v["name"] == "datasource")
    assert source["current"]["value"] == "${DS_PROMETHEUS}"
    assert [a["name"] for a in made["annotations"]["list"]] == ["Checkpoint", "Stage"]
    for annotation in made["annotations"]["list"]:
        assert metric_names(annotation["expr"]) <= NAMES
        assert set(re.findall(r"\$(\w+)", annotation["expr"])) <= variables
    assert made["panels"][0]["title"] == "Is the hardware doing useful work, and if not, why?"
    assert made["panels"][1]["title"] == "Bottleneck"
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
        assert panel["fieldConfig"]["defaults"]["noValue"].startswith("no data")
        assert panel["targets"]
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert metric_names(target["expr"]) <= NAMES
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, target
            assert target["datasource"]["uid"] == "${datasource}"
            assert "$" not in literal(target["expr"], made)


def test_states_are_those_of_now_and_not_of_the_time_range():
    for panel in (p for made in PAGES.values() for p in made["panels"] if "targets" in p):
        now = [t.get("instant", False) and not t["range"] for t in panel["targets"]]
        assert set(now) == {panel["type"] == "stat"}, panel["title"]


def test_what_belongs_to_a_machine_is_counted_once():
    shared = {e.name for e in CATALOGUE if e.section in ("GPU", "Host")}
    for panel in (p for made in PAGES.values() for p in made["panels"] if "targets" in p):
        for target in panel["targets"]:
            if metric_names(target["expr"]) & shared and "samples" not in target["expr"]:
                grouped = re.match(r"(max|min|avg) by \(([\w, ]+)\)", target["expr"])
                assert grouped, target["expr"]
                by = set(grouped[2].split(", "))
                assert by & {"node", "disk", "run"}, target["expr"]
                assert "rank" not in by, target["expr"]


def test_instant_queries_are_asked_as_such():
    asked: dict[str, bool] = {}

    def ask(expr: str, instant: bool) -> list[dict[str, Any]]:
        asked[expr] = instant
        return []

    draw(PAGES["data"], ask)
    assert asked['max by (run, by) (strata_bound{run=~".*", node=~".*"}) == 1']
    assert not asked['avg by (run, part) (strata_time_share_ratio{run=~".*", node=~".*"})']


def test_a_panel_has_one_source_of_data():
    with pytest.raises(ValueError, match="give one of gauge, rate and queries"):
        Panel(title="empty")
    with pytest.raises(ValueError, match="give one of gauge, rate and queries"):
        Panel(title="two", gauge="strata_step", rate="strata_steps_total")
    with pytest.raises(ValueError, match="strata_stop is not a metric"):
        Panel(title="misspelled", gauge="strata_stop")


def _texts(figure: Any) -> set[str]:
    found = {text.get_text() for text in figure.texts}
    for axes in figure.axes:
        found |= {text.get_text() for text in axes.texts}
        if axes.get_legend() is not None:
            found |= {text.get_text() for text in axes.get_legend().get_texts()}
    return found


def _answer(expr: str, instant: bool) -> list[dict[str, Any]]:
    """A run with two parts of time, the first of which ended before the last of three scrapes."""
    if "strata_time_share_ratio" in expr and "compute" not in expr:
        return [
            {
                "metric": {"run": "a", "part": part},
                "values": [[0, "0.25"], [15, "0.5"], [30, "NaN"]],
            }
            for part in ("data", "compute")
        ]
    if "strata_time_share_ratio" in expr:
        return [{"metric": {"run": "a"}, "values": [[0, "0.9"], [15, "0.4"], [30, "NaN"]]}]
    return []


def test_a_rendering_follows_the_fields_of_the_json():
    figure = draw(PAGES["data"], _answer)
    assert figure.get_figwidth() == 12
    texts = _texts(figure)
    # The last value that is not null, in the colour of its threshold; one text of empty panels.
    assert "40 %" in texts
    (value,) = (t for axes in figure.axes for t in axes.texts if t.get_text() == "40 %")
    assert value.get_color() == "#f2495c"
    assert {"a data", "a compute"} <= texts
    assert any(t.startswith("no data, as is normal") for t in texts)
    assert any("This is not Grafana." in t for t in texts)
    # Areas on top of each other in their parts' colours: 0.25 and 0.5, on as much again.
    (axes,) = (a for a in figure.axes if a.collections)
    assert axes.get_ylim()[0] == 0
    tops = [np.asarray(area.get_paths()[0].vertices)[:, 1].max() for area in axes.collections]
    assert tops == [0.5, 1.0]
    faces = [np.asarray(area.get_facecolor())[0] for area in axes.collections]
    colours = [matplotlib.colors.to_hex(tuple(face)) for face in faces]
    assert colours == ["#ff9830", "#73bf69"]
    # The areas are seen: no frame is drawn over them.
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).reshape(-1, 4)[:, :3].tolist()
    for red, green, blue in ((0xFF, 0x98, 0x30), (0x73, 0xBF, 0x69)):
        assert pixels.count([red, green, blue]) > 1000


def test_a_reducer_that_cannot_be_drawn_is_refused():
    made = json.loads(json.dumps(PAGES["data"]))
    (panel,) = (p for p in made["panels"] if p["title"] == "Time in useful work")
    panel["options"]["reduceOptions"]["calcs"] = ["mean"]
    with pytest.raises(StrataError, match="only the reducer lastNotNull"):
        draw(made, _answer)


def test_marks_are_where_annotations_have_values():
    def ask(expr: str, instant: bool) -> list[dict[str, Any]]:
        if "changes" in expr:
            times = [0, 15, 30, 300, 315]
            return [{"metric": {"run": "a"}, "values": [[t, "1"] for t in times]}]
        if expr.startswith("1000 *"):
            values = ["60000", "60000", "90000"]
            return [{"metric": {"run": "a"}, "values": [[t, v] for t, v in enumerate(values)]}]
        if "own_step" in expr:
            return [{"metric": {"run": "a", "rank": "0"}, "values": [[-5, "1"], [400, "1"]]}]
        return []

    (axes,) = (a for a in draw(PAGES["data"], ask).axes if a.lines)
    places = {
        (round(float(np.asarray(line.get_xdata())[0]) * 86_400), line.get_color())
        for line in axes.lines[1:]
    }
    assert places == {(60, "#5794f2"), (90, "#5794f2"), (0, "#b877d9"), (300, "#b877d9")}


def test_provisioning_and_compose_name_what_is_there():
    folder = ROOT / "monitoring"
    source = yaml.safe_load((folder / "grafana/provisioning/datasources/strata.yaml").read_text())
    assert source["datasources"][0]["uid"] == "strata"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for service in compose.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), "pin the image"
        # On the host's network, so each must be set to answer on loopback alone.
        assert service["network_mode"] == "host"
        assert "ports" not in service
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (folder / source).exists(), source
    assert "--web.listen-address=127.0.0.1:9090" in compose["prometheus"]["command"]
    assert compose["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / "grafana/dashboards" / Path(home).name).exists()


_T = '{run="a", node="n", rank="0", role="train", job="strata"}'


def _with(**labels: str) -> str:
    return _T[:-1] + "".join(f', {name}="{value}"' for name, value in labels.items()) + "}"


def _rank(rank: str, **labels: str) -> str:
    return _with(**labels).replace('rank="0"', f'rank="{rank}"')


def _disk(free: str, size: str = "1000x100", run: str = "a") -> dict[str, str]:
    """A disk's series, in GB."""
    labels = _with(place="run", disk="n:/").replace('run="a"', f'run="{run}"')
    found = {"free": free, "size": size if "stale" not in free else "1000x79 stale"}
    return {f"strata_disk_{name}_bytes{labels}": _giga(value) for name, value in found.items()}


def _giga(values: str) -> str:
    """Each number of promtool's notation, but for the counts, with nine zeros."""
    return re.sub(r"(?<![x\d])(\d+)", r"\g<1>000000000", values)


_GPU = _with(gpu="G")
_LIVE = {f"strata_finished{_T}": "0x400"}
_DONE = {f"strata_finished{_T}": "1x400"}
_UP = {f"strata_gpu_up{_GPU}": "1x400"}
# For each alert: after so many minutes, series (by promtool's notation, a value a minute) at which
# it fires, a set for each of its conditions, and at which it does not.
Sets = list[dict[str, str]]
ALERTS: dict[str, tuple[int, Sets, Sets]] = {
    "StrataRankLost": (
        3,
        [
            {f"up{_T}": "1 0x10", **_LIVE},
            # Killed, and named by the text; the other rank says that it has lost a peer.
            {
                f"up{_T}": "1 0x10",
                "up" + _rank("1", ended="LostPeerError"): "_ 0x10",
            },
        ],
        [
            {f"up{_T}": "1x10", **_LIVE},
            # Ended, and its target is still listed.
            {f"up{_T}": "1 0x10", f"strata_finished{_T}": "1 stale"},
            # One failed scrape.
            {f"up{_T}": "1 1 1 0 1", **_LIVE},
        ],
    ),
    "StrataRankUnwatched": (
        7,
        [{f"up{_T}": "1x10", f"strata_world_size{_T}": "2x10"}],
        [
            {f"up{_T}": "1x10", f"up{_rank('1')}": "1x10", f"strata_world_size{_T}": "2x10"},
            # All of them died: the other alert's.
            {f"up{_T}": "1 0x10", f"strata_world_size{_T}": "2 stale"},
        ],
    ),
    "StrataNoProgress": (
        1,
        [{"strata_bound" + _with(by="stalled"): "0 1"}],
        [
            {"strata_bound" + _with(by="stalled"): "0 0", "strata_bound" + _with(by="data"): "1 1"},
            {"strata_bound" + _with(by="stalled"): "1 stale"},
        ],
    ),
    "StrataLossNotFinite": (
        2,
        [
            {"strata_loss" + _with(term="total"): "1 2 NaN", **_LIVE},
            {"strata_loss" + _with(term="total"): "1 2 Inf", **_LIVE},
            # A NaN in three terms on two ranks.
            {f"strata_skipped_steps_total{_T}": "0 0 1", **_LIVE}
            | {f"strata_skipped_steps_total{_rank('1')}": "0 0 1"}
            | {"strata_loss" + _with(term=term): "1 2 NaN" for term in ("total", "a", "b")},
        ],
        [
            {
                "strata_loss" + _with(term="total"): "1 2 3",
                f"strata_skipped_steps_total{_T}": "1 1 1",
                **_LIVE,
            },
            {f"strata_skipped_steps_total{_T}": "0 1 1", **_DONE},
            {f"strata_skipped_steps_total{_T}": "0 1 stale", f"strata_finished{_T}": "0 0 stale"},
        ],
    ),
    "StrataCheckpointFailed": (
        3,
        [{f"strata_checkpoint_failures_total{_T}": "0 0 1 1", **_LIVE}],
        [
            {f"strata_checkpoint_failures_total{_T}": "0x5", **_LIVE},
            {f"strata_checkpoint_failures_total{_T}": "0 1x5", **_DONE},
        ],
    ),
    "StrataNoCheckpoint": (
        70,
        [{f"strata_checkpoint_last_success_timestamp_seconds{_T}": "0x80"}],
        [{f"strata_checkpoint_last_success_timestamp_seconds{_T}": "0+60x80"}],
    ),
    "StrataNeverCheckpoint": (
        70,
        [{f"strata_step{_T}": "1+1x80"}],
        [
            {
                f"strata_step{_T}": "1+1x80",
                f"strata_checkpoint_last_success_timestamp_seconds{_T}": "0+60x80",
            },
            {f"strata_step{_T}": "1+1x60 stale"},
        ],
    ),
    "StrataDiskFilling": (
        90,
        [
            # By its trend, and because little is left; two runs on one disk.
            {**_disk("450-3x100"), **_disk("450-3x100", run="b")},
            _disk("40x100"),
        ],
        [
            _disk("500x100"),
            # A run of two minutes whose disk has 61 GB of 1000 free, while and after it ran.
            _disk("_x88 70 61 61"),
            _disk("_x78 70 61 stale"),
            # 5 % of 100 TB.
            _disk("4000x100", size="100000x100"),
            # It would be full in four hours, but most of it is free.
            _disk("900-3x100"),
        ],
    ),
    "StrataGpuLost": (1, [{f"strata_gpu_up{_GPU}": "1 0"}], [{f"strata_gpu_up{_GPU}": "1 1"}]),
    "StrataGpuXid": (
        3,
        [{f"strata_gpu_xid_errors_total{_GPU}": "0 0 1 1", **_UP}],
        [
            {f"strata_gpu_xid_errors_total{_GPU}": "0x5", **_UP},
            {f"strata_gpu_xid_errors_total{_GPU}": "0 1 1 stale"},
        ],
    ),
    "StrataGpuRowsRemapped": (
        1,
        [{f"strata_gpu_row_remap_{what}{_GPU}": "0 1"} for what in ("pending", "failed")],
        [
            {
                f"strata_gpu_row_remap_pending{_GPU}": "0 0",
                "strata_gpu_remapped_rows" + _with(gpu="G", kind="correctable"): "9 9",
            }
        ],
    ),
    "StrataGpuThrottled": (
        7,
        [{"strata_gpu_throttled" + _with(gpu="G", reason="thermal"): "1x10"}],
        [
            {"strata_gpu_throttled" + _with(gpu="G", reason="power"): "1x10"},
            {"strata_gpu_throttled" + _with(gpu="G", reason="thermal"): "1 0 1 0 1 0 1 0 1"},
        ],
    ),
    "StrataGpuIdle": (
        6,
        [
            {
                f"strata_gpu_utilization_ratio{_GPU}": "0.9x10",
                "strata_gpu_utilization_ratio" + _rank("1", gpu="H"): "0.01x10",
            }
        ],
        [
            {f"strata_gpu_utilization_ratio{_GPU}": "0.01x3 0.9x10"},
            {f"strata_gpu_utilization_ratio{_GPU.replace('train', 'evaluate')}": "0.01x10"},
            {
                f"strata_gpu_utilization_ratio{_GPU}": "0.01x10",
                "strata_bound" + _with(by="stalled"): "1x10",
            },
        ],
    ),
    "StrataDataBound": (
        6,
        [{"strata_bound" + _with(by="data"): "1x10"}],
        [
            {"strata_bound" + _with(by="data"): "1x3 0x10"},
            {"strata_bound" + _with(by="compute"): "1x10"},
        ],
    ),
    "StrataDecoderSaturated": (
        12,
        [
            {
                f"strata_gpu_{engine}_utilization_ratio{_GPU}": "0.99x15",
                "strata_activity_seconds_total" + _with(activity="data"): "0+30x15",
            }
            for engine in ("jpeg", "decoder")
        ],
        [
            {
                f"strata_gpu_jpeg_utilization_ratio{_GPU}": busy,
                "strata_activity_seconds_total" + _with(activity="data"): waited,
            }
            for busy, waited in (("0.99x15", "0x15"), ("0.5x15", "0+30x15"))
        ],
    ),
    "StrataDecodeFaults": (
        3,
        [{f"strata_decode_faults_total{_T}": "0 0 2 2", **_LIVE}],
        [
            {f"strata_decode_faults_total{_T}": "2x5", **_LIVE},
            {f"strata_decode_faults_total{_T}": "0 2x5", **_DONE},
        ],
    ),
    "StrataLossAtChance": (
        35,
        [
            {
                "strata_loss" + _with(term="instance"): "6.2x40",
                "strata_loss_chance" + _with(term="instance"): "6.23x40",
            }
        ],
        [
            {
                "strata_loss" + _with(term="instance"): "6.2x20 4x20",
                "strata_loss_chance" + _with(term="instance"): "6.23x40",
            }
        ],
    ),
    "StrataCollapse": (
        12,
        [
            {f"strata_embedding_std{_T}": "0.01x15"},
            {f"strata_embedding_effective_rank{_T}": "1.5x15"},
        ],
        [
            {
                f"strata_embedding_std{_T}": "0.8x15",
                f"strata_embedding_effective_rank{_T}": "40x15",
                "strata_altered_cosine" + _with(alteration="0", level="high"): "0.01x15",
            }
        ],
    ),
    "StrataStraggler": (
        7,
        [{f"strata_straggler_ratio{_T}": "1.8x10", f"strata_straggler_rank{_T}": "3x10"}],
        [{f"strata_straggler_ratio{_T}": "1.1x10"}],
    ),
    "StrataRestarts": (
        60,
        [{f"strata_restarts_total{_T}": "0x10 1x10 2x10 3x40", **_LIVE}],
        [
            {f"strata_restarts_total{_T}": "5x100", **_LIVE},
            {f"strata_restarts_total{_T}": "0x10 1x10 2x60", **_LIVE},
        ],
    ),
    "StrataSharedMemoryLow": (
        3,
        [{f"strata_host_shm_free_bytes{_T}": "5x5", f"strata_host_shm_size_bytes{_T}": "64x5"}],
        [{f"strata_host_shm_free_bytes{_T}": "50x5", f"strata_host_shm_size_bytes{_T}": "64x5"}],
    ),
    "StrataHostMemoryLow": (
        4,
        [
            {
                f"strata_host_memory_available_bytes{_T}": "1x5",
                f"strata_host_memory_total_bytes{_T}": "64x5",
            }
        ],
        [
            {
                f"strata_host_memory_available_bytes{_T}": "1x1 30x5",
                f"strata_host_memory_total_bytes{_T}": "64x5",
            }
        ],
    ),
    "StrataAllocatorRetries": (
        3,
        [{f"strata_torch_allocator_retries_total{_T}": "0 0 1 1", **_LIVE}],
        [{f"strata_torch_allocator_retries_total{_T}": "4x5", **_LIVE}],
    ),
    "StrataLogRecordsLost": (
        3,
        [{f"strata_log_records_lost_total{_T}": "0 0 1 1", **_LIVE}],
        [{f"strata_log_records_lost_total{_T}": "0 1 1 1", **_DONE}],
    ),
}
# For each recording rule: series with a value every 15 s, and its value after ten minutes.
RECORDED: dict[str, tuple[dict[str, str], str, float]] = {
    "strata:samples:rate1m": (
        {f"strata_samples_total{_T.replace('0', rank)}": "0+30x40" for rank in "01"},
        '{run="a"}',
        4.0,
    ),
    "strata:data_wait:ratio1m": (
        {"strata_activity_seconds_total" + _with(activity="data"): "0+3x40"},
        '{run="a", node="n", rank="0"}',
        0.2,
    ),
    "strata:step_duration:p95_5m": (
        {
            "strata_step_duration_seconds_bucket" + _with(le=le): values
            for le, values in (("0.5", "0+10x40"), ("1", "0+20x40"), ("+Inf", "0+20x40"))
        },
        '{run="a"}',
        0.95,
    ),
    "strata:loss:over_chance": (
        {
            "strata_loss" + _with(term="instance"): "3x40",
            "strata_loss_chance" + _with(term="instance"): "6x40",
        },
        '{run="a", term="instance"}',
        0.5,
    ),
    "strata:checkpoint:age_seconds": (
        {f"strata_checkpoint_last_success_timestamp_seconds{_T}": "240x40"},
        '{run="a"}',
        360.0,
    ),
}


def test_every_rule_is_tested():
    assert set(ALERTS) == {rule["alert"] for rule in rules() if "alert" in rule}
    assert set(RECORDED) == {rule["record"] for rule in rules() if "record" in rule}


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool: install Debian's package prometheus (apt-get install prometheus)")
    return subprocess.run([found, *words], capture_output=True, text=True, check=False)


def test_promtool_accepts_the_configuration():
    for what in (
        ("config", ROOT / "monitoring" / "prometheus.yml"),
        ("rules", *sorted(RULES.glob("*.yml"))),
    ):
        done = promtool("check", *what)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout + done.stderr


def _test_rules(
    groups: list[dict[str, Any]], folder: Path, interval: str = "1m"
) -> subprocess.CompletedProcess[str]:
    path = folder / "test.yml"
    files = [str(path) for path in sorted(RULES.glob("*.yml"))]
    path.write_text(
        yaml.safe_dump({"rule_files": files, "evaluation_interval": interval, "tests": groups})
    )
    return promtool("test", "rules", path)


def _group(series: dict[str, str], interval: str, **more: Any) -> dict[str, Any]:
    given = [{"series": k, "values": v} for k, v in series.items()]
    return {"interval": interval, "input_series": given, **more}


def _silent(alert: str, minutes: int, series: dict[str, str]) -> dict[str, Any]:
    expected = [{"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": []}]
    return _group(series, "1m", alert_rule_test=expected)


@pytest.fixture(scope="module")
def fired(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Alerts that promtool found where none was expected, by name."""
    groups = [_silent(a, m, series) for a, (m, firing, _) in ALERTS.items() for series in firing]
    done = _test_rules(groups, tmp_path_factory.mktemp("firing"))
    found: dict[str, list[str]] = {}
    for part in done.stdout.split("alertname: ")[1:] or done.stderr.split("alertname: ")[1:]:
        found.setdefault(part.partition(",")[0], []).append(part.partition("got:[")[2])
    return found


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_an_alert_fires_at_each_of_its_conditions(alert: str, fired: dict[str, list[str]]):
    _, firing, _ = ALERTS[alert]
    assert len(fired.get(alert, [])) == len(firing), fired
    (rule,) = (rule for rule in rules() if rule.get("alert") == alert)
    wanted = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    for found in fired[alert]:
        # A label that the expression has dropped would leave a hole in the sentence.
        assert wanted <= set(re.findall(r'(\w+)="', found.partition("Annotations")[0])), found


def test_no_alert_fires_when_it_should_not(tmp_path: Path):
    quiet = [
        _silent(alert, minutes, series)
        for alert, (minutes, _, silent) in ALERTS.items()
        for series in (*silent, {"strata_build_info" + _with(version="1"): "1x90"})
    ]
    done = _test_rules(quiet, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_recorded_values(tmp_path: Path):
    def group(record: str, factor: float) -> dict[str, Any]:
        series, labels, value = RECORDED[record]
        sample = {"labels": record + labels, "value": round(value * factor, 6)}
        test = {"expr": f"round({record}, 1e-6)", "eval_time": "10m"}
        # round() drops the name.
        expected = [sample | {"labels": labels}]
        return _group(series, "15s", promql_expr_test=[test | {"exp_samples": expected}])

    done = _test_rules([group(record, 1.0) for record in RECORDED], tmp_path, "15s")
    assert done.returncode == 0, done.stdout + done.stderr
    # That another value would have been found out.
    assert _test_rules([group("strata:loss:over_chance", 1.01)], tmp_path, "15s").returncode != 0
