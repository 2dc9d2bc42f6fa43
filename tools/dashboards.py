"""Write the Grafana dashboards and docs/metrics.md from the catalogue; or render the dashboards.

python tools/dashboards.py                      writes both
python tools/dashboards.py --render URL DIR     pictures of what the Prometheus at URL has now
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.errors import ConfigError, exit_with_one_line
from strata.telemetry.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
DASHBOARDS = ROOT / "monitoring" / "grafana" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "strata"}
GRID = 24
_HEIGHT = 7
_ENTRIES = {entry.name: entry for entry in CATALOGUE}
_UNITS = {
    "ratio": "percentunit",
    "seconds": "s",
    "bytes": "bytes",
    "bytes/second": "Bps",
    "watts": "watt",
    "celsius": "celsius",
    "hertz": "hertz",
    "operations/second": "flops",
}
"""Grafana's units for the catalogue's."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a dashboard.

    Args:
        title: Above it.
        queries: PromQL with `$on` for the selection by the variables, and the legend.
        unit: Grafana's name of the unit.
        kind: Grafana's type of panel.
        width: Of 24 columns.
        named: Whether a stat shows the names of its series; their values are always 1.
        stacked: Whether lines are areas on top of each other.
        levels: Colours from a value on, for a stat; the first from minus infinity.
        parts: Whether series are parts of a step's time, each in its colour.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    named: bool = False
    stacked: bool = False
    levels: tuple[tuple[float, str], ...] = ()
    parts: bool = False

    @property
    def metrics(self) -> list[str]:
        """Names of the catalogue that its queries use."""
        return sorted({n for query, _ in self.queries for n in metric_names(query)})

    @property
    def no_data(self) -> str:
        """What stands in an empty panel's place: when that is as it should be."""
        reasons = []
        for entry in map(_ENTRIES.__getitem__, self.metrics):
            if "train" not in entry.roles:
                reasons.append(f"outside of {', '.join(entry.roles)}")
            elif entry.absent:
                reasons.append(entry.absent[0].lower() + entry.absent[1:].rstrip("."))
        if not reasons:
            return "no data: no run is watched"
        if self.kind == "stat":  # Small: one reason, short.
            reasons = [reasons[-1].partition(",")[0]]
        return "no data, as is normal " + "; ".join(dict.fromkeys(reasons))


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """One page.

    Args:
        uid: Of its file and its address.
        title: For people.
        variables: Names of its selections: run, node, gpu.
        rows: Titled groups of panels.
    """

    uid: str
    title: str
    variables: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    @property
    def panels(self) -> list[Panel]:
        """All, in order."""
        return [panel for _, panels in self.rows for panel in panels]


def metric_names(query: str) -> set[str]:
    """The catalogue's names in a query; a histogram's series count as its own."""
    found = re.findall(r"\bstrata_[a-z0-9_]+", query)
    return {re.sub(r"_(bucket|count|sum)$", "", n) if n not in _ENTRIES else n for n in found}


def _plain(name: str, legend: str, title: str = "", by: str = "", **more: Any) -> Panel:
    """A gauge as it is, or its largest `by` some labels: what all ranks say alike is shown once."""
    entry = _ENTRIES[name]
    more.setdefault("unit", _UNITS.get(entry.unit, "short"))
    gpu = name.startswith("strata_gpu_")
    query = name + ('{$on, gpu=~"$gpu"}' if gpu else "{$on}")
    if by:
        query = f"max by ({by}) ({query})"
    return Panel(title=title or entry.help, queries=((query, legend),), **more)


def _health(measures: str, title: str) -> Panel:
    """Those measures of health that share a scale."""
    query = f'max by (run, measure) (strata_health{{$on, measure=~"{measures}"}})'
    return Panel(title=title, queries=((query, "{{run}} {{measure}}"),))


def _rate(name: str, legend: str, title: str, unit: str, by: str = "run", **more: Any) -> Panel:
    """A counter a second."""
    query = f"sum by ({by}) (rate({name}{{$on}}[$__rate_interval]))"
    return Panel(title=title, queries=((query, legend),), unit=unit, **more)


_RANK = "{{run}} rank {{rank}}"
_GPU = "{{node}} {{gpu}}"
PART_COLOURS = {
    "compute": "green",
    "data": "orange",
    "communication": "blue",
    "host": "purple",
    "checkpoint": "yellow",
}
_HEALTH = (
    "embedding_std|cosine_altered_.*|graph_off_diagonal_mass",
    "embedding_effective_rank|.*prototypes_in_use|graph_.*_partners",
    ".*entropy_nats",
)
"""Measures of health, by scale."""
_VERDICT_ROW = (
    "Is it busy with useful work, and if not, why?",
    (
        Panel(
            title="Bound by",
            queries=(("max by (run, by) (strata_bound{$on}) == 1", "{{run}}: {{by}}"),),
            kind="stat",
            width=6,
            named=True,
            parts=True,
        ),
        Panel(
            title="Time in useful work",
            queries=(('avg by (run) (strata_time_share_ratio{$on, part="compute"})', "{{run}}"),),
            unit="percentunit",
            kind="stat",
            width=4,
            levels=((0.0, "red"), (0.5, "orange"), (0.8, "green")),
        ),
        Panel(
            title="GPU busy",
            queries=(
                (
                    'avg by (run) (strata_gpu_sm_activity_ratio{$on, gpu=~"$gpu"})'
                    ' or avg by (run) (strata_gpu_utilization_ratio{$on, gpu=~"$gpu"})',
                    "{{run}}",
                ),
            ),
            unit="percentunit",
            kind="stat",
            width=4,
            levels=((0.0, "red"), (0.3, "orange"), (0.6, "green")),
        ),
        Panel(
            title="The slowest rank over the others",
            queries=(("max by (run) (strata_straggler_ratio{$on})", "{{run}}"),),
            unit="percentunit",
            kind="stat",
            width=5,
            levels=((0.0, "green"), (1.1, "orange"), (1.2, "red")),
        ),
        Panel(
            title="If data: read or decoding",
            queries=(("max by (run, part) (strata_data_bound_by{$on}) == 1", "{{run}}: {{part}}"),),
            kind="stat",
            width=5,
            named=True,
        ),
        Panel(
            title="Where the slowest rank's time goes",
            queries=(("avg by (run, part) (strata_time_share_ratio{$on})", "{{run}} {{part}}"),),
            unit="percentunit",
            width=12,
            stacked=True,
            parts=True,
        ),
        _plain(
            "strata_own_step_seconds", _RANK, "Time of a step without waiting, by rank", width=12
        ),
    ),
)

_GPU_PAGE = Dashboard(
    uid="gpu",
    title="Strata: GPU utilisation",
    variables=("run", "node", "gpu"),
    rows=(
        _VERDICT_ROW,
        (
            "Engines",
            (
                _plain("strata_gpu_utilization_ratio", _GPU, "Any kernel running"),
                _plain("strata_gpu_sm_activity_ratio", _GPU, "SM activity"),
                _plain("strata_gpu_tensor_activity_ratio", _GPU, "Tensor cores"),
                _plain("strata_gpu_memory_bandwidth_ratio", _GPU, "Memory bandwidth"),
                _plain("strata_gpu_jpeg_utilization_ratio", _GPU, "JPEG engines"),
                _plain("strata_gpu_decoder_utilization_ratio", _GPU, "Video decoders"),
                _plain("strata_mfu_ratio", _RANK, "MFU: model FLOPs utilisation"),
                _plain("strata_gpu_sm_occupancy_ratio", _GPU, "SM occupancy"),
                _plain("strata_gpu_up", _GPU, "GPU answers"),
            ),
        ),
        (
            "Memory, power, clocks",
            (
                Panel(
                    title="Device memory in use",
                    queries=(
                        (
                            'strata_gpu_memory_used_bytes{$on, gpu=~"$gpu"}'
                            " / strata_gpu_memory_total_bytes",
                            _GPU,
                        ),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    title="Power",
                    queries=(
                        ('strata_gpu_power_watts{$on, gpu=~"$gpu"}', _GPU),
                        (
                            'rate(strata_gpu_energy_joules_total{$on, gpu=~"$gpu"}'
                            "[$__rate_interval])",
                            f"{_GPU} mean",
                        ),
                    ),
                    unit="watt",
                ),
                _plain("strata_gpu_temperature_celsius", _GPU, "Temperature"),
                _plain("strata_gpu_clock_hertz", _GPU + " {{domain}}", "Clocks"),
                _plain("strata_gpu_throttled", _GPU + " {{reason}}", "Clocks held down by"),
                Panel(
                    title="Samples a kilojoule",
                    queries=(
                        (
                            "1000 * sum by (run) (rate(strata_samples_total{$on}"
                            "[$__rate_interval])) / sum by (run) (rate("
                            "strata_gpu_energy_joules_total{$on}[$__rate_interval]))",
                            "{{run}}",
                        ),
                    ),
                ),
            ),
        ),
        (
            "Links",
            (
                _plain("strata_gpu_pcie_bytes_per_second", _GPU + " {{direction}}", "PCIe"),
                _plain("strata_gpu_nvlink_bytes_per_second", _GPU + " {{direction}}", "NVLink"),
                _rate(
                    "strata_host_network_bytes_total",
                    "{{node}} {{direction}}",
                    "Network of the node",
                    "Bps",
                    by="node, direction",
                ),
            ),
        ),
    ),
)

_TRAINING_PAGE = Dashboard(
    uid="training",
    title="Strata: training",
    variables=("run", "node"),
    rows=(
        _VERDICT_ROW,
        (
            "Progress",
            (
                _plain("strata_step", "{{run}}", "Step", by="run", kind="stat", width=4),
                _plain("strata_epoch", "{{run}}", "Epoch", by="run", kind="stat", width=4),
                _plain("strata_stage", "{{run}}", "Stage", by="run", kind="stat", width=4),
                Panel(
                    title="Age of the last checkpoint",
                    queries=(
                        (
                            "time() - max by (run) "
                            "(strata_checkpoint_last_success_timestamp_seconds{$on})",
                            "{{run}}",
                        ),
                    ),
                    unit="s",
                    kind="stat",
                    width=4,
                ),
                _plain(
                    "strata_restarts_total", "{{run}}", "Restarts", by="run", kind="stat", width=4
                ),
                Panel(
                    title="Steps that were not finite",
                    queries=(("max by (run) (strata_skipped_steps_total{$on})", "{{run}}"),),
                    kind="stat",
                    width=4,
                ),
            ),
        ),
        (
            "Learning",
            (
                _plain("strata_loss", "{{run}} {{term}}", "Loss terms", by="run, term", width=12),
                Panel(
                    title="Loss terms over what they are at chance",
                    queries=(
                        (
                            "max by (run, term) (strata_loss{$on}) / "
                            "max by (run, term) (strata_loss_chance{$on})",
                            "{{run}} {{term}}",
                        ),
                    ),
                    unit="percentunit",
                    width=12,
                ),
                _health(_HEALTH[0], "Health: spread, cosines of altered clips, off the diagonal"),
                _health(_HEALTH[1], "Health: effective rank, prototypes in use, partners"),
                _health(_HEALTH[2], "Health: entropy of the prototypes in use, nats"),
                _plain("strata_learning_rate", "{{run}}", "Learning rate", by="run", width=12),
                _plain("strata_grad_norm", "{{run}}", "Norm of the gradient", by="run", width=12),
                Panel(
                    title="Retrieval on the labelled set of `probe`, and at chance",
                    queries=(
                        ("max by (run, k) (strata_probe_recall_ratio{$on})", "{{run}} R@{{k}}"),
                        (
                            'max by (run) (strata_probe_chance_ratio{$on, k="1"})',
                            "{{run}} R@1 at chance",
                        ),
                    ),
                    unit="percentunit",
                    width=12,
                ),
                _plain(
                    "strata_probe_epoch",
                    "{{run}}",
                    "Epoch of the last retrieval",
                    by="run",
                    width=6,
                ),
                _rate(
                    "strata_probe_seconds_total",
                    _RANK,
                    "Share of time in retrieval",
                    "percentunit",
                    by="run, rank",
                    width=6,
                ),
            ),
        ),
        (
            "Speed",
            (
                _rate("strata_samples_total", "{{run}}", "Samples a second", "short"),
                _rate("strata_clips_total", "{{run}}", "Clips a second", "short"),
                _plain(
                    "strata_samples_per_second",
                    "{{run}}",
                    "Samples a second, last interval",
                    by="run",
                ),
                Panel(
                    title="Time of a step",
                    queries=tuple(
                        (
                            f"histogram_quantile({q}, sum by (run, le) (rate("
                            "strata_step_duration_seconds_bucket{$on}[$__rate_interval])))",
                            f"{{{{run}}}} {name}",
                        )
                        for q, name in ((0.5, "median"), (0.95, "95 %"))
                    ),
                    unit="s",
                ),
                _plain(
                    "strata_straggler_ratio", "{{run}}", "Slowest rank over the others", by="run"
                ),
                _plain("strata_straggler_rank", "{{run}}", "Slowest rank", by="run"),
                _rate("strata_steps_total", _RANK, "Steps a second", "short", by="run, rank"),
                _plain("strata_model_flops_per_second", _RANK, "Operations a second"),
                _rate(
                    "strata_device_seconds_total",
                    _RANK,
                    "Share of time in steps",
                    "percentunit",
                    by="run, rank",
                ),
                _rate(
                    "strata_optimizer_seconds_total",
                    _RANK,
                    "Share of time in the optimizer",
                    "percentunit",
                    by="run, rank",
                ),
                _rate(
                    "strata_communication_seconds_total",
                    _RANK,
                    "Share of time in communication",
                    "percentunit",
                    by="run, rank",
                ),
                _rate(
                    "strata_checkpoint_seconds_total",
                    _RANK,
                    "Share of time waiting for checkpoints",
                    "percentunit",
                    by="run, rank",
                ),
                Panel(
                    title="Checkpoints: until whole, and what training waited",
                    queries=(
                        ("strata_checkpoint_duration_seconds{$on}", "{{run}} whole"),
                        ("strata_checkpoint_blocked_seconds{$on}", f"{_RANK} waited"),
                    ),
                    unit="s",
                ),
                Panel(
                    title="Version",
                    queries=(
                        (
                            "count by (run, version) (strata_build_info{$on})",
                            "{{run}}: {{version}}",
                        ),
                    ),
                    kind="stat",
                    named=True,
                ),
            ),
        ),
    ),
)

_DATA_PAGE = Dashboard(
    uid="data",
    title="Strata: data path",
    variables=("run", "node"),
    rows=(
        _VERDICT_ROW,
        (
            "Loader",
            (
                _rate(
                    "strata_data_wait_seconds_total",
                    _RANK,
                    "Share of time waiting for data",
                    "percentunit",
                    by="run, rank",
                ),
                _plain("strata_data_wait_ratio", _RANK, "The same, last interval"),
                _plain("strata_loader_queue_depth", _RANK, "Batches ready"),
                _rate(
                    "strata_loader_seconds_total",
                    _RANK + " {{part}}",
                    "The loader's thread: reading and decoding",
                    "percentunit",
                    by="run, rank, part",
                ),
                _rate("strata_frames_decoded_total", "{{run}}", "Frames decoded a second", "short"),
                _rate("strata_bytes_read_total", "{{run}}", "Coded bytes a second", "Bps"),
                _plain("strata_decode_faults_total", _RANK, "Samples that failed to decode"),
                _plain("strata_gpu_jpeg_utilization_ratio", _GPU, "JPEG engines"),
                _plain("strata_gpu_decoder_utilization_ratio", _GPU, "Video decoders"),
            ),
        ),
        (
            "Host",
            (
                Panel(
                    title="Cores in use, by mode",
                    queries=(
                        (
                            "sum by (node, mode) (rate(strata_host_cpu_seconds_total"
                            '{$on, mode!="idle"}[$__rate_interval]))',
                            "{{node}} {{mode}}",
                        ),
                        ("max by (node) (strata_host_cpus{$on})", "{{node}} there are"),
                    ),
                ),
                _rate(
                    "strata_process_cpu_seconds_total",
                    _RANK,
                    "Cores in use by each process",
                    "short",
                    by="run, rank",
                ),
                Panel(
                    title="Memory",
                    queries=(
                        ("max by (node) (strata_host_memory_total_bytes{$on})", "{{node}} total"),
                        (
                            "max by (node) (strata_host_memory_available_bytes{$on})",
                            "{{node}} available",
                        ),
                        ("strata_process_resident_memory_bytes{$on}", _RANK),
                    ),
                    unit="bytes",
                ),
                _plain("strata_host_shm_free_bytes", "{{node}}", "Free shared memory"),
                Panel(
                    title="Free disk",
                    queries=(
                        ("strata_disk_free_bytes{$on}", "{{run}} {{place}}"),
                        ("strata_disk_size_bytes{$on}", "{{run}} {{place}} size"),
                    ),
                    unit="bytes",
                ),
                _rate(
                    "strata_host_disk_bytes_total",
                    "{{node}} {{direction}}",
                    "Disks",
                    "Bps",
                    by="node, direction",
                ),
            ),
        ),
        (
            "Preprocessing",
            (
                _rate(
                    "strata_videos_sharded_total",
                    "{{run}} {{outcome}}",
                    "Videos a second",
                    "short",
                    by="run, outcome",
                    width=12,
                ),
                _rate(
                    "strata_frames_sharded_total", "{{run}}", "Frames a second", "short", width=12
                ),
            ),
        ),
    ),
)

PAGES = (_GPU_PAGE, _TRAINING_PAGE, _DATA_PAGE)


def expand(query: str, page: Dashboard, *, literal: bool = False) -> str:
    """A panel's query as Grafana gets it, or with every variable replaced for Prometheus.

    Args:
        query: With `$on`.
        page: Whose variables select.
        literal: Whether nothing of Grafana's is left.
    """
    names = [name for name in page.variables if name != "gpu"]
    query = query.replace("$on", ", ".join(f'{name}=~"${name}"' for name in names))
    if "gpu" not in page.variables:
        query = query.replace(', gpu=~"$gpu"', "")
    if literal:
        query = re.sub(r'"\$(run|node|gpu)"', '".*"', query)
        query = query.replace("$__rate_interval", "20s")
    return query


def _describe(panel: Panel) -> str:
    lines = []
    for name in panel.metrics:
        entry = _ENTRIES[name]
        line = f"**{name}**: {entry.help} {entry.advice}"
        lines.append(line + (f" Absent: {entry.absent}" if entry.absent else ""))
    return "\n\n".join(lines)


def _panel_json(panel: Panel, page: Dashboard, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "noValue": panel.no_data}
    overrides: list[dict[str, Any]] = []
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": _describe(panel),
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": 4 if panel.kind == "stat" else _HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": expand(query, page),
                "legendFormat": legend,
            }
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }
    if panel.unit == "percentunit":
        defaults["min"] = 0
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 50}
    if panel.levels:
        steps = [
            {"color": colour, "value": value if place else None}
            for place, (value, colour) in enumerate(panel.levels)
        ]
        defaults["color"] = {"mode": "thresholds"}
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    elif panel.kind == "stat":
        defaults["color"] = {"mode": "fixed", "fixedColor": "blue"}
    if panel.parts:
        for part, colour in PART_COLOURS.items():
            fixed = {"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}
            matcher = {"id": "byRegexp", "options": f"/ {part}$/"}
            overrides.append({"matcher": matcher, "properties": [fixed]})
    if panel.kind == "stat":
        made["options"] = {
            "textMode": "name" if panel.named else "auto",
            "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    return made


def _panels_json(page: Dashboard) -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for title, panels in page.rows:
        grid = {"x": 0, "y": y, "w": GRID, "h": 1}
        yield {"id": number, "type": "row", "title": title, "gridPos": grid, "panels": []}
        number, y, x, tallest = number + 1, y + 1, 0, 0
        for panel in panels:
            if x + panel.width > GRID:
                x, y, tallest = 0, y + tallest, 0
            made = _panel_json(panel, page, number, x, y)
            yield made
            number, x = number + 1, x + panel.width
            tallest = max(tallest, made["gridPos"]["h"])
        y += tallest


def _variable(name: str) -> dict[str, Any]:
    source = "strata_gpu_up" if name == "gpu" else "strata_build_info"
    query = f"label_values({source}, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Marks on all of a dashboard's time axes.

    Args:
        name: For people.
        colour: Of the marks.
        query: PromQL with `$on`.
        value_is_time: Whether its value, in milliseconds, is where the mark goes; otherwise it
            goes where the query has a value.
    """

    name: str
    colour: str
    query: str
    value_is_time: bool = False


ANNOTATIONS = (
    Annotation(
        name="Checkpoint",
        colour="blue",
        query="1000 * max by (run) (strata_checkpoint_last_success_timestamp_seconds{$on})",
        value_is_time=True,
    ),
    Annotation(
        name="Stage",
        colour="purple",
        query="max by (run) (changes(strata_stage{$on}[1m])) > 0",
    ),
)


def _annotation(made: Annotation, page: Dashboard) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": made.name,
        "enable": True,
        "datasource": DATASOURCE,
        "iconColor": made.colour,
        "expr": expand(made.query, page),
        "titleFormat": f"{made.name} ({{{{run}}}})",
    }
    # A word, as Grafana's own form writes it.
    return found | ({"useValueForTime": "on"} if made.value_is_time else {})


def dashboard(page: Dashboard) -> dict[str, Any]:
    """A page as Grafana's JSON."""
    return {
        "uid": f"strata-{page.uid}",
        "title": page.title,
        "tags": ["strata"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "links": [
            {"type": "dashboards", "title": "Strata", "tags": ["strata"], "asDropdown": False}
        ],
        "templating": {"list": [_variable(name) for name in page.variables]},
        "annotations": {"list": [_annotation(made, page) for made in ANNOTATIONS]},
        "panels": list(_panels_json(page)),
    }


def metrics_page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `python tools/dashboards.py` from strata/telemetry/catalogue.toml.",
        "Do not edit.",
        "",
        "Prometheus naming: base units, `_total` for counters, ratios from 0 to 1 (of the",
        "straggler over the others from 1). Every series also has the labels `run`, `node`, `rank`",
        "and `role` of its target file (`--monitor.file_sd`). A gauge without a value is absent,",
        "never 0. Losses and health are the same on all ranks.",
        "",
        "Where to look first: `strata_bound`. Then the section that it names.",
    ]
    section = ""
    for entry in CATALOGUE:
        if entry.section != section:
            section = entry.section
            lines += ["", f"## {section}"]
        labels = "".join(f", {label}" for label in entry.labels)
        kind = f"{entry.kind}, {entry.unit}{'; by' + labels[1:] if labels else ''}"
        roles = (
            ""
            if len(entry.roles) == 1 and entry.roles[0] == "train"
            else (f"; in {', '.join(entry.roles)}")
        )
        lines += ["", f"### {entry.name}", "", f"{entry.help} ({kind}{roles})", ""]
        lines.append(f"When it looks wrong: {entry.advice}")
        if entry.absent:
            lines += ["", f"Absent: {entry.absent}"]
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    """Everything that is generated, by its path."""
    made = {
        DASHBOARDS / f"{page.uid}.json": json.dumps(dashboard(page), indent=1) + "\n"
        for page in PAGES
    }
    return {**made, ROOT / "docs" / "metrics.md": metrics_page()}


def main(argv: Sequence[str]) -> None:
    """Write the files, or render.

    Raises:
        ConfigError: The arguments are not understood.
    """
    if not argv:
        for path, content in files().items():
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
        return
    if argv[0] != "--render" or len(argv) != 3:
        raise ConfigError("tools/dashboards.py takes nothing, or --render URL DIR")
    # Only this needs a browser.
    from strata.tools.render_dashboards import render

    render(argv[1], Path(argv[2]))


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
