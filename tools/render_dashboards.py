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
from strata.tools.dashboards import PAGES, Dashboard, Panel, dashboard, expand

__all__ = ["render"]

_COLUMN, _ROW = 50, 26
_COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#508642")
_MAX_LINES = 16

Series = list[tuple[str, list[tuple[float, float]]]]
"""Legend and points (Unix time, value)."""


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


def _plot(series: Series, unit: str, width: int, height: int) -> str:
    """Lines with axes as SVG, the legend below."""
    series = series[:_MAX_LINES]
    points = [p for _, line in series for p in line]
    if not points:
        return '<p class="none">no data (see the description of the panel)</p>'
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
        return 6 + plot_height * (high - v) / (high - low)

    parts = [f'<svg width="{width}" height="{plot_height + bottom + 8}">']
    for k in range(4):
        value = low + (high - low) * k / 3
        parts.append(
            f'<line x1="{left}" x2="{width - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{_number(value, unit)}</text>"
        )
    for k in range(5):
        t = first + (last - first) * k / 4
        label = time.strftime("%H:%M:%S", time.gmtime(t))
        parts.append(
            f'<text x="{x(t):.1f}" y="{plot_height + bottom + 2}" text-anchor="middle">'
            f"{label}</text>"
        )
    for place, (_, line) in enumerate(series):
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in line)
        colour = _COLOURS[place % len(_COLOURS)]
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
    parts.append("</svg>")
    legend = "".join(
        f'<span><i style="background:{_COLOURS[n % len(_COLOURS)]}"></i>{html.escape(name)}</span>'
        for n, (name, _) in enumerate(series[: 4 * columns])
    )
    more = len(series) - 4 * columns
    legend += f"<span>and {more} more</span>" if more > 0 else ""
    return "".join(parts) + f'<div class="legend" style="columns:{columns}">{legend}</div>'


def _stat(series: Series, panel: Panel) -> str:
    if not any(line for _, line in series):
        return '<p class="none">no data (see the description of the panel)</p>'
    latest = max(line[-1][0] for _, line in series if line)
    if "== 1" in panel.queries[0][0]:
        values = [name for name, line in series if line and line[-1][0] == latest]
    else:
        values = [_number(line[-1][1], panel.unit) for _, line in series[:1]]
    return "".join(f'<p class="stat">{html.escape(v)}</p>' for v in values[:3])


_STYLE = """
body{margin:0;background:#111217;color:#d0d0d8;font:12px 'DejaVu Sans',sans-serif}
.panel{position:absolute;background:#181b1f;border:1px solid #2a2c33;box-sizing:border-box;
overflow:hidden}.panel h3{margin:4px 8px 0;font-size:12px;font-weight:600}
.row{position:absolute;font-weight:600;font-size:14px;padding:4px}
svg line{stroke:#2a2c33}svg text{fill:#8e8e98;font-size:10px}
svg polyline{fill:none;stroke-width:1.5}.none{color:#777;text-align:center;margin-top:40px}
.stat{font-size:22px;color:#7eb26d;text-align:center;margin:14px 0 0}
.legend{font-size:10px;margin:0 8px}.legend span{display:block;white-space:nowrap;overflow:hidden}
.legend i{display:inline-block;width:10px;height:3px;margin:0 5px 3px 0}
h1{font-size:17px;margin:8px;position:absolute}
"""


def _page(url: str, page: Dashboard, minutes: float) -> tuple[str, int]:
    """The page and its height in pixels."""
    made, top, tallest = [f"<h1>{page.title}</h1>"], 36, 0
    panels = iter(page.panels)
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
            else _plot(series, panel.unit, width, height)
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
            text, height = _page(url, page, minutes)
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
