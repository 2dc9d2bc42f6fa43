"""Pictures of the dashboards as a Prometheus has them now: a page of ours in headless Chromium.

For README; Grafana draws the same panels at the same places, in its own style.
"""

import html
import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

from strata.errors import StrataError
from strata.tools.dashboards import (
    ANNOTATIONS,
    PAGES,
    PART_COLOURS,
    Dashboard,
    Panel,
    dashboard,
    expand,
)

__all__ = ["page_html", "render"]

_COLUMN, _ROW = 50, 26
_COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#508642")
_MAX_LINES = 16
_NAMED = {  # Grafana's names of colours
    "green": "#73bf69",
    "orange": "#ff9830",
    "red": "#f2495c",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "yellow": "#fade2a",
}

Series = list[tuple[str, list[tuple[float, float]]]]
"""Legend and points (Unix time, value)."""
Marks = list[tuple[float, str]]
"""Unix time and colour."""


def _ask(url: str, query: str, minutes: float) -> list[dict]:  # pyright: ignore[reportMissingTypeArgument]
    end = time.time()
    start = end - 60 * minutes
    asked = urllib.parse.urlencode(
        {"query": query, "start": start, "end": end, "step": max(minutes * 60 / 200, 1)}
    )
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{asked}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def _series(url: str, panel: Panel, page: Dashboard, minutes: float) -> Series:
    found: Series = []
    for query, legend in panel.queries:
        for series in _ask(url, expand(query, page, literal=True), minutes):
            text = legend
            for name, value in series["metric"].items():
                text = text.replace(f"{{{{{name}}}}}", value)
            points = [(float(t), float(v)) for t, v in series["values"]]
            found.append((text, [(t, v) for t, v in points if math.isfinite(v)]))
    return found


def _number(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def _marks(url: str, page: Dashboard, minutes: float) -> Marks:
    """Where Grafana would put the dashboard's annotations."""
    found: dict[tuple[float, str], None] = {}
    for made in ANNOTATIONS:
        for series in _ask(url, expand(made.query, page, literal=True), minutes):
            times = [float(t) for t, _ in series["values"]]
            if made.value_is_time:
                times = [float(v) / 1000 for _, v in series["values"]]
            elif times:
                times = times[:1]
            found |= {(t, _NAMED[made.colour]): None for t in times}
    return list(found)


def _colour(panel: Panel, name: str, place: int) -> str:
    part = name.rpartition(" ")[2]
    if panel.parts and part in PART_COLOURS:
        return _NAMED[PART_COLOURS[part]]
    return _COLOURS[place % len(_COLOURS)]


def _stack(series: Series) -> Series:
    """Each line upon those before it; they have the same times."""
    sums: dict[float, float] = {}
    stacked: Series = []
    for name, line in series:
        for t, v in line:
            sums[t] = sums.get(t, 0.0) + v
        stacked.append((name, [(t, sums[t]) for t, _ in line]))
    return stacked


def _nothing(panel: Panel) -> str:
    return f'<p class="none">{html.escape(panel.no_data)}</p>'


def _plot(series: Series, panel: Panel, width: int, height: int, marks: Marks) -> str:
    """Lines with axes as SVG, the legend below."""
    unit, series = panel.unit, series[:_MAX_LINES]
    names = [name for name, _ in series]
    if panel.stacked:
        series = _stack(series)
    points = [p for _, line in series for p in line]
    if not points:
        return _nothing(panel)
    columns = 2 if width > 400 else 1
    lines = -(-len(series) // columns)
    left, bottom = 62, 20
    plot_height = max(height - 30 - bottom - 14 * min(lines, 4), 40)
    first, last = min(t for t, _ in points), max(t for t, _ in points)
    low, high = min(v for _, v in points), max(v for _, v in points)
    low = min(low, 0.0) if unit in ("percentunit", "bytes", "s", "Bps") or low > 0.8 * high else low
    if high <= low:
        high = low + (abs(low) or 1.0)

    def x(t: float) -> float:
        return left + (width - left - 12) * (t - first) / max(last - first, 1)

    def y(v: float) -> float:
        return 10 + (plot_height - 4) * (high - v) / (high - low)

    parts = [f'<svg width="{width}" height="{plot_height + bottom + 8}">']
    for k in range(4):
        value = low + (high - low) * k / 3
        parts.append(
            f'<line x1="{left}" x2="{width - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{_number(value, unit)}</text>"
        )
    ticks = 5 if width > 400 else 3
    for k in range(ticks):
        t = first + (last - first) * k / (ticks - 1)
        label = time.strftime("%H:%M:%S", time.gmtime(t))
        anchor = {0: "start", ticks - 1: "end"}.get(k, "middle")
        parts.append(
            f'<text x="{x(t):.1f}" y="{plot_height + bottom + 4}" text-anchor="{anchor}">'
            f"{label}</text>"
        )
    for t, colour in marks:
        if first <= t <= last:
            parts.append(
                f'<line class="mark" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="10" y2="{y(low):.1f}" '
                f'style="stroke:{colour}"/>'
            )
    # Of areas the tallest first, so that all are seen.
    for place, (name, line) in sorted(enumerate(series), reverse=panel.stacked):
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in line)
        colour = _colour(panel, name, place)
        if panel.stacked and line:
            ends = f"{x(line[-1][0]):.1f},{y(low):.1f} {x(line[0][0]):.1f},{y(low):.1f}"
            parts.append(f'<polygon points="{path} {ends}" fill="{colour}"/>')
        else:
            parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
    parts.append("</svg>")
    legend = "".join(
        f'<span><i style="background:{_colour(panel, name, n)}"></i>{html.escape(name)}</span>'
        for n, name in enumerate(names[: 4 * columns])
    )
    more = len(series) - 4 * columns
    legend += f"<span>and {more} more</span>" if more > 0 else ""
    return "".join(parts) + f'<div class="legend" style="columns:{columns}">{legend}</div>'


def _stat(series: Series, panel: Panel) -> str:
    if not any(line for _, line in series):
        return _nothing(panel)
    latest = max(line[-1][0] for _, line in series if line)
    now = [(name, line[-1][1]) for name, line in series if line and line[-1][0] == latest]
    shown = []
    for name, value in now[:3]:
        colour = _colour(panel, name, 0) if panel.parts else _NAMED["blue"]
        for least, level in panel.levels:
            colour = _NAMED[level] if value >= least else colour
        text = name if panel.named else _number(value, panel.unit)
        shown.append(f'<p class="stat" style="color:{colour}">{html.escape(text)}</p>')
    return "".join(shown)


_STYLE = """
body{margin:0;background:#111217;color:#d0d0d8;font:12px 'DejaVu Sans',sans-serif}
.panel{position:absolute;background:#181b1f;border:1px solid #2a2c33;box-sizing:border-box;
overflow:hidden}.panel h3{margin:4px 8px 0;font-size:12px;font-weight:600}
.row{position:absolute;font-weight:600;font-size:14px;padding:4px}
svg line{stroke:#2a2c33}svg line.mark{stroke-dasharray:3 3;opacity:.7}
svg text{fill:#8e8e98;font-size:10px}
svg polyline{fill:none;stroke-width:1.5}.none{color:#8e8e98;text-align:center;margin:16px 14px}
.stat{font-size:20px;text-align:center;margin:12px 0 0;white-space:nowrap}
.legend{font-size:10px;margin:0 8px}.legend span{display:block;white-space:nowrap;overflow:hidden}
.legend i{display:inline-block;width:10px;height:3px;margin:0 5px 3px 0}
h1{font-size:17px;margin:8px;position:absolute}
"""


def page_html(url: str, page: Dashboard, minutes: float) -> tuple[str, int]:
    """A dashboard's page and its height in pixels.

    Args:
        url: Of a Prometheus.
        page: The dashboard.
        minutes: How far back it shows.
    """
    made, top, tallest = [f"<h1>{page.title}</h1>"], 36, 0
    panels, marks = iter(page.panels), _marks(url, page, minutes)
    for drawn in dashboard(page)["panels"]:
        grid = drawn["gridPos"]
        x, y = grid["x"] * _COLUMN, top + grid["y"] * _ROW
        width, height = grid["w"] * _COLUMN - 6, grid["h"] * _ROW - 6
        tallest = max(tallest, y + height)
        if drawn["type"] == "row":
            made.append(f'<div class="row" style="left:{x}px;top:{y}px">{drawn["title"]}</div>')
            continue
        panel = next(panels)
        series = _series(url, panel, page, minutes)
        inside = (
            _stat(series, panel)
            if panel.kind == "stat"
            else _plot(series, panel, width, height, marks)
        )
        made.append(
            f'<div class="panel" style="left:{x}px;top:{y}px;width:{width}px;height:{height}px">'
            f"<h3>{html.escape(panel.title)}</h3>{inside}</div>"
        )
    body = "".join(made)
    return f"<!doctype html><meta charset=utf-8><style>{_STYLE}</style>{body}", tallest + 10


def render(url: str, folder: Path, minutes: float = 5.0) -> None:
    """Write `dashboard-<page>.png` for every dashboard.

    Args:
        url: Of a Prometheus.
        folder: Gets the pictures.
        minutes: How far back they show.

    Raises:
        StrataError: There is no Chromium, or it failed.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise StrataError("no chromium to draw with; install Debian's package chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        for page in PAGES:
            text, height = page_html(url, page, minutes)
            source = Path(name) / f"{page.uid}.html"
            source.write_text(text, encoding="utf-8")
            picture = folder / f"dashboard-{page.uid}.png"
            done = subprocess.run(
                [
                    *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                    *(f"--screenshot={picture.resolve()}", f"--user-data-dir={name}/profile"),
                    *(f"--window-size={24 * _COLUMN},{height}", source.as_uri()),
                ],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if done.returncode or not picture.exists():
                raise StrataError(f"{browser} drew nothing: {done.stderr.strip()[-300:]}")
            print(f"wrote {picture}")
