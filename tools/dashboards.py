"""Generate the files for Prometheus and Grafana, docs/metrics.md and docs/runbook.md.

python tools/dashboards.py

The dashboards are described in monitoring/dashboards.yaml, the alerts in monitoring/alerts.yaml and
the metrics in strata/telemetry/catalogue.toml; their heads explain the fields.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from strata.config import parse_config
from strata.errors import exit_with_one_line
from strata.telemetry.catalogue import CATALOGUE
from strata.tools.alerts import (
    load_alerts,
    rule_groups,
    rules_file,
    rules_resource,
    runbook,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "monitoring" / "grafana" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_INPUT = {
    "name": "DS_PROMETHEUS",
    "label": "Prometheus",
    "type": "datasource",
    "pluginId": "prometheus",
    "pluginName": "Prometheus",
}
"""What Grafana asks for when a dashboard is imported by hand."""
_SOURCE = {
    "name": "datasource",
    "label": "Data source",
    "type": "datasource",
    "query": "prometheus",
    "refresh": 1,
    "current": {"text": "${DS_PROMETHEUS}", "value": "${DS_PROMETHEUS}"},
}
"""The variable that all queries use; a value that does not exist becomes the default source."""
GRID = 24
_HEIGHTS = {"stat": 4, "timeseries": 7}
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
_METRICS_HEAD = """\
# Metrics

Written by `python tools/dashboards.py` from strata/telemetry/catalogue.toml. Do not edit.

Prometheus naming: base units, `_total` for counters, ratios from 0 to 1 (the ratio of the straggler
to the others is at least 1). Every series also has the labels `run`, `node`, `rank` and `role` of
its target file (`--monitor.file_sd`). A gauge without a value is absent, never 0. Losses and health
are the same on all ranks.

Start with `strata_bound`, which names the bottleneck, and read that part's section next."""
_RATE_UNITS = {"seconds": "percentunit", "bytes": "Bps"}
"""Grafana's units for a counter's increase per second."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of dashboards.yaml; a field that is not known is an error."""


class Query(_Strict, frozen=True):
    """PromQL with `$on` or `$on_gpu` for the selection by variables, and the legend."""

    expr: str
    legend: str


def _legend(labels: list[str]) -> str:
    return " ".join("rank {{rank}}" if name == "rank" else f"{{{{{name}}}}}" for name in labels)


class Panel(_Strict, frozen=True):
    """One panel. Exactly one of `gauge`, `rate` and `queries` is given.

    Args:
        title: Shown above it.
        gauge: A metric, shown as it is or as its maximum `by` some labels.
        rate: A counter, whose increase per second is summed `by` some labels.
        queries: PromQL in full.
        by: Labels that stay; of a rate `run` if empty.
        legend: Replaces the one made of the labels.
        unit: Grafana's name of the unit; replaces the catalogue's.
        kind: Grafana's type of panel.
        width: Of 24 columns.
        empty: Text of an empty panel; replaces the catalogue's reasons.
        named: Whether a stat shows the names of its series instead of their values.
        stacked: Whether lines are areas on top of each other.
        repeat: A variable; there is one panel for each of its values, so that areas of several runs
            are not stacked on each other.
        parts: Whether series are parts of a step's time, each in its colour.
        levels: Colours of a stat and the value from which each is used; the first also below.
    """

    title: str
    gauge: str = ""
    rate: str = ""
    queries: tuple[Query, ...] = ()
    by: list[str] = []
    legend: str = ""
    unit: str = ""
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8
    empty: str = ""
    named: bool = False
    stacked: bool = False
    parts: bool = False
    repeat: str = ""
    levels: dict[str, float] = {}

    def __post_init__(self) -> None:
        if bool(self.gauge) + bool(self.rate) + bool(self.queries) != 1:
            raise ValueError(f"panel {self.title!r}: give one of gauge, rate and queries")
        if not self.queries and self.gauge + self.rate not in _ENTRIES:
            raise ValueError(f"panel {self.title!r}: {self.gauge + self.rate} is not a metric")

    def expanded(self) -> tuple[tuple[Query, ...], str]:
        """The queries in full, and Grafana's unit."""
        if self.queries:
            return self.queries, self.unit or "short"
        entry = _ENTRIES[self.gauge + self.rate]
        # What belongs to a machine is reported by each run on it, and counted once.
        shared = entry.section in ("GPU", "Host")
        labels = self.by or (["node", *entry.labels] if shared else [])
        on = "$on_gpu" if entry.section == "GPU" else "$on"
        if self.rate:
            labels = labels or ["run"]
            expr = f"rate({self.rate}{{{on}}}[$__rate_interval])"
            expr = f"{'max' if shared else 'sum'} by ({', '.join(labels)}) ({expr})"
        else:
            expr = f"{self.gauge}{{{on}}}"
            if labels:
                expr = f"max by ({', '.join(labels)}) ({expr})"
            labels = labels or ["run", "rank", *entry.labels]
        unit = (_RATE_UNITS if self.rate else _UNITS).get(entry.unit, "short")
        return (Query(expr=expr, legend=self.legend or _legend(labels)),), self.unit or unit


class Row(_Strict, frozen=True):
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]


class Page(_Strict, frozen=True):
    """One dashboard; `uid` names its file and its address."""

    uid: str
    title: str
    variables: list[str]
    rows: tuple[Row, ...]


class Annotation(_Strict, frozen=True):
    """Marks on the time axes of a dashboard.

    A mark is placed where the query has a value, or, with `value_is_time`, at its value in
    milliseconds.
    """

    name: str
    colour: str
    expr: str
    value_is_time: bool = False


class Dashboards(_Strict, frozen=True):
    """The content of dashboards.yaml."""

    dashboard: dict[str, Any]
    variable: dict[str, Any]
    variables: dict[str, str]
    annotations: tuple[Annotation, ...]
    part_colours: dict[str, str]
    pages: tuple[Page, ...]


def metric_names(query: str) -> set[str]:
    """The catalogue's names in a query; a histogram's series count as the histogram."""
    found = re.findall(r"\bstrata_[a-z0-9_]+", query)
    return {re.sub(r"_(bucket|count|sum)$", "", n) if n not in _ENTRIES else n for n in found}


def _select(query: str, page: Page) -> str:
    """Replace `$on` and `$on_gpu` by a page's variables."""
    on = [f'{name}=~"${name}"' for name in page.variables]
    query = query.replace("$on_gpu", ", ".join(on))
    return query.replace("$on", ", ".join(s for s in on if not s.startswith("gpu")))


def _no_value(panel: Panel, names: list[str]) -> str:
    """The text of an empty panel: when it is expected to be empty."""
    reasons = []
    for entry in map(_ENTRIES.__getitem__, names):
        if "train" not in entry.roles:
            reasons.append(f"outside of {', '.join(entry.roles)}")
        elif entry.absent:
            reasons.append(entry.absent[0].lower() + entry.absent[1:].rstrip("."))
    if not reasons:
        return "no data: no run is watched"
    if panel.kind == "stat":  # Little space: one short reason.
        reasons = [reasons[-1].partition(",")[0]]
    return "no data, as is normal " + "; ".join(dict.fromkeys(reasons))


def _description(names: list[str]) -> str:
    lines = []
    for entry in map(_ENTRIES.__getitem__, names):
        line = f"**{entry.name}**: {entry.help} {entry.advice}"
        lines.append(line + (f" Absent: {entry.absent}" if entry.absent else ""))
    return "\n\n".join(lines)


def _panel(panel: Panel, page: Page, colours: dict[str, str]) -> dict[str, Any]:
    """A panel as Grafana's JSON, without its number and place."""
    queries, unit = panel.expanded()
    names = sorted({name for query in queries for name in metric_names(query.expr)})
    defaults: dict[str, Any] = {"unit": unit, "noValue": panel.empty or _no_value(panel, names)}
    overrides: list[dict[str, Any]] = []
    if unit == "percentunit":
        defaults["min"] = 0
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 50}
    if panel.levels:
        steps = [{"color": colour, "value": value} for colour, value in panel.levels.items()]
        steps[0]["value"] = None  # Minus infinity.
        defaults["color"] = {"mode": "thresholds"}
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    elif panel.kind == "stat":
        defaults["color"] = {"mode": "fixed", "fixedColor": "blue"}
    for part, colour in colours.items() if panel.parts else ():
        fixed = {"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}
        matcher = {"id": "byRegexp", "options": f"/ {part}$/"}
        overrides.append({"matcher": matcher, "properties": [fixed]})
    made = {
        "type": panel.kind,
        "title": panel.title,
        "description": _description(names),
        "datasource": DATASOURCE,
        "gridPos": {"w": panel.width, "h": _HEIGHTS[panel.kind]},
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": _select(query.expr, page),
                "legendFormat": query.legend,
            }
            for place, query in enumerate(queries)
        ],
    }
    if panel.repeat:
        made |= {"repeat": panel.repeat, "repeatDirection": "h", "maxPerRow": GRID // panel.width}
    if panel.kind == "stat":
        # Of a range Grafana would show every series that was there at any time of it, so every part
        # that was once the bottleneck, and runs that have ended; an instant query has those of now.
        for target in made["targets"]:
            target |= {"instant": True, "range": False}
    if panel.kind == "stat":
        made["options"] = {
            "textMode": "name" if panel.named else "auto",
            "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    return made


def _panels(page: Page, colours: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows and panels, numbered from 1 and placed from left to right."""
    number, y = 1, 0
    for row in page.rows:
        grid = {"x": 0, "y": y, "w": GRID, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "gridPos": grid, "panels": []}
        number, y, x, tallest = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > GRID:
                x, y, tallest = 0, y + tallest, 0
            made = _panel(panel, page, colours)
            made["gridPos"] = {"x": x, "y": y, **made["gridPos"]}
            yield {"id": number, **made}
            number, x = number + 1, x + panel.width
            tallest = max(tallest, made["gridPos"]["h"])
        y += tallest


def _variable(name: str, described: Dashboards) -> dict[str, Any]:
    query = f"label_values({described.variables[name]}, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        **described.variable,
    }


def _annotation(annotation: Annotation, page: Page) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": annotation.name,
        "enable": True,
        "datasource": DATASOURCE,
        "iconColor": annotation.colour,
        "expr": _select(annotation.expr, page),
        "titleFormat": f"{annotation.name} ({{{{run}}}})",
    }
    # Grafana's own form writes the word "on", not true.
    return made | ({"useValueForTime": "on"} if annotation.value_is_time else {})


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard as Grafana's JSON, by its `uid` without the prefix.

    Raises:
        msgspec.ValidationError: dashboards.yaml has an unknown, missing or wrong field.
    """
    text = (ROOT / "monitoring" / "dashboards.yaml").read_bytes()
    described = msgspec.yaml.decode(text, type=Dashboards)
    return {
        page.uid: {
            "uid": f"strata-{page.uid}",
            "title": page.title,
            **described.dashboard,
            "__inputs": [_INPUT],
            "__requires": [{"type": "datasource", "id": "prometheus", "name": "Prometheus"}],
            "templating": {"list": [_SOURCE, *(_variable(v, described) for v in page.variables)]},
            "annotations": {"list": [_annotation(a, page) for a in described.annotations]},
            "panels": list(_panels(page, described.part_colours)),
        }
        for page in described.pages
    }


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    lines = [_METRICS_HEAD]
    section = ""
    for entry in CATALOGUE:
        if entry.section != section:
            section = entry.section
            lines += ["", f"## {section}"]
        by = f"; by {', '.join(entry.labels)}" if entry.labels else ""
        roles = "" if entry.roles == ("train",) else f"; in {', '.join(entry.roles)}"
        meaning = f"{entry.help} ({entry.kind}, {entry.unit}{by}{roles})"
        lines += ["", f"### {entry.name}", "", meaning, ""]
        lines.append(f"When it looks wrong: {entry.advice}")
        if entry.absent:
            lines += ["", f"Absent: {entry.absent}"]
    return "\n".join(lines) + "\n"


def files() -> dict[Path, str]:
    """The text of every generated file, by its path."""
    pages, alerts = dashboards(), load_alerts(ROOT / "monitoring" / "alerts.yaml")
    groups, rules = rule_groups(alerts, pages), ROOT / "monitoring" / "rules"
    made = {
        FOLDER / f"{uid}.json": json.dumps(dashboard, indent=1) + "\n"
        for uid, dashboard in pages.items()
    }
    return {
        **made,
        rules / "alerts.yml": rules_file(groups),
        ROOT / "monitoring" / "kubernetes" / "rules.yaml": rules_resource(
            groups, rules / "recording.yml"
        ),
        ROOT / "docs" / "metrics.md": metrics_page(),
        ROOT / "docs" / "runbook.md": runbook(alerts),
    }


@dataclass(frozen=True, kw_only=True)
class DashboardsCommand:
    """Write Grafana's dashboards and docs/metrics.md from the catalogue of metrics."""


def main(argv: Sequence[str]) -> None:
    """Run the command line: write the files."""
    described = DashboardsCommand.__doc__ or ""
    parse_config(DashboardsCommand, argv, prog="tools/dashboards.py", description=described)
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
