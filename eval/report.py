"""A result's page: from `report.json` and what lies beside it to what a person can look at."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import strata
from strata.config import plain
from strata.dataload.reader import ShardReader
from strata.eval.pictures import film_strip
from strata.eval.published import PUBLISHED
from strata.eval.report_page import (
    ClassResult,
    Curve,
    FigureRow,
    Neighbour,
    Page,
    Query,
    Retrieved,
    Table,
    write_page,
)
from strata.eval.results import commit, set_sizes
from strata.logs import read_json_lines

__all__ = ["DemoResult", "build_page", "write_report"]

_KINDS = {
    "retrieval": ("Retrieval", "retrieval"),
    "linear": ("Linear probe", "linear probe"),
    "finetune": ("Finetune", "finetune"),
    "temporal_cam": ("Original or reversed", ""),
}
"""By protocol: what its figures are called here, and among the published ones."""

_QUERIES = 6
_MAX_POINTS = 400
"""Of a curve, evenly spaced: more cannot be seen."""

Record = Mapping[str, Any]


def _kind(name: str) -> str:
    """The protocol of an evaluation's name, like `linear-cached-untrained-0`."""
    return name.split("-")[0]


def _protocols(record: Record) -> dict[str, str]:
    """The protocol in words, by protocol; two for `compare`."""
    return record.get("protocols") or {_kind(record["evaluation"]): record["protocol"]}


def _kind_of(figure: str, record: Record) -> str:
    kinds = list(_protocols(record))
    if len(kinds) == 1:
        return kinds[0]
    return "retrieval" if figure.startswith("R@") else "linear"


def _groups(record: Record) -> Iterator[tuple[str, list[Record]]]:
    """The results of each data set."""
    for data in record["by_data"]:
        yield data, [r for r in record["results"] if r["data"] == data]


def _where(data: str, results: Sequence[Record]) -> str:
    splits = [r["split"] for r in results]
    if len(splits) == 1:
        return f"{data}, split {splits[0]}" if splits[0].isdigit() else f"{data}, {splits[0]}"
    return f"{data}, mean of splits {', '.join(splits)}"


def _main_row(figures: Mapping[str, Any]) -> str:
    return "pretrained" if "pretrained" in figures else "measured"


def _figure_rows(record: Record) -> tuple[FigureRow, ...]:
    rows = []
    for data, results in _groups(record):
        figures = [r["figures"] for r in results]
        main = _main_row(figures[0])
        for name in figures[0][main]:
            kind = _kind_of(name, record)
            chance = [f["chance"][name] for f in figures]
            rows.append(
                FigureRow(
                    name=f"{_KINDS[kind][0]} {name}",
                    protocol=_protocols(record)[kind],
                    data=f"{_where(data, results)}; {set_sizes([r['sets'] for r in results])}",
                    measured=tuple(f[main][name] for f in figures),
                    untrained=tuple(
                        f[row][name] for f in figures for row in f if row.startswith("untrained")
                    ),
                    chance=statistics.fmean(chance),
                )
            )
    return tuple(rows)


def _table(title: str, remark: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    columns = tuple(dict.fromkeys(name for values in rows.values() for name in values))
    return Table(
        title=title,
        remark=remark,
        columns=columns,
        rows={row: tuple(values.get(c) for c in columns) for row, values in rows.items()},
    )


def _tables(record: Record) -> Iterator[Table]:
    for data, results in _groups(record):
        if len(results) > 1:
            splits = {f"split {r['split']}": r["figures"][_main_row(r["figures"])] for r in results}
            deviation = record["by_data"][data]["deviation"]
            rows = splits | {"standard deviation": deviation[_main_row(deviation)]}
            yield _table(f"Each split of {data}", "By the protocol above.", rows)
        if results[0]["variants"]:
            names = list(results[0]["variants"])
            means = {
                name: {
                    figure: statistics.fmean(r["variants"][name][figure] for r in results)
                    for figure in results[0]["variants"][name]
                }
                for name in names
            }
            remark = "The same protocol but for the level and the centring that each row names."
            yield _table(f"Variants: {_where(data, results)}", remark, means)


def _details(record: Record, result: Record) -> Iterator[tuple[str, str, Record]]:
    """Protocol, its words and what it found, of one result."""
    for kind, text in _protocols(record).items():
        yield kind, text, result["details"][kind] if "protocols" in record else result["details"]


def _class_result(where: str, kind: str, protocol: str, found: Record) -> ClassResult:
    share = "R@1" if kind == "retrieval" else "top1"
    return ClassResult(
        title=f"{_KINDS[kind][0]}, {where}",
        protocol=protocol,
        per_class={row["class"]: (row["num_test"], row[share]) for row in found["per_class"]},
        confusion=tuple(tuple(row) for row in found["confusion"]["counts"]),
    )


def _retrieved(where: str, protocol: str, found: Record, sets: Record) -> Retrieved:
    gallery, tested = (ShardReader(sets[name]["folder"]) for name in ("train", "test"))
    places = [{key: k for k, key in enumerate(reader.keys)} for reader in (gallery, tested)]
    neighbours = found["neighbours"]
    chosen = np.unique(np.linspace(0, len(neighbours) - 1, _QUERIES).round().astype(int))
    queries = tuple(
        Query(
            key=row["query"],
            label=row["class"],
            film=film_strip(tested, places[1][row["query"]]),
            neighbours=tuple(
                Neighbour(
                    key=near["key"],
                    label=near["class"],
                    similarity=near["similarity"],
                    film=film_strip(gallery, places[0][near["key"]], num_frames=4),
                )
                for near in row["nearest"]
            ),
        )
        for row in (neighbours[k] for k in chosen.tolist())
    )
    for reader in (gallery, tested):
        reader.close()
    return Retrieved(title=where, protocol=protocol, queries=queries)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    if len(points) <= _MAX_POINTS:
        return tuple(points)
    chosen = np.linspace(0, len(points) - 1, _MAX_POINTS).round().astype(int)
    return tuple(points[k] for k in chosen.tolist())


def _run_curves(records: Sequence[Record], part: str, unit: str) -> tuple[Curve, ...]:
    """Curves of `losses` or `health` of a pretraining; what a resume repeated counts once."""
    by_step = {r["step"]: r for r in records if r["kind"] == "step"}
    starts = [r for r in records if r["kind"] == "start"]
    chance = starts[-1]["chance"] if starts and part == "losses" else {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].get(part, {}).items():
            lines.setdefault(name, []).append((step, math.nan if value is None else value))
    return tuple(
        Curve(
            name=name.replace("_", " "),
            unit=unit,
            points=_thinned(points),
            chance=chance.get(name),
        )
        for name, points in lines.items()
    )


def _probe_curves(records: Sequence[Record]) -> tuple[Curve, ...]:
    """What the probe of a pretraining found; what a resume repeated counts once."""
    by_step = {r["step"]: r for r in records if r["kind"] == "probe"}
    lines: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(by_step):
        found = by_step[step]
        # A log of before the classifiers has none.
        named = {f"Top-1, {k}": v for k, v in found.get("accuracy", {}).items()}
        for name, value in ({"R@1": found["recall"]["R@1"]} | named).items():
            lines.setdefault(name, []).append((step, value))
    chance = next((r["chance"]["R@1"] for r in by_step.values()), None)
    return tuple(
        Curve(
            name=name,
            unit="share of the queries",
            points=_thinned(points),
            chance=chance if name == "R@1" else None,
        )
        for name, points in lines.items()
    )


def _training(where: str, details: Record) -> Iterator[Curve]:
    found = details.get("curves") or {}
    for name, unit in (("loss", "nats"), ("top1", "share of the batch")):
        if name in found:
            points = list(zip(found["step"], found[name], strict=True))
            yield Curve(name=f"{name}, {where}", unit=unit, points=_thinned(points))


def _provenance(record: Record, lost: int | None) -> dict[str, str]:
    facts = {
        "Strata": record["strata"],
        "commit": record["commit"],
        "checkpoint": f"{record['checkpoint']} (step {record['step']})",
        "checkpoint digest": record["checkpoint_digest"],
        "pretraining data, manifest digest": record["pretraining_manifest_digest"],
        "ranks, device": f"{record['num_ranks']}, {record['device']}",
    }
    for data, results in _groups(record):
        for result in results:
            for name, facts_of in result["sets"].items():
                facts[f"{_where(data, [result])}, {name} set"] = (
                    f"{facts_of['num_videos']} videos of {facts_of['num_listed']} listed, manifest "
                    f"digest {facts_of['manifest_digest']}"
                )
    if lost is None:
        facts["pretraining log"] = "not found beside the checkpoint; no curves"
    elif lost:
        facts["pretraining log"] = f"{lost} lines cannot be read"
    return facts


def _first(record: Record, note: str) -> str:
    """A page's note, headed by what is missing from the sets."""
    return f"{record['incomplete']}. {note}" if record["incomplete"] else note


def build_page(record: Record) -> Page:
    """The page of an evaluation.

    Args:
        record: The content of `report.json`. Its data sets are opened for the film strips, and the
            pretraining's log.jsonl, beside the checkpoint, for the curves.

    Returns:
        Everything but pictures that only the evaluation itself has (`Page.cues`).

    Raises:
        ShardError: A data set is no longer where it was.
    """
    run = Path(record["checkpoint"]).resolve().parent.parent
    log = run / "log.jsonl"
    log_records, lost = read_json_lines(log) if log.is_file() else ([], None)
    classes, retrieved, training = [], [], []
    for data, results in _groups(record):
        where = _where(data, results[:1])
        for kind, text, found in _details(record, results[0]):
            if "per_class" in found:
                classes.append(_class_result(where, kind, text, found))
            if "neighbours" in found:
                retrieved.append(_retrieved(where, text, found, results[0]["sets"]))
            training += _training(where, found)
    kinds = list(_protocols(record))
    names = [_KINDS[kind][1] for kind in kinds if _KINDS[kind][1]]
    untrained = "-untrained-" in record["evaluation"]
    settings = {"evaluation": record["settings"], "pretraining": record["pretraining"]}
    return Page(
        title=f"{' and '.join(_KINDS[k][0] for k in kinds)}: {run.name}",
        note=_first(
            record,
            "Shares of the test set. Where there are several splits or networks: mean (lowest to "
            "highest). What is shown by class and by query is of the first split."
            + (" The network that is called pretrained here is UNTRAINED." if untrained else ""),
        ),
        figures=_figure_rows(record),
        published=tuple(p for p in PUBLISHED if any(p.protocol.startswith(n) for n in names)),
        tables=tuple(_tables(record)),
        classes=tuple(classes),
        retrieved=tuple(retrieved),
        training=tuple(training),
        probe=_probe_curves(log_records),
        curves=_run_curves(log_records, "losses", "nats"),
        health=_run_curves(log_records, "health", ""),
        provenance=_provenance(record, lost),
        config=yaml.safe_dump(settings, sort_keys=False),
    )


_ROWS = (("R@1", "Retrieval R@1"), ("R@5", "Retrieval R@5"), ("Top-1", "Linear probe Top-1"))


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What a demo measured: shares in [0, 1] by the figure's name, for each network."""

    generated: bool
    """Whether the videos are drawn by a program."""
    trained: tuple[dict[str, float], ...]
    untrained: tuple[dict[str, float], ...]
    chance: dict[str, float]
    logs: tuple[Path, ...]
    """JSON lines of the pretraining runs."""
    wall_s: float
    manifest_digest: str

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, pretrained, untrained, chance, as text."""
        return [
            (
                name,
                _spread([r[figure] for r in self.trained]),
                _spread([r[figure] for r in self.untrained]),
                f"{self.chance[figure]:.1%}",
            )
            for figure, name in _ROWS
        ]

    def note(self) -> str:
        """What a reader must know before believing the figures."""
        data = (
            "The videos are generated by a program: the figures show that the system works, not "
            "how good the method is on real videos."
            if self.generated
            else "The videos are the user's own."
        )
        seeds = f"{len(self.trained)} pretrained and {len(self.untrained)} untrained networks"
        return f"{data} {seeds}; where there are several, mean and range (lowest to highest)."

    def table(self) -> str:
        """For the terminal."""
        lines = [("", "pretrained", "untrained", "chance"), *self.rows()]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", self.note()])


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured"
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def write_report(result: DemoResult, record: Record, out: Path) -> Path:
    """Write a demo's `report.json` and `report.html` into `out`.

    Args:
        result: The figures of all networks.
        record: What `compare` wrote of the first pretrained network.
        out: The folder.

    Returns:
        The page's path.
    """
    facts = {"strata": strata.__version__, "commit": commit(), **plain(result)}
    (out / "report.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    page = build_page(record)
    figures = tuple(
        replace(
            row,
            measured=tuple(trained[name] for trained in result.trained),
            untrained=tuple(untrained[name] for untrained in result.untrained),
        )
        for row in page.figures
        for name in [row.name.rpartition(" ")[2]]
    )
    path = out / "report.html"
    took = {"the whole took": f"{result.wall_s:.0f} s"}
    write_page(
        replace(
            page,
            title="Strata: a pretrained video encoder",
            note=_first(record, result.note()),
            figures=figures,
            provenance=dict(page.provenance) | took,
        ),
        path,
    )
    return path
