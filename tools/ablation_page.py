"""The tables of a grid's record: for a browser, for a terminal, and as Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strata.eval.protocols.pixels import PIXEL_MAPS
from strata.eval.report import page_of
from strata.files import write_atomic
from strata.tools.ablation_table import write_json

__all__ = ["write_tables"]

_SHOWN = {"retrieval": ("R@1", "R@5"), "linear": ("Top-1",), "finetune": ("Top-1",)}
"""Figures that the tables show; the record has all."""
_HEALTH = (
    "graph_off_diagonal_mass",
    "prototypes_in_use",
    "embedding_effective_rank",
    "cosine_altered_",
)
"""Beginnings of the health figures that the tables show; the record has all."""


def _incomplete(summary: Mapping[str, Any]) -> list[str]:
    """Which sets lack listed videos; shown first."""
    found = {
        f"{name}: {evaluation['incomplete']}"
        for run in summary["runs"]
        for name, evaluation in run["evaluations"].items()
        if evaluation.get("incomplete")
    }
    return sorted(found)


def _columns(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Heading, evaluation, data and figure of each column."""
    columns = []
    for name, evaluation in summary["evaluations"].items():
        data_names = list(summary["chance"].get(name, {"": {}}))
        for data in data_names:
            for figure in _SHOWN[evaluation["protocol"]]:
                of = f" {data}" if len(data_names) > 1 else ""
                columns.append((f"{name}{of} {figure}", name, data, figure))
    return columns


def _spread(grid: Mapping[str, Any]) -> tuple[str, str]:
    """The spread that ± shows: its key in the record, and its name."""
    if grid["splits"]:
        splits = ", ".join(map(str, grid["splits"]))
        return "error", f"standard error over splits {splits} and seeds"
    return "deviation", "sample standard deviation over seeds"


def _cell_text(
    found: Mapping[str, Any] | None, num_runs: int, spread: str, scale: float, digits: int
) -> str:
    if not found:
        return "not measured"
    text = f"{scale * found['mean']:.{digits}f}"
    if found[spread] is not None:
        text += f" ± {scale * found[spread]:.{digits}f}"
    if found["num_runs"] < num_runs:
        text += f" ({found['num_runs']} of {num_runs} runs)"
    return text


def _figures(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of figures, its heading first."""
    columns, (spread, _) = _columns(summary), _spread(summary["grid"])
    table = [["", "runs", *(heading for heading, *_ in columns)]]
    for row, record in summary["rows"].items():
        of = record["num_runs"]
        done = record["num_complete"]
        runs = str(of) if done == of else f"{done} of {of} complete"
        cells = [
            _cell_text(record["figures"][name].get(data, {}).get(figure), of, spread, 100, 1)
            for _, name, data, figure in columns
        ]
        table.append([row, runs, *cells])
    chance = summary["chance"]
    if chance:
        shown = [chance.get(n, {}).get(d, {}).get(f) for _, n, d, f in columns]
        table.append(["chance", "", *("" if v is None else f"{100 * v:.1f}" for v in shown)])
    return table


def _healths(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of health figures, its heading first; empty without pretrained rows."""
    rows = {k: v for k, v in summary["rows"].items() if v["pretraining_s"]}
    spread, _ = _spread(summary["grid"])
    found = dict.fromkeys(n for v in rows.values() for n in v["health"] if n.startswith(_HEALTH))
    if not rows:
        return []
    table = [["", *found, "pretraining, s"]]
    for row, record in rows.items():
        of = record["num_runs"]
        health = [
            _cell_text(record["health"][n], of, spread, 1, 3) if n in record["health"] else ""
            for n in found
        ]
        table.append([row, *health, _cell_text(record["pretraining_s"], of, spread, 1, 0)])
    return table


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rows = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rows])


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _settings_text(grid: Mapping[str, Any], row: str) -> str:
    """Describe the settings of a row."""
    own = grid["rows"][row]
    if own["pixels"]:
        return f"{PIXEL_MAPS[own['pixels']]}, of the clips that {own['untrained']} is tested on"
    if own["untrained"]:
        return f"the network of {own['untrained']} with new random weights from the seed"
    settings = ", ".join(f"`{k}` {json.dumps(v)}" for k, v in own["set"].items())
    return f"`{own['pretrain'] or grid['pretrain']}`" + (f" with {settings}" if settings else "")


def _pretrained_on(summary: Mapping[str, Any], quote: str) -> str:
    """The data and the settings that all rows share, in words."""
    grid = summary["grid"]
    seeds = ", ".join(map(str, grid["seeds"]))
    shared = ", ".join(f"{quote}{k}{quote} {json.dumps(v)}" for k, v in grid["set"].items())
    return (
        f"Pretrained on {quote}{grid['shards']}{quote}{f' with {shared}' if shared else ''}, seeds "
        f"{seeds}. A seed decides the pretraining's weights, order and augmentation, or the "
        "untrained weights; what an evaluation draws itself is the same for all."
    )


def _protocols(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each evaluation, and its protocol in words; by row where rows differ."""
    found: list[tuple[str, str]] = []
    for name, evaluation in summary["evaluations"].items():
        texts = dict.fromkeys(evaluation["in_words"].values())
        if len(texts) <= 1:
            found += [(name, text) for text in texts]
        else:
            found += [(f"{name}, {row}", text) for row, text in evaluation["in_words"].items()]
    return found


def _missing(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Runs that are not complete, and why."""
    return [(r["name"], r["reason"]) for r in summary["runs"] if r["status"] != "complete"]


def _footer(summary: Mapping[str, Any]) -> str:
    measured = ", ".join(summary["commits"]) or "nothing yet"
    return (
        f"Strata {summary['strata']}, measured by {measured}; {summary['total_s']:.0f} s in all. "
        "All figures of all runs: ablation.json."
    )


def _page(summary: Mapping[str, Any]) -> str:
    grid = summary["grid"]
    lines = [
        *(f"{text}\n" for text in _incomplete(summary)),
        f"# {summary['title']}",
        "",
        f"Mean ± {_spread(grid)[1]}, in %.",
        "",
        _markdown(_figures(summary)),
        "",
        _pretrained_on(summary, "`"),
        "",
        *(f"- {row}: {_settings_text(grid, row)}" for row in grid["rows"]),
        "",
        "## Protocols",
        "",
        *(f"- {name}: {text}" for name, text in _protocols(summary)),
    ]
    healths = _healths(summary)
    if healths:
        lines += ["", "## Health at the end of pretraining", "", _markdown(healths)]
    missing = _missing(summary)
    if missing:
        lines += ["", "## Not complete", "", *(f"- {name}: {reason}" for name, reason in missing)]
    return "\n".join([*lines, "", _footer(summary)]) + "\n"


def _html(summary: Mapping[str, Any]) -> str:
    """The same as a page for a browser."""
    grid, healths, missing = summary["grid"], _healths(summary), _missing(summary)
    spread = f"Mean ± {_spread(grid)[1]}"
    tables = [("", f"{spread}, in %.", _figures(summary))]
    if healths:
        tables.append(("Health at the end of pretraining", f"{spread}.", healths))
    rows = [(row, _settings_text(grid, row).replace("`", "")) for row in grid["rows"]]
    lists = [("Rows", rows), ("Protocols", _protocols(summary))]
    return page_of(
        "ablation.html.j2",
        title=summary["title"],
        incomplete=list(_incomplete(summary)),
        tables=tables,
        lists=[*lists, ("Not complete", missing)] if missing else lists,
        footer=f"{_pretrained_on(summary, '')} {_footer(summary)}",
    )


def write_tables(out: Path, summary: Mapping[str, Any]) -> str:
    """Write `ablation.json`, `ablation.md` and `ablation.html`.

    Returns:
        The table for a terminal.
    """
    write_json(out / "ablation.json", summary)
    write_atomic(out / "ablation.md", _page(summary), sync=False)
    write_atomic(out / "ablation.html", _html(summary), sync=False)
    head = "".join(f"{text}\n" for text in _incomplete(summary))
    head += f"{summary['title']} (mean ± {_spread(summary['grid'])[1]}, %)"
    return f"{head}\n{_aligned(_figures(summary))}"
