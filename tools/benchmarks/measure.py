"""Shared by the benchmarks: options, machine, timing, turns, tables and result files.

The bare loop's workers in the `preprocess` benchmark import this file and their start is measured,
so torch and the parser are imported only where they are used.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from strata.errors import ConfigError
from strata.files import write_atomic
from strata.limits import usable_cpus
from strata.preprocess.datasets.folder import VIDEO_SUFFIXES, Source, SourceSet

if TYPE_CHECKING:
    import torch

__all__ = [
    "append_record",
    "best_device",
    "find_videos",
    "in_turns",
    "machine",
    "machine_line",
    "parse_options",
    "rate",
    "require_known",
    "source_set_of",
    "spread",
    "status_bytes",
    "table",
    "wait_for",
    "write_record",
]

OptionsT = TypeVar("OptionsT")
ResultT = TypeVar("ResultT")


def parse_options(options: type[OptionsT], argv: Sequence[str], subject: str) -> OptionsT:
    """The options of `tools/bench.py SUBJECT`; a class's docstring is the help's first line.

    Raises:
        ConfigError: An option is unknown, does not fit its type or is out of its range.
    """
    from strata.config import parse_config

    first_line = (options.__doc__ or "").splitlines()[0]
    return parse_config(options, argv, prog=f"tools/bench.py {subject}", description=first_line)


def require_known(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Check names against those that exist.

    Raises:
        ConfigError: A name is unknown.
    """
    for name in asked:
        if name not in known:
            raise ConfigError(f"there is no {what} {name}; use {', '.join(known)}")


def best_device() -> "torch.device":
    """The first GPU where there is one, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait_for(device: "torch.device") -> None:
    """Wait until a GPU has done all that was asked of it."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def machine(device: "torch.device | None" = None) -> dict[str, Any]:
    """Facts that belong to a figure.

    Args:
        device: Where tensors are computed, for benchmarks that compute some.
    """
    facts: dict[str, Any] = {"device": "cpu"}
    if device is not None:
        import torch

        if device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name(device)
        facts["threads"] = torch.get_num_threads()
    return facts | {
        "cores": usable_cpus(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load": os.getloadavg()[0],
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The line that every benchmark prints: device, cores, versions and load at the start."""
    return (
        f"machine: {facts['device']}, {facts['cores']} cores, load {facts['load']:.1f}, torch "
        f"{facts['torch']}, Python {facts['python']}"
    )


def status_bytes(name: str) -> int:
    """Bytes of this process by a line of /proc/self/status: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def rate(
    run: Callable[[], object],
    seconds: float,
    *,
    items: int = 1,
    warmup: int = 0,
    wait: Callable[[], object] = lambda: None,
) -> float:
    """Rate in items per second.

    Args:
        run: Makes `items` of them.
        seconds: How long to measure; at least one call is measured.
        items: Per call.
        warmup: Calls before those that are measured.
        wait: Called before each reading of the clock.
    """
    for _ in range(warmup):
        run()
    wait()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        run()
        count += 1
    wait()
    return count * items / (time.perf_counter() - start)


def in_turns(
    contenders: Mapping[str, Callable[[], ResultT]], rounds: int
) -> list[dict[str, ResultT]]:
    """Measure every contender in each round, so that a busy machine affects all of them.

    Each round starts with another contender: otherwise one would always follow the same neighbour.

    Returns:
        Each round's results by name, in the order of `contenders`.
    """
    names = list(contenders)
    results = []
    for number in range(rounds):
        first = number % len(names)
        turn = {name: contenders[name]() for name in names[first:] + names[:first]}
        results.append({name: turn[name] for name in names})
    return results


def spread(values: Sequence[float]) -> str:
    """Median and range, as a cell of a table."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns are aligned, so that it can also be read in a terminal."""
    texts = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[k]) for row in texts)) for k in range(len(head))]
    texts.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in texts
    )


def write_record(path: Path | None, record: object) -> None:
    """Write a result as the JSON file that was asked for, if one was."""
    if path is not None:
        write_atomic(path, json.dumps(record, indent=1) + "\n")


def append_record(path: Path | None, record: object) -> None:
    """Print a result as one line of JSON and append it to the file that was asked for, if any."""
    line = json.dumps(record)
    print(line, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as out:
            out.write(line + "\n")


def find_videos(folder: Path, limit: int) -> list[Path]:
    """At most `limit` video files of a folder, evenly spaced in the order of their names.

    Raises:
        ConfigError: There are none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ConfigError(f"no videos in {folder}; correct --videos")
    return found[:: max(len(found) // limit, 1)][:limit]


def source_set_of(folder: Path, paths: Sequence[Path]) -> SourceSet:
    """Videos below a folder as what `shard_set` takes; labels are of no interest here."""
    sources = tuple(
        Source(name=p.relative_to(folder).as_posix(), path=p, label=0, num_bytes=p.stat().st_size)
        for p in paths
    )
    return SourceSet(dataset="bench", split="all", classes=("any",), sources=sources)
