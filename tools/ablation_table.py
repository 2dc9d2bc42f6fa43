"""The record of a grid's runs; docs/evaluation.md has the schema."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import strata
from strata.code_digest import commit
from strata.errors import ConfigError
from strata.eval.summary import set_sizes
from strata.files import write_atomic
from strata.logs import read_json_lines
from strata.untrusted import decode_json

__all__ = ["Cell", "read_json", "summarise", "write_json"]

_STATE = "cell.json"
_MAX_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid: a row with a seed. `cell.json` has the result of each step."""

    row: str
    seed: int
    split: int | None = None
    folder: Path
    """Its own: outcomes, output of its processes, reports."""
    source: Path
    """Folder of the cell whose checkpoint is evaluated: its own, unless it is untrained."""
    teacher: Path | None = None
    """Folder of the cell whose encoder teaches this one."""

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
        """Log of a step's processes."""
        return self.folder / f"{step}.log"

    def state(self) -> dict[str, Any]:
        """The latest result of each step, by its name."""
        return _state(self.folder)

    def remember(self, step: str, outcome: Mapping[str, Any]) -> None:
        """Store the result of a step."""
        write_json(self.folder / _STATE, self.state() | {step: outcome})

    def is_complete(self, step: str) -> bool:
        """Whether a step succeeded."""
        return self.state().get(step, {}).get("exit_code") == 0

    def is_pretrained(self) -> bool:
        """Whether the checkpoint to evaluate is that of a complete pretraining."""
        return _is_pretrained(self.source)

    def can_start(self) -> bool:
        """Whether the pretraining that teaches this one is complete, if it needs one."""
        return self.teacher is None or _is_pretrained(self.teacher)


def _is_pretrained(folder: Path) -> bool:
    return _state(folder).get("pretraining", {}).get("exit_code") == 0


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
    """Steps, seconds and last health of a pretraining, from its log.jsonl."""
    steps, seconds, health, start, last = 0, 0.0, {}, None, 0.0
    for record in read_json_lines(log)[0]:
        if record["kind"] == "start":
            # Only logged time counts; a killed run may have worked a little longer.
            seconds += 0.0 if start is None else last - start
            start = record["time_s"]
        elif record["kind"] == "step":
            steps = record["step"]
            health = record["health"] or health
        last = record["time_s"]
    seconds += 0.0 if start is None else last - start
    return {"steps": steps, "pretraining_s": round(seconds, 1), "health": health}


def _run_record(cell: Cell, untrained: bool, evaluations: Sequence[str]) -> dict[str, Any]:
    """The record of one run."""
    state = cell.state()
    record: dict[str, Any] = {
        "name": cell.name,
        "row": cell.row,
        "split": cell.split,
        "seed": cell.seed,
        "untrained": untrained,
        "run": str(cell.run),
        "status": "complete",
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
        if code != 0 and record["status"] == "complete":
            record["status"] = "not run" if code is None else "failed"
            if code is not None:
                record["reason"] = f"{step} failed with exit code {code}; see {cell.log(step)}"
            else:
                record["reason"] = f"{step} was not run to its end"
    return record


def _sizes(report: Mapping[str, Any]) -> str:
    return set_sizes([result["sets"] for result in report["results"]])


def _refuse_mixtures(runs: Sequence[Mapping[str, Any]], evaluations: Sequence[str]) -> None:
    """Check that compared runs were pretrained and measured on the same data.

    Raises:
        ConfigError: They were not.
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
                    f"evaluation {name} used other data for {measured[0]} than for {here}; the "
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
    # Of complete pretrainings: the last record of one that failed is not that of its end.
    ends = [r["pretraining"] for r in runs if r.get("pretraining", {}).get("exit_code") == 0]
    healths = [e["health"] for e in ends]
    names = [
        n for n in (healths[0] if healths else {}) if all(h.get(n) is not None for h in healths)
    ]
    return {
        "num_runs": len(runs),
        "num_complete": sum(r["status"] == "complete" for r in runs),
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
    """Make the record of a grid from the results of its runs.

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
