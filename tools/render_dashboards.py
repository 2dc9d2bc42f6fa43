"""Draw the dashboards of monitoring/grafana/dashboards for the documentation, without Grafana.

python tools/render_dashboards.py --url http://127.0.0.1:9090 --out pictures

The drawing follows the fields of the JSON that decide what Grafana shows (place, instant or range
query, reducer, unit, thresholds, overrides, stacking, text of an empty panel, annotations), not
Grafana's looks. The caption of each picture states that.
"""

import itertools
import json
import math
import re
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LinearLocator
from PIL import Image

from strata.config import parse_config
from strata.errors import StrataError, exit_with_one_line
from strata.ranges import check_range

__all__ = ["RenderCommand", "draw", "literal", "prometheus"]

CAPTION = "Rendering of the dashboard's JSON by tools/render_dashboards.py. This is not Grafana."
_DASHBOARDS = Path(__file__).resolve().parent.parent / "monitoring" / "grafana" / "dashboards"
_COLUMN, _ROW, _TOP, _GAP = 50, 26, 34, 6
"""Pixels of a grid column, of a grid row, above the first row, and between panels."""
_COLOURS = {  # Grafana's names.
    "green": "#73bf69",
    "orange": "#ff9830",
    "red": "#f2495c",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "yellow": "#fade2a",
}
_LINES = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#508642")
_TEXT, _DIM, _PAGE, _PANEL = "#d0d0d8", "#8e8e98", "#111217", "#181b1f"
_MAX_LEGEND = 8

Ask = Callable[[str, bool], list[dict[str, Any]]]
"""An expression and whether the query is instant, to the result of Prometheus's range API."""


@dataclass(frozen=True, kw_only=True)
class RenderCommand:
    """Which Prometheus to ask, and where the pictures go."""

    url: str = "http://127.0.0.1:9090"
    """Address of Prometheus."""
    out: Path = Path("pictures")
    """Folder for `dashboard-<name>.png`."""
    minutes: float = 5.0
    """Length of the time axis, up to now."""
    remark: str = ""
    """A sentence on where the data come from, for the caption of each picture."""

    def __post_init__(self) -> None:
        check_range(self, "minutes", above=0)


Series = tuple[str, list[float], list[float]]
"""Legend, Unix times in seconds, finite values; at least one."""


def prometheus(url: str, minutes: float) -> Ask:
    """Asks a Prometheus about the last minutes.

    Raises:
        StrataError: By the result, if Prometheus does not answer.
    """
    end = time.time()
    start, step = end - 60 * minutes, max(60 * minutes / 200, 1)

    def ask(expr: str, instant: bool) -> list[dict[str, Any]]:
        window = {"time": end} if instant else {"start": start, "end": end, "step": step}
        asked = urllib.parse.urlencode({"query": expr, **window})
        address = f"{url.rstrip('/')}/api/v1/{'query' if instant else 'query_range'}?{asked}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                found = json.load(answer)["data"]["result"]
        except OSError as error:
            raise StrataError(
                f"Prometheus at {url} does not answer: {error}; give its address by --url"
            ) from error
        return [{"values": [series["value"]], **series} for series in found] if instant else found

    return ask


def literal(expr: str, dashboard: dict[str, Any]) -> str:
    """An expression with the variables set to "All", and a rate's interval of four scrapes."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "datasource":
            continue
        expr = expr.replace(f'"${variable["name"]}"', f'"{variable["allValue"]}"')
    return expr.replace("$__rate_interval", "20s")


def _series(panel: dict[str, Any], dashboard: dict[str, Any], ask: Ask) -> list[Series]:
    found, repeat, shown = [], panel.get("repeat", ""), None
    for target in panel["targets"]:
        for series in ask(literal(target["expr"], dashboard), target.get("instant", False)):
            # Of a panel that is repeated for each run, the first one is drawn.
            shown = series["metric"].get(repeat) if shown is None else shown
            if repeat and series["metric"].get(repeat) != shown:
                continue
            name = re.sub(
                r"{{(\w+)}}",
                lambda m, labels=series["metric"]: labels.get(m[1], m[0]),
                target["legendFormat"],
            )
            points = [(float(t), float(v)) for t, v in series["values"]]
            points = [(t, v) for t, v in points if math.isfinite(v)]
            if points:
                found.append((name, [t for t, _ in points], [v for _, v in points]))
    return found


def _number(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value >= 120:
        return f"{value / 3600:.3g} h" if value >= 7200 else f"{value / 60:.3g} min"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if 0 < abs(value) < 1 else f"{value:.3g} s"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def _colour(panel: dict[str, Any], name: str, otherwise: str) -> str:
    """The colour of the first override whose pattern matches a series' name."""
    for override in panel["fieldConfig"]["overrides"]:
        if re.search(override["matcher"]["options"].strip("/"), name):
            return _COLOURS[override["properties"][0]["value"]["fixedColor"]]
    return otherwise


def _draw_stat(axes: Axes, panel: dict[str, Any], series: list[Series]) -> None:
    """Values, or names, of at most three series."""
    defaults, options = panel["fieldConfig"]["defaults"], panel["options"]
    if options["reduceOptions"]["calcs"] != ["lastNotNull"]:
        raise StrataError(f"panel {panel['title']!r}: only the reducer lastNotNull can be drawn")
    for place, (name, _, values) in enumerate(series[:3]):
        value = values[-1]
        colour = defaults["color"].get("fixedColor", "blue")
        for step in defaults.get("thresholds", {}).get("steps", ()):
            colour = step["color"] if step["value"] is None or value >= step["value"] else colour
        text = name if options["textMode"] == "name" else _number(value, defaults["unit"])
        height = 1 - (place + 1) / (min(len(series), 3) + 1)
        colour = _colour(panel, name, _COLOURS[colour])
        axes.text(0.5, height, text, color=colour, fontsize=13, ha="center", va="center")


def _draw_lines(axes: Axes, panel: dict[str, Any], series: list[Series]) -> None:
    """Lines, or areas on top of each other, and the legend below."""
    defaults = panel["fieldConfig"]["defaults"]
    stacked = "stacking" in defaults.get("custom", {})
    sums: dict[float, float] = {}
    for place, (name, times, values) in enumerate(series):
        dates = date2num([datetime.fromtimestamp(t, UTC) for t in times])
        colour = _colour(panel, name, _LINES[place % len(_LINES)])
        if stacked:
            below = [sums.get(t, 0.0) for t in times]
            sums |= {t: b + v for t, b, v in zip(times, below, values, strict=True)}
            axes.fill_between(dates, below, [sums[t] for t in times], color=colour, label=name)
        else:
            axes.plot(dates, values, color=colour, linewidth=1, label=name)
    if "min" in defaults:
        axes.set_ylim(bottom=defaults["min"])
    axes.yaxis.set_major_formatter(lambda value, _: _number(value, defaults["unit"]))
    axes.xaxis.set_major_locator(LinearLocator(4))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S", tz=UTC))
    axes.tick_params(colors=_DIM, labelsize=6, length=0)
    axes.grid(color="#2a2c33", linewidth=0.6)
    axes.set_axisbelow(True)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[:_MAX_LEGEND],
        names[:_MAX_LEGEND],
        **{"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2, "fontsize": 5.5},
        **{"frameon": False, "labelcolor": _TEXT, "borderaxespad": 0, "handlelength": 1},
    )


def _marks(dashboard: dict[str, Any], ask: Ask) -> list[tuple[float, str]]:
    """Unix time and colour of the annotations' marks."""
    found: list[tuple[float, str]] = []
    for annotation in dashboard["annotations"]["list"]:
        for series in ask(literal(annotation["expr"], dashboard), False):
            times = [float(t) for t, _ in series["values"]]
            # Values that follow each other are one mark, at the first of them.
            times = [b for a, b in itertools.pairwise([-math.inf, *times]) if b - a > 60]
            if annotation.get("useValueForTime") == "on":
                times = {float(value) / 1000 for _, value in series["values"]}
            found += [(t, _COLOURS[annotation["iconColor"]]) for t in times]
    return found


def draw(dashboard: dict[str, Any], ask: Ask, remark: str = "") -> Figure:
    """A dashboard as a figure of 1200 pixels' width.

    Args:
        dashboard: Grafana's JSON.
        ask: Answers its queries.
        remark: Ends the caption.

    Raises:
        StrataError: A panel uses a reducer that cannot be drawn.
    """
    panels, marks = dashboard["panels"], _marks(dashboard, ask)
    width = 24 * _COLUMN
    height = _TOP + _ROW * max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels) + 24
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=_PAGE)
    FigureCanvasAgg(figure)
    figure.text(8 / width, 1 - 22 / height, dashboard["title"], color=_TEXT, fontsize=12)
    figure.text(8 / width, 9 / height, f"{CAPTION} {remark}".strip(), color=_DIM, fontsize=7)
    for panel in panels:
        grid = panel["gridPos"]
        left, wide = grid["x"] * _COLUMN, grid["w"] * _COLUMN - _GAP
        bottom = height - _TOP - (grid["y"] + grid["h"]) * _ROW + _GAP
        high = grid["h"] * _ROW - _GAP
        title = (left + 6) / width, (bottom + high - 14) / height
        if panel["type"] == "row":
            figure.text(*title, panel["title"], color=_TEXT, fontsize=10, weight="bold")
            continue
        frame = (left / width, bottom / height), wide / width, high / height
        figure.add_artist(Rectangle(*frame, facecolor=_PANEL, edgecolor="#2a2c33", zorder=-1))
        figure.text(*title, panel["title"], color=_TEXT, fontsize=7.5, weight="bold")
        series = _series(panel, dashboard, ask)
        lines = bool(series) and panel["type"] != "stat"
        edge, legend = 4, 4
        if lines:
            edge, legend = 48, 20 + 12 * math.ceil(min(len(series), _MAX_LEGEND) / 2)
        place = (left + edge) / width, (bottom + legend) / height
        size = (wide - edge - 22) / width, (high - legend - 24) / height
        axes = figure.add_axes((*place, *size), facecolor=_PANEL)
        axes.set_frame_on(False)
        if lines:
            _draw_lines(axes, panel, series)
            low, most = axes.get_xlim()
            for moment, colour in marks:
                at = float(date2num(datetime.fromtimestamp(moment, UTC)))
                if low <= at <= most:
                    axes.axvline(at, color=colour, linestyle=":", linewidth=0.8)
            continue
        axes.set_axis_off()
        if series:
            _draw_stat(axes, panel, series)
        else:
            text = textwrap.fill(panel["fieldConfig"]["defaults"]["noValue"], max(wide // 5, 20))
            axes.text(0.5, 0.5, text, color=_DIM, fontsize=7, ha="center", va="center")
    return figure


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    described = "Draw the dashboards as a Prometheus has them now."
    command = parse_config(
        RenderCommand, argv, prog="tools/render_dashboards.py", description=described
    )
    command.out.mkdir(parents=True, exist_ok=True)
    for source in sorted(_DASHBOARDS.glob("*.json")):
        dashboard = json.loads(source.read_text(encoding="utf-8"))
        picture = command.out / f"dashboard-{source.stem}.png"
        ask = prometheus(command.url, command.minutes)
        canvas = FigureCanvasAgg(draw(dashboard, ask, command.remark))
        canvas.draw()
        # Few colours are enough, and make the file a third as large.
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        pixels.quantize(96).save(picture, optimize=True)
        print(f"wrote {picture}")


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
