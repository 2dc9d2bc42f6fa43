"""A report as one HTML file: figures with their protocols, classes, neighbours, curves, provenance.

The page needs nothing but itself: no script, no font, no picture from elsewhere. It is built from
the values of `Page`, which hold all that is shown, so that what made them need not be at hand.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from strata.files import encode_text

__all__ = [
    "ClassResult",
    "Cue",
    "Curve",
    "FigureRow",
    "Neighbour",
    "Page",
    "Published",
    "Query",
    "Retrieved",
    "Table",
    "render",
    "write_page",
]


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """One figure; shares are in [0, 1]."""

    name: str
    """Like `Retrieval R@1`."""
    protocol: str
    """How it was measured: a figure never stands without it."""
    measured: tuple[float, ...]
    """Of each pretrained network or split."""
    data: str = ""
    """The data set and its split or splits."""
    untrained: tuple[float, ...] = ()
    """Of each untrained network of the same architecture, and split."""
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Shares in [0, 1] by row and column; None where there is none."""

    title: str
    remark: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """What became of the test videos of each class."""

    title: str
    """The data set and split."""
    protocol: str
    per_class: Mapping[str, tuple[int, float | None]]
    """By class: test videos and the share of them that is right; None where there are none."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Test videos by class (row) and prediction (column), in the order of `per_class`."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure that others published, in percent as they print it."""

    what: str
    """Method, backbone, pretraining."""
    protocol: str
    figure: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A gallery video near a query."""

    key: str
    label: str
    similarity: float
    """Cosine."""
    film: bytes
    """JPEG: some frames side by side."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A test video and its nearest training videos, nearest first."""

    key: str
    label: str
    film: bytes
    """JPEG: some frames side by side."""
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """Queries of one data set and what was found."""

    title: str
    """The data set and split."""
    protocol: str
    queries: tuple[Query, ...]


@dataclass(frozen=True, kw_only=True)
class Cue:
    """Where a network saw the direction of time in a video."""

    key: str
    label: str
    caption: str
    sheet: bytes
    """JPEG: frames, and the class activation maps over them."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value over the steps of a run."""

    name: str
    unit: str
    points: tuple[tuple[float, float], ...]
    """(step, value), in order."""
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that a report shows; what is empty is left out."""

    title: str
    note: str
    """What a reader must know before believing the figures."""
    figures: tuple[FigureRow, ...]
    published: tuple[Published, ...] = ()
    tables: tuple[Table, ...] = ()
    classes: tuple[ClassResult, ...] = ()
    retrieved: tuple[Retrieved, ...] = ()
    cues: tuple[Cue, ...] = ()
    cues_remark: str = ""
    """How the maps of `cues` are read."""
    training: tuple[Curve, ...] = ()
    """Of the classifier."""
    probe: tuple[Curve, ...] = ()
    """What the pretraining's probe found on its labelled set."""
    curves: tuple[Curve, ...] = ()
    """Of the pretraining."""
    health: tuple[Curve, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Commit, digests, versions: by name."""
    config: str = ""
    """The resolved configuration, YAML."""


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d8dee6; --card: #f5f7fa;
  --paper: #ffffff; --blue: #1f6fc4; --good: #1a7f4b; --bad: #b3403a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #9aa6b5; --line: #333d4a;
  --card: #1b222c; --paper: #12171e; --blue: #6db1ff; --good: #59c98c; --bad: #f0847d; } }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; overflow-wrap: anywhere }
.protocol { margin: 1.6rem 0 .4rem; padding-left: .7rem; border-left: 3px solid var(--blue) }
p { max-width: 46rem }
small, .soft { color: var(--soft); font-size: .87rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top }
th { font-weight: 600; color: var(--soft); font-size: .87rem }
td.number, th.number { text-align: right; white-space: nowrap }
td.main { font-weight: 600 }
.matrix { width: auto }
.matrix td, .matrix th { text-align: center; padding: .25rem .4rem; min-width: 2.2rem }
.matrix th[scope=row] { text-align: right; white-space: nowrap }
.matrix th.column span { writing-mode: vertical-rl; white-space: nowrap }
.bar { background: var(--card); border-radius: .2rem; height: .8rem; min-width: 6rem }
.bar div { background: var(--blue); border-radius: .2rem; height: 100% }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
.card { background: var(--card); border-radius: .5rem; padding: .6rem .7rem; min-width: 0 }
.card h3 { font-size: .92rem; margin: 0 0 .3rem }
svg { width: 100%; height: auto; display: block; color: var(--ink) }
svg text { font: 10px system-ui, sans-serif; fill: var(--soft) }
.query { margin: 0 0 1.2rem; padding: 0 0 1rem; border-bottom: 1px solid var(--line) }
.query > figure { max-width: 32rem }
.cue { margin: 0 0 1.6rem }
td.wide { width: 50% }
td.soft { min-width: 12rem }
figure { margin: .4rem 0; min-width: 0 }
figure img { width: 100%; height: auto; border-radius: .3rem; display: block }
figcaption { font-size: .82rem; color: var(--soft); overflow-wrap: anywhere }
figure.right img { outline: 3px solid var(--good) }
figure.wrong img { outline: 3px solid var(--bad) }
.right b { color: var(--good) } .wrong b { color: var(--bad) }
.near { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)) }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  font-size: .82rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 40rem) { dl { display: block } dd { margin: 0 0 .5rem }
  th, td { padding: .35rem .3rem; font-size: .9rem } }
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _share(value: float) -> str:
    return f"{value:.1%}"


def _spread(values: Sequence[float]) -> str:
    """Mean, and the range where there are several."""
    if not values:
        return "not measured"
    mean = _share(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({_share(min(values))} to {_share(max(values))})"


def _figures(page: Page) -> str:
    """A table for each protocol, which stands above: a phone would hide it in a last column."""
    protocols = dict.fromkeys(row.protocol for row in page.figures)
    return "".join(
        f"<p class='protocol'>{_text(protocol)}</p>"
        + _figure_table([row for row in page.figures if row.protocol == protocol])
        for protocol in protocols
    )


def _figure_table(figures: Sequence[FigureRow]) -> str:
    rows = "".join(
        f"<tr><td>{_text(row.name)}<br><small>{_text(row.data)}</small></td>"
        f"<td class='number main'>{_spread(row.measured)}</td>"
        f"<td class='number'>{_spread(row.untrained)}</td>"
        f"<td class='number'>{'' if row.chance is None else _share(row.chance)}</td></tr>"
        for row in figures
    )
    return (
        "<div class='scroll'><table><thead><tr><th>figure</th><th class='number'>pretrained</th>"
        "<th class='number'>untrained</th><th class='number'>chance</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _published(page: Page) -> str:
    if not page.published:
        return ""
    rows = "".join(
        f"<tr><td>{_text(p.what)}</td><td class='number'>{_text(p.figure)}</td>"
        f"<td class='soft'>{_text(p.protocol)}</td><td class='soft'>{_text(p.source)}</td></tr>"
        for p in page.published
    )
    return (
        "<h2>Published results</h2><p class='soft'>As their authors give them, on the full data "
        "sets. Comparable with the figures above only where data, pretraining and protocol are "
        "the same.</p><div class='scroll'><table><thead><tr><th>what</th>"
        "<th class='number'>figure, %</th><th>protocol</th><th>source</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _tables(page: Page) -> str:
    return "".join(_table(table) for table in page.tables)


def _table(table: Table) -> str:
    head = "".join(f"<th class='number'>{_text(c)}</th>" for c in table.columns)
    rows = "".join(
        f"<tr><td>{_text(name)}</td>"
        + "".join(f"<td class='number'>{'' if v is None else _share(v)}</td>" for v in values)
        + "</tr>"
        for name, values in table.rows.items()
    )
    return (
        f"<h2>{_text(table.title)}</h2><p class='soft'>{_text(table.remark)}</p>"
        f"<div class='scroll'><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _classes(result: ClassResult) -> str:
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td class='number'>{count}</td>"
        f"<td class='number'>{'' if share is None else _share(share)}</td><td class='wide'>"
        f"<div class='bar'><div style='width:{100 * (share or 0):.1f}%'></div></div></td></tr>"
        for name, (count, share) in result.per_class.items()
    )
    return (
        f"<h2>By class: {_text(result.title)}</h2><p class='soft'>{_text(result.protocol)}</p>"
        "<div class='scroll'><table><thead><tr><th>class</th><th class='number'>videos</th>"
        f"<th class='number'>right</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _confusion(result: ClassResult) -> str:
    if not result.confusion:
        return ""
    names = list(result.per_class)
    head = "".join(f"<th class='column'><span>{_text(n)}</span></th>" for n in names)
    rows = []
    for name, counts in zip(names, result.confusion, strict=True):
        total = max(sum(counts), 1)
        cells = "".join(
            f"<td style='background:color-mix(in srgb, var(--blue) {80 * c / total:.0f}%, "
            f"transparent)'>{c}</td>"
            if c
            else "<td></td>"
            for c in counts
        )
        rows.append(f"<tr><th scope='row'>{_text(name)}</th>{cells}</tr>")
    return (
        f"<h2>Confusion: {_text(result.title)}</h2><p class='soft'>Rows: the class; columns: what "
        "it was taken for; test videos.</p><div class='scroll'><table class='matrix'><thead><tr>"
        f"<th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _picture(film: bytes, description: str) -> str:
    coded = base64.b64encode(film).decode()
    return f"<img alt='{_text(description)}' src='data:image/jpeg;base64,{coded}'>"


def _queries(retrieved: Retrieved) -> str:
    parts = []
    for query in retrieved.queries:
        near = "".join(
            f"<figure class='{'right' if n.label == query.label else 'wrong'}'>"
            f"{_picture(n.film, f'frames of {n.key}')}<figcaption>"
            f"<b>{'&#10003; same class' if n.label == query.label else '&#10007; other class'}</b>:"
            f" {_text(n.label)}, cosine {n.similarity:.3f}<br>{_text(n.key)}</figcaption></figure>"
            for n in query.neighbours
        )
        parts.append(
            f"<div class='query'><figure>{_picture(query.film, f'frames of {query.key}')}"
            f"<figcaption>query: {_text(query.label)}, {_text(query.key)}</figcaption></figure>"
            f"<div class='near'>{near}</div></div>"
        )
    return (
        f"<h2>Nearest neighbours: {_text(retrieved.title)}</h2><p class='soft'>Test videos and the "
        "training videos nearest to them, nearest first. The queries are evenly spaced in the test "
        f"set, not chosen. {_text(retrieved.protocol)}</p>" + "".join(parts)
    )


def _cues(page: Page) -> str:
    if not page.cues:
        return ""
    parts = "".join(
        f"<figure class='cue'>{_picture(c.sheet, f'activation maps of {c.key}')}"
        f"<figcaption>{_text(c.label)}, {_text(c.key)}: {_text(c.caption)}</figcaption></figure>"
        for c in page.cues
    )
    return f"<h2>Temporal cues</h2><p class='soft'>{_text(page.cues_remark)}</p>{parts}"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 300, 150, 38, 18, 8


def _number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}"
    return f"{value:.1e}"


def _plot(curve: Curve) -> str:
    """One small chart; values that are not finite are left out of the line and said."""
    finite = [(x, y) for x, y in curve.points if math.isfinite(y)]
    lost = len(curve.points) - len(finite)
    if not finite:
        return f"<p class='soft'>no finite value in {len(curve.points)} readings</p>"
    ys = [y for _, y in finite] + ([] if curve.chance is None else [curve.chance])
    low, high = min(ys), max(ys)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    first, last = finite[0][0], max(finite[-1][0], finite[0][0] + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - 6),
            _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in finite))
    marks = [
        f"<text x='{_LEFT - 4}' y='{at(first, y)[1] + 3:.1f}' text-anchor='end'>{_number(y)}</text>"
        for y in (low, high)
    ]
    marks += [
        f"<text x='{at(x, low)[0]:.1f}' y='{_HEIGHT - 4}' text-anchor='{side}'>{x:.0f}</text>"
        for x, side in ((first, "start"), (last, "end"))
    ]
    dashed = ""
    if curve.chance is not None:
        y = at(first, curve.chance)[1]
        dashed = (
            f"<line x1='{_LEFT}' x2='{_WIDTH - 6}' y1='{y:.1f}' y2='{y:.1f}' "
            "stroke='var(--soft)' stroke-dasharray='4 3'/>"
        )
    note = f"<small>{lost} readings are not finite</small>" if lost else ""
    drawn = (
        f"<polyline points='{line}' fill='none' stroke='var(--blue)' stroke-width='1.6' "
        "stroke-linejoin='round'/>"
    )
    if len(finite) == 1:
        px, py = at(*finite[0])
        drawn = f"<circle cx='{px:.1f}' cy='{py:.1f}' r='2.5' fill='var(--blue)'/>"
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{_text(curve.name)}'>"
        f"{dashed}{drawn}{''.join(marks)}</svg>{note}"
    )


def _curves(title: str, remark: str, curves: Sequence[Curve]) -> str:
    if not curves:
        return ""
    cards = "".join(
        f"<div class='card'><h3>{_text(c.name)} <small>{_text(c.unit)}</small></h3>{_plot(c)}</div>"
        for c in curves
    )
    return (
        f"<h2>{_text(title)}</h2><p class='soft'>{_text(remark)}</p><div class='grid'>{cards}</div>"
    )


def _provenance(page: Page) -> str:
    rows = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in page.provenance.items())
    config = ""
    if page.config:
        config = (
            "<details><summary>The resolved configuration</summary>"
            f"<pre>{_text(page.config)}</pre></details>"
        )
    return f"<h2>What was run</h2><dl>{rows}</dl>{config}" if rows or config else ""


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        ValueError: The confusion matrix does not fit the classes.
    """
    for result in page.classes:
        sides = {len(result.per_class)} | {len(row) for row in result.confusion}
        if result.confusion and sides != {len(result.confusion)}:
            raise ValueError(
                f"a confusion matrix of sides {sides} for {len(result.per_class)} classes"
            )
    body = "".join(
        (
            f"<h1>{_text(page.title)}</h1><p>{_text(page.note)}</p>",
            _figures(page),
            _published(page),
            _tables(page),
            _cues(page),
            *(_classes(result) + _confusion(result) for result in page.classes),
            *(_queries(retrieved) for retrieved in page.retrieved),
            _curves("Training of the classifier", "Over its steps.", page.training),
            _curves(
                "Learning curve",
                "Over the pretraining's steps: what its probe found on a labelled set of its own. "
                "Dashed: R@1 at chance.",
                page.probe,
            ),
            _curves(
                "Loss terms over steps",
                "Of the pretraining; nats, before their weights. Dashed: the term at chance. Terms "
                "of the second stage begin with it.",
                page.curves,
            ),
            _curves("Health of the representation", "Over the pretraining's steps.", page.health),
            _provenance(page),
        )
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_text(page.title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def write_page(page: Page, path: Path) -> None:
    """Write the page, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(encode_text(render(page)))
    temporary.replace(path)
