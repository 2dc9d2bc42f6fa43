"""What the runs of a grid say together: a record, and tables. docs/evaluation.md has the schema."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import strata
from strata.code_digest import commit
from strata.errors import ConfigError
from strata.eval.protocols.pixels import PIXEL_MAPS
from strata.eval.report import page_of
from strata.eval.summary import set_sizes
from strata.files import write_atomic
from strata.logs import read_json_lines
from strata.untrusted import decode_json

__all__ = ["Cell", "read_json", "summarise", "write_json", "write_tables"]

_SHOWN = {"retrieval": ("R@1", "R@5"), "linear": ("Top-1",), "finetune": ("Top-1",)}
"""Figures that the tables show; the record has all."""
_HEALTH = (
    "graph_off_diagonal_mass",
    "prototypes_in_use",
    "embedding_effective_rank",
    "cosine_altered_",
)
"""Beginnings of the health figures that the tables show; the record has all."""
_STATE = "cell.json"
_MAX_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid: a row with a seed. What became of it stands in its `cell.json`."""

    row: str
    seed: int
    split: int | None = None
    folder: Path
    """Its own: outcomes, output of its processes, reports."""
    source: Path
    """Folder of the cell whose checkpoint is evaluated: its own, unless it is untrained."""

    @property
    def name(self) -> str:
        """For messages."""
        of = "" if self.split is None else f", split {self.split}"
        return f"{self.row}{of}, seed {self.seed}"

    @property
    def run(self) -> Path:
        """Folder of the pretraining."""
        return self.source / "run"

    def report(self, evaluation: str) -> Path:
        """The record of an evaluation."""
        return self.folder / f"{evaluation}.json"

    def log(self, step: str) -> Path:
        """What a step's processes print."""
        return self.folder / f"{step}.log"

    def state(self) -> dict[str, Any]:
        """How each step ended last, by its name."""
        return _state(self.folder)

    def remember(self, step: str, outcome: Mapping[str, Any]) -> None:
        """Keep how a step ended."""
        write_json(self.folder / _STATE, self.state() | {step: outcome})

    def is_whole(self, step: str) -> bool:
        """Whether a step has ended well."""
        return self.state().get(step, {}).get("exit_code") == 0

    def is_pretrained(self) -> bool:
        """Whether the checkpoint to evaluate is that of a whole pretraining."""
        return _state(self.source).get("pretraining", {}).get("exit_code") == 0


def _state(folder: Path) -> dict[str, Any]:
    path = folder / _STATE
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A file that `write_json` wrote.

    Raises:
        ConfigError: It is not readable, or not JSON.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} is not readable: {error}") from error
    return decode_json(content, dict[str, Any], path, ConfigError, max_bytes=_MAX_BYTES)


def write_json(path: Path, content: Any) -> None:
    """Write a file: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False), sync=False)


def _log_facts(log: Path) -> dict[str, Any]:
    """What a pretraining's log.jsonl says at its end: steps, seconds, health."""
    steps, seconds, health, start, last = 0, 0.0, {}, None, 0.0
    for record in read_json_lines(log)[0]:
        if record["kind"] == "start":
            # Only what was written counts; a killed run may have worked on a little.
            seconds += 0.0 if start is None else last - start
            start = record["time_s"]
        elif record["kind"] == "step":
            steps = record["step"]
            health = record["health"] or health
        last = record["time_s"]
    seconds += 0.0 if start is None else last - start
    return {"steps": steps, "pretraining_s": round(seconds, 1), "health": health}


def _run_record(cell: Cell, untrained: bool, evaluations: Sequence[str]) -> dict[str, Any]:
    """All that is known of one run."""
    state = cell.state()
    record: dict[str, Any] = {
        "name": cell.name,
        "row": cell.row,
        "split": cell.split,
        "seed": cell.seed,
        "untrained": untrained,
        "run": str(cell.run),
        "status": "whole",
        "reason": "",
        "evaluations": {},
    }
    steps = list(evaluations) if untrained else ["pretraining", *evaluations]
    for step in steps:
        outcome = state.get(step, {})
        code = outcome.get("exit_code")
        if step != "pretraining":
            record["evaluations"][step] = outcome | {"log": str(cell.log(step))}
            if code == 0:
                report = read_json(cell.report(step))
                record["evaluations"][step] |= {
                    "report": str(cell.report(step)),
                    "protocol": f"{report['protocol']}; {_sizes(report)}",
                    "incomplete": report["incomplete"],
                    "checkpoint_digest": report["checkpoint_digest"],
                    "num_ranks": report["num_ranks"],
                    "commit": report["commit"],
                    "sets": [[r["data"], r["split"], r["sets"]] for r in report["results"]],
                    "pretraining_manifest_digest": report["pretraining_manifest_digest"],
                    "figures": {d: v["mean"]["measured"] for d, v in report["by_data"].items()},
                    "chance": {d: v["mean"]["chance"] for d, v in report["by_data"].items()},
                }
        else:
            record["pretraining"] = outcome | {"log": str(cell.log(step))}
            log = cell.run / "log.jsonl"
            if log.exists():
                record["pretraining"] |= _log_facts(log)
        if code != 0 and record["status"] == "whole":
            record["status"] = "not run" if code is None else "failed"
            if code is not None:
                record["reason"] = f"{step} failed with exit code {code}; see {cell.log(step)}"
            else:
                record["reason"] = f"{step} was not run to its end"
    return record


def _sizes(report: Mapping[str, Any]) -> str:
    return set_sizes([result["sets"] for result in report["results"]])


def _incomplete(summary: Mapping[str, Any]) -> list[str]:
    """What is missing from the sets, to stand first: the same of every row's evaluation."""
    found = {
        f"{name}: {evaluation['incomplete']}"
        for run in summary["runs"]
        for name, evaluation in run["evaluations"].items()
        if evaluation.get("incomplete")
    }
    return sorted(found)


def _refuse_mixtures(runs: Sequence[Mapping[str, Any]], evaluations: Sequence[str]) -> None:
    """Refuse to compare what was measured or pretrained on differing data.

    Raises:
        ConfigError: It was.
    """
    pretrained: dict[Any, tuple[str, Any]] = {}
    for name in evaluations:
        measured_by_split: dict[int | None, tuple[str, Any]] = {}
        for run in runs:
            found = run["evaluations"][name]
            if "figures" not in found:
                continue
            here = run["name"]
            digests = [
                [data, split, {k: v["manifest_digest"] for k, v in sets.items()}]
                for data, split, sets in found["sets"]
            ]
            measured = measured_by_split.setdefault(run["split"], (here, digests))
            if digests != measured[1]:
                raise ConfigError(
                    f"evaluation {name} was of other data for {measured[0]} than for {here}; the "
                    "shards have changed since, choose another --out"
                )
            digest = found["pretraining_manifest_digest"]
            first = pretrained.setdefault((run["row"], run["split"]), (here, digest))
            if digest != first[1]:
                raise ConfigError(
                    f"{first[0]} and {here} were pretrained on different data; the shards have "
                    "changed since, choose another --out"
                )


def _over_runs(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values),
        "deviation": deviation,
        "error": None if deviation is None else deviation / len(values) ** 0.5,
        "num_runs": len(values),
    }


def _row_record(runs: Sequence[Mapping[str, Any]], evaluations: Sequence[str]) -> dict[str, Any]:
    """Mean and spread over a row's runs."""
    figures: dict[str, Any] = {}
    for name in evaluations:
        found = [r["evaluations"][name] for r in runs if "figures" in r["evaluations"][name]]
        figures[name] = {
            data: {figure: _over_runs([f["figures"][data][figure] for f in found]) for figure in of}
            for data, of in (found[0]["figures"] if found else {}).items()
        }
    # Of whole pretrainings: what one that failed last said is not its end.
    ends = [r["pretraining"] for r in runs if r.get("pretraining", {}).get("exit_code") == 0]
    healths = [e["health"] for e in ends]
    names = [
        n for n in (healths[0] if healths else {}) if all(h.get(n) is not None for h in healths)
    ]
    return {
        "num_runs": len(runs),
        "num_whole": sum(r["status"] == "whole" for r in runs),
        "figures": figures,
        "health": {n: _over_runs([h[n] for h in healths]) for n in names},
        "pretraining_s": _over_runs([e["pretraining_s"] for e in ends]) if ends else None,
    }


def summarise(
    cells: Sequence[Cell],
    *,
    rows: Sequence[str],
    untrained: Sequence[str],
    evaluations: Mapping[str, str],
    title: str,
    grid: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a grid, of what is there.

    Args:
        cells: The runs.
        rows: Names of the rows, in the table's order.
        untrained: Those without a pretraining.
        evaluations: Protocol by evaluation.
        title: Of the table.
        grid: The grid's settings.

    Raises:
        ConfigError: Runs were pretrained or evaluated on data that differ.
    """
    names = list(evaluations)
    runs = [_run_record(c, c.row in untrained, names) for c in cells]
    runs.sort(key=lambda r: rows.index(r["row"]))
    _refuse_mixtures(runs, names)
    found = [r["evaluations"][n] for r in runs for n in names]
    protocols: dict[str, dict[str, str]] = {n: {} for n in names}
    chances: dict[str, dict[int | None, Any]] = {}
    for run in runs:
        for name in names:
            one = run["evaluations"][name]
            if "figures" in one:
                protocols[name].setdefault(run["row"], one["protocol"])
                chances.setdefault(name, {}).setdefault(run["split"], one["chance"])
    return {
        "schema": 1,
        "strata": strata.__version__,
        "commit": commit(),
        "commits": sorted({f["commit"] for f in found if "commit" in f}),
        "title": title,
        "grid": dict(grid),
        "evaluations": {n: {"protocol": evaluations[n], "in_words": protocols[n]} for n in names},
        "rows": {row: _row_record([r for r in runs if r["row"] == row], names) for row in rows},
        "chance": {name: _mean_of(list(of.values())) for name, of in chances.items()},
        "total_s": round(sum(_seconds(r) for r in runs), 1),
        "runs": runs,
    }


def _mean_of(by_split: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Of each data set and figure."""
    return {
        data: {figure: statistics.fmean(one[data][figure] for one in by_split) for figure in of}
        for data, of in by_split[0].items()
    }


def _seconds(run: Mapping[str, Any]) -> float:
    """Of a run's pretraining, all starts together, and of its evaluations' last starts."""
    pretraining = run.get("pretraining", {}).get("pretraining_s", 0.0)
    return pretraining + sum(e.get("took_s", 0.0) for e in run["evaluations"].values())


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
    """What stands behind the ±: its key in the record, and its words."""
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
        runs = str(of) if record["num_whole"] == of else f"{record['num_whole']} of {of} whole"
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
    """What a row is, in words."""
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
    return [(r["name"], r["reason"]) for r in summary["runs"] if r["status"] != "whole"]


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
        lines += ["", "## Not whole", "", *(f"- {name}: {reason}" for name, reason in missing)]
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
