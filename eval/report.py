"""The page of a result: one self-contained HTML file, by report.html.j2.

All pictures are part of the file. The film strips are read through the result's open sets, the
curves of the pretraining from the log.jsonl beside the checkpoint.
"""

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure

import strata
from strata.code_digest import commit
from strata.eval.pictures import film_strip
from strata.eval.published import PUBLISHED
from strata.eval.results import (
    Classified,
    Cues,
    EvaluationResult,
    Figures,
    Measurement,
    PairResult,
    Retrieved,
    mean_of,
)
from strata.eval.summary import KIND_TITLES, figure_lines, pairs_title, share_range
from strata.files import write_atomic
from strata.logs import read_json_lines

__all__ = [
    "Curve",
    "Film",
    "Query",
    "curve_svg",
    "page_of",
    "probe_curves",
    "render",
    "run_curves",
    "shown_queries",
    "write_page",
]

_QUERIES = 6
"""How many queries the page shows of each data set."""
_MAX_POINTS = 400
"""Points of a curve, evenly spaced: a picture of this size cannot show more."""
_BLUE, _GREY = "#3584d6", "#7d8998"
"""Colours of the plots; readable on the light and on the dark background."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value over the steps of a run."""

    name: str
    unit: str
    points: Sequence[tuple[float, float]]
    """(step, value), in order."""
    chance: float | None = None

    @property
    def num_lost(self) -> int:
        """Values that are not finite, which the plot cannot show."""
        return sum(not math.isfinite(value) for _, value in self.points)


@dataclass(frozen=True, kw_only=True)
class Film:
    """A video as some of its frames side by side."""

    key: str
    label: str
    picture: bytes
    """JPEG."""
    similarity: float = 1.0
    """Cosine to the query."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A test video and the training videos nearest to it, nearest first."""

    video: Film
    neighbours: tuple[Film, ...]


def shown_queries(pair: PairResult, found: Retrieved) -> list[Query]:
    """Queries evenly spaced in the test set, with their neighbours.

    Raises:
        ShardError: A video cannot be read.
    """
    gallery, tested = pair.sets.train, pair.sets.test
    names, gallery_keys, tested_keys = tested.manifest.classes, gallery.keys, tested.keys
    last = len(found.nearest) - 1
    return [
        Query(
            video=Film(
                key=tested_keys[q],
                label=names[tested.labels[q]],
                picture=film_strip(tested, q),
            ),
            neighbours=tuple(
                Film(
                    key=gallery_keys[g],
                    label=names[gallery.labels[g]],
                    picture=film_strip(gallery, g, num_frames=4),
                    similarity=similarity,
                )
                for g, similarity in zip(
                    found.nearest[q].tolist(), found.similarity[q].tolist(), strict=True
                )
            ),
        )
        for q in np.unique(np.linspace(0, last, _QUERIES).round().astype(int)).tolist()
    ]


def _lines(records: Sequence[Mapping[str, float | None]], steps: Sequence[int]) -> dict[str, Any]:
    """Points of each named value over the steps; a missing value is NaN."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for step, record in zip(steps, records, strict=True):
        for name, value in record.items():
            lines.setdefault(name, []).append((step, math.nan if value is None else value))
    return lines


def run_curves(records: Sequence[Mapping[str, Any]], part: str, unit: str) -> list[Curve]:
    """Curves of `losses` or `health` of a pretraining; a step that a resume repeated counts once.

    Args:
        records: Of the run's log.jsonl.
        part: `losses` or `health`.
        unit: Of the values.
    """
    by_step = {r["step"]: r.get(part, {}) for r in records if r["kind"] == "step"}
    starts = [r for r in records if r["kind"] == "start"]
    chance = starts[-1]["chance"] if starts and part == "losses" else {}
    steps = sorted(by_step)
    return [
        Curve(name=name.replace("_", " "), unit=unit, points=points, chance=chance.get(name))
        for name, points in _lines([by_step[s] for s in steps], steps).items()
    ]


def probe_curves(records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Figures of the online probe of a pretraining; a repeated step counts once."""
    by_step = {r["step"]: r for r in records if r["kind"] == "probe"}
    steps = sorted(by_step)
    # Logs of earlier versions have no accuracy.
    values = [
        {"R@1": by_step[s]["recall"]["R@1"]}
        | {f"Top-1, {k}": v for k, v in by_step[s].get("accuracy", {}).items()}
        for s in steps
    ]
    chance = {"R@1": by_step[steps[0]]["chance"]["R@1"]} if steps else {}
    unit = "share of the queries"
    return [
        Curve(name=name, unit=unit, points=points, chance=chance.get(name))
        for name, points in _lines(values, steps).items()
    ]


def _training_curves(where: str, found: Classified) -> Iterator[Curve]:
    for name, unit in (("loss", "nats"), ("top1", "share of the batch")):
        if name in found.curves:
            points = list(zip(found.curves["step"], found.curves[name], strict=True))
            yield Curve(name=f"{name}, {where}", unit=unit, points=points)


def curve_svg(curve: Curve) -> str:
    """A small plot as SVG; values that are not finite are left out. The same curve, same bytes."""
    points = np.array(curve.points, float)
    points = points[np.isfinite(points[:, 1])]
    if len(points) > _MAX_POINTS:
        points = points[np.linspace(0, len(points) - 1, _MAX_POINTS).round().astype(int)]
    # Text as text, which keeps the file small; no random names and no date.
    with matplotlib.rc_context({"svg.hashsalt": "strata", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(3.2, 1.7), layout="constrained")
        axes = figure.subplots()
        if curve.chance is not None:
            axes.axhline(curve.chance, color=_GREY, linestyle="--", linewidth=1)
        marker = "o" if len(points) == 1 else None
        axes.plot(points[:, 0], points[:, 1], color=_BLUE, linewidth=1.4, marker=marker)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_GREY)
        axes.locator_params(nbins=5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _tables(result: EvaluationResult) -> Iterator[tuple[str, str, Figures]]:
    """Title, remark and rows of the tables below the main figures."""
    for data, pairs in result.by_data.items():
        if len(pairs) > 1:
            name = next(iter(pairs[0].measured.values())).measured.name
            _, deviation = mean_of([pair.figures for pair in pairs])
            rows = {f"split {pair.sets.split}": pair.figures[name] for pair in pairs}
            rows["standard deviation"] = deviation[name]
            yield f"Each split of {data}", "By the protocol above.", rows
        variants = [pair.variants for pair in pairs]
        if variants[0]:
            remark = "The same protocol but for the level and the centring that each row names."
            yield f"Variants: {pairs_title(pairs)}", remark, mean_of(variants)[0]


def _first_details(result: EvaluationResult) -> Iterator[tuple[str, str, PairResult, Measurement]]:
    """Title, protocol, pair and measurement of each first split, which the details are of."""
    for pairs in result.by_data.values():
        for kind, measurement in pairs[0].measured.items():
            title = f"{KIND_TITLES[kind]}, {pairs[0].sets.title}"
            yield title, result.protocols[kind], pairs[0], measurement


def _facts(result: EvaluationResult, log: str) -> dict[str, str]:
    """The settings and versions of the evaluation, by name."""
    facts = {
        "Strata": strata.__version__,
        "commit": commit(),
        "checkpoint": f"{result.checkpoint} (step {result.step})",
        "checkpoint digest": result.checkpoint_digest,
        "pretraining data, manifest digest": result.pretraining_manifest_digest,
        "ranks, device": f"{result.num_ranks}, {result.device}",
    }
    for pair in result.pairs:
        for name, facts_of in pair.sets.facts().items():
            facts[f"{pair.sets.title}, {name} set"] = (
                f"{facts_of['num_videos']} videos of {facts_of['num_listed']} listed, manifest "
                f"digest {facts_of['manifest_digest']}"
            )
    return facts | ({"pretraining log": log} if log else {})


def _data_uri(content: bytes | str, kind: str) -> str:
    data = content.encode() if isinstance(content, str) else content
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _template(name: str) -> str:
    return files("strata.eval").joinpath(name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_template),
    )
    environment.filters["interval"] = lambda v: "" if v is None else f"{v[0]:.1%} to {v[1]:.1%}"
    environment.filters["range"] = share_range
    environment.filters["share"] = lambda v: "" if v is None else f"{v:.1%}"
    environment.filters["jpeg"] = lambda content: _data_uri(content, "jpeg")
    environment.filters["plot"] = lambda curve: _data_uri(curve_svg(curve), "svg+xml")
    return environment


def page_of(template: str, **values: Any) -> str:
    """A template of this package, filled; it may extend page.html.j2."""
    return _environment().get_template(template).render(**values)


def render(result: EvaluationResult, folder: Path | None = None) -> str:
    """The page as HTML.

    Args:
        result: What is shown.
        folder: Where the page will be, to which its links are relative; the current one if None.

    Raises:
        ShardError: A video of the sets cannot be read.
    """
    run = result.checkpoint.resolve().parent.parent
    log = run / "log.jsonl"
    if log.is_file():
        records, num_lost = read_json_lines(log)
        log_text = f"{num_lost} lines cannot be read" if num_lost else ""
    else:
        records, log_text = [], "not found beside the checkpoint; no curves"
    details = list(_first_details(result))
    settings = {"evaluation": result.settings, "pretraining": result.pretraining}
    figures = [(text, figure_lines(result, kind)) for kind, text in result.protocols.items()]
    return page_of(
        "report.html.j2",
        result=result,
        title=f"{' and '.join(KIND_TITLES[kind] for kind in result.protocols)}: {run.name}",
        figures=figures,
        leads=[line.lead for _, lines in figures for line in lines if line.lead],
        link=lambda path: quote(os.path.relpath(path, folder or Path.cwd())),
        published=[row for row in PUBLISHED if row.kind in result.protocols],
        tables=[
            (title, remark, list(dict.fromkeys(c for row in rows.values() for c in row)), rows)
            for title, remark, rows in _tables(result)
        ],
        cues=[cue for *_, m in details if isinstance(m.details, Cues) for cue in m.details.shown],
        classes=[
            (title, text, m.details.by_class)
            for title, text, _, m in details
            if isinstance(m.details, Classified | Retrieved)
        ],
        retrieved=[
            (pair.sets.title, text, shown_queries(pair, m.details))
            for _, text, pair, m in details
            if isinstance(m.details, Retrieved)
        ],
        training=[
            curve
            for _, _, pair, m in details
            if isinstance(m.details, Classified)
            for curve in _training_curves(pair.sets.title, m.details)
        ],
        probe=probe_curves(records),
        losses=run_curves(records, "losses", "nats"),
        health=run_curves(records, "health", ""),
        facts=_facts(result, log_text),
        settings=yaml.safe_dump(settings, sort_keys=False),
    )


def write_page(result: EvaluationResult, path: Path) -> None:
    """Write the page, atomically.

    Raises:
        OSError: The file cannot be written.
        ShardError: A video of the sets cannot be read.
    """
    write_atomic(path, render(result, path.parent))
