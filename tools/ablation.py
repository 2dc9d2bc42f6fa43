"""A grid of pretraining settings and seeds: each run pretrained and evaluated, then one table."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from strata import commands
from strata.config import parse_config, plain
from strata.errors import EXIT_PREEMPTED, ConfigError, StoppedError
from strata.eval.evaluations.runners import RUNNERS
from strata.files import FolderLock
from strata.tools.ablation_grid import AblateConfig, evaluating, pretraining, resolved
from strata.tools.ablation_page import write_tables
from strata.tools.ablation_plan import gpu_hours
from strata.tools.ablation_table import Cell, read_json, summarise, write_json
from strata.tools.launchers import QUIET, program
from strata.train.config import TrainConfig

__all__ = ["following", "gpu_shares", "main"]

_POLL_S = 0.2
_CHOOSE_GPUS = frozenset("--num_gpus --num_nodes --include -i --exclude -e --hostfile -H".split())
"""Options of DeepSpeed's launcher, which then does not look at CUDA_VISIBLE_DEVICES."""
_PORTS = 16
"""Between the ports of runs side by side; each local rank of a run has one."""
_print = partial(print, flush=True)


def _store_settings(config: AblateConfig) -> None:
    """Store the settings of the grid; refuse a folder that was made with other settings.

    Raises:
        ConfigError: A row or an evaluation of the folder has other settings now.
    """
    path = config.out / "grid.json"
    # Through JSON, so that tuples compare equal to lists.
    now = json.loads(json.dumps(resolved(config)))
    if path.exists():
        before = read_json(path)
        for kind in ("rows", "evaluations"):
            for name in before[kind].keys() & now[kind].keys():
                old, new = before[kind][name], now[kind][name]
                # A setting that only one of them has was added to the code or removed since.
                for key in sorted(old.keys() & new.keys()):
                    if old[key] != new[key]:
                        raise ConfigError(
                            f"{config.out} was made with {kind[:-1]} {name} having {key} "
                            f"{old[key]!r}, now it is {new[key]!r}; set it as it was, or give the "
                            f"{kind[:-1]} another name, or choose another --out"
                        )
            now[kind] = before[kind] | now[kind]
    write_json(path, now)


class _Signals:
    """Records SIGTERM and SIGINT while it is entered.

    The handler does not raise: an error while a process is being started would lose that process.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "_Signals":
        self._before = {n: signal.signal(n, self._note) for n in self._NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def check(self) -> None:
        """Stop if a signal was received.

        Raises:
            StoppedError: One was.
        """
        if self.received is not None:
            raise StoppedError(f"stopped by {self.received.name}; the same command resumes it")


def gpu_shares(runs: int, launcher: Sequence[str]) -> list[dict[str, str]]:
    """Divide the visible GPUs among runs side by side.

    Args:
        runs: How many. A single run has all GPUs; several runs may share one.
        launcher: Words that start a process.

    Returns:
        Environment variables for each run.

    Raises:
        ConfigError: The GPUs do not divide, or the launcher would choose others.
    """
    count = torch.cuda.device_count()
    if runs == 1 or not count:
        return [{} for _ in range(runs)]
    chosen = _CHOOSE_GPUS.intersection(word.split("=")[0] for word in launcher)
    if chosen:
        raise ConfigError(
            f"side_by_side is {runs}, but the launcher's {', '.join(sorted(chosen))} would choose "
            "GPUs; leave it out, each run gets its share"
        )
    if count % runs and runs % count:
        raise ConfigError(
            f"side_by_side is {runs}, but {count} GPUs are visible; use a divisor or a multiple of "
            f"{count}"
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",")[:count] if given else [str(k) for k in range(count)]
    firsts = [slot * count // runs for slot in range(runs)]
    share = max(count // runs, 1)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[k : k + share])} for k in firsts]


class _Runner:
    """Runs the steps that are not complete, and stores their results.

    Raises:
        ConfigError: Runs side by side, but not with these GPUs or this launcher.
    """

    def __init__(self, config: AblateConfig, signals: _Signals) -> None:
        self._config, self._signals = config, signals
        self._launcher = shlex.split(config.launcher)
        self._cells = config.cells()
        self._shares = gpu_shares(config.side_by_side, self._launcher)
        self._stopped = False

    def run(self) -> None:
        """Run all, in order; `side_by_side` of them at once."""
        waiting = list(enumerate(self._cells, start=1))
        slots = list(range(len(self._shares)))
        running: dict[Future[bool], tuple[int, Cell]] = {}
        with ThreadPoolExecutor(len(slots)) as pool:
            try:
                while waiting or running:
                    while slots and (chosen := following(waiting, running.values())):
                        waiting.remove(chosen)
                        slot, (number, cell) = slots.pop(0), chosen
                        running[pool.submit(self._run, number, cell, slot)] = (slot, cell)
                    done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        slots.append(running.pop(future)[0])
                        complete = future.result()
                        self.write()
                        if not complete and self._config.on_failure == "stop":
                            waiting.clear()
            except BaseException:
                # The pool waits for its threads: they stop theirs.
                self._stopped = True
                raise

    def commands(self, cell: Cell) -> dict[str, list[str]]:
        """The script and arguments of each step of a run, by the step's name."""
        config = self._config
        steps = {}
        if not config.rows[cell.row].untrained:
            steps["pretraining"] = [_script("pretrain"), *pretraining(config, cell)]
        for name in config.evaluations:
            steps[name] = [_script("evaluate"), *evaluating(config, cell, name)]
        return steps

    def shown(self, words: Sequence[str]) -> str:
        """A command as a person types it."""
        return shlex.join([*self._launcher, *words])

    def plan(self) -> None:
        """Print all commands."""
        for cell in self._cells:
            for words in self.commands(cell).values():
                _print(self.shown(words))
        if self._config.rates.stage_1:
            _print(gpu_hours(self._config))

    def _run(self, number: int, cell: Cell, slot: int) -> bool:
        """Run the missing steps of a cell; returns whether all are complete."""
        complete = True
        place = f"[{number}/{len(self._cells)}] {cell.name}"
        for step, words in self.commands(cell).items():
            if cell.is_complete(step):
                continue
            if step == "pretraining" and not cell.can_start():
                _print(f"{place}: {step}: left out, the pretraining of its teacher is not complete")
                complete = False
            elif step != "pretraining" and not cell.is_pretrained():
                _print(f"{place}: {step}: left out, its pretraining is not complete")
                complete = False
            elif not self._step(place, cell, step, [*words, *self._port(step, words, slot)], slot):
                complete = False
                if self._config.on_failure == "stop":
                    break
        return complete

    def _port(self, step: str, words: Sequence[str], slot: int) -> list[str]:
        """A port for metrics that no run beside this one uses."""
        if not slot:
            return []
        if step == "pretraining":
            built = parse_config(TrainConfig, words[1:], prog=words[0], description="")
        else:
            settings, _ = RUNNERS[words[1]]
            built = parse_config(settings, words[2:], prog=words[0], description="")
        port = built.monitor.port
        return ["--monitor.port", str(port + _PORTS * slot)] if port else []

    def _step(self, place: str, cell: Cell, step: str, words: Sequence[str], slot: int) -> bool:
        """Run one process to its end; returns whether it succeeded."""
        log, shown = cell.log(step), self.shown(words)
        _print(f"{place}: {step} (output: {log})\n   $ {shown}")
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.time()
        with log.open("ab") as output:
            self._wait_for_former(output, log)
            output.write(f"$ {shown}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [*program(self._launcher), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | QUIET | self._shares[slot],
                start_new_session=True,
            )
            code = self._wait(process)
        took = time.time() - start
        cell.remember(step, {"exit_code": code, "command": shown, "took_s": round(took, 1)})
        if code == EXIT_PREEMPTED:
            raise StoppedError(
                f"{cell.name}: {step} was stopped by a signal and has saved; the same command "
                "resumes it"
            )
        ended = "done" if code == 0 else f"failed with exit code {code}"
        _print(f"{place}: {step} {ended} after {took:.0f} s")
        if code:
            _print(f"   {_last_line(log)}")
        return code == 0

    def _check_stopped(self) -> None:
        """Stop if a signal was received, or if another run has stopped the grid.

        Raises:
            StoppedError: One of both.
        """
        self._signals.check()
        if self._stopped:
            raise StoppedError("stopped with the grid; the same command resumes it")

    def _wait_for_former(self, log: IO[bytes], path: Path) -> None:
        """Wait for a process that a killed grid left running: it holds the lock of its output."""
        logged = False
        while True:
            self._check_stopped()
            try:
                return fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not logged:
                    _print(f"   a process of a former start still works ({path}); waiting for it")
                logged = True
                time.sleep(_POLL_S)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the exit code of a process; a signal to the grid ends it early."""
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if self._signals.received is None and not self._stopped:
                    continue
            _print("   stopping; a training saves first")
            # The group: a launcher alone would leave its ranks behind.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            self._check_stopped()

    def write(self) -> dict[str, Any]:
        """Write the tables of all results so far."""
        summary = summarise(
            self._cells,
            rows=list(self._config.rows),
            untrained=[name for name, row in self._config.rows.items() if row.untrained],
            evaluations={n: e.protocol for n, e in self._config.evaluations.items()},
            title=self._config.title,
            grid=plain(self._config),
        )
        self.table = write_tables(self._config.out, summary)
        return summary


def following(
    waiting: Sequence[tuple[int, Cell]], running: Iterable[tuple[int, Cell]]
) -> tuple[int, Cell] | None:
    """The first run that can start: one that uses another's checkpoint waits for it."""
    busy = {cell.source for _, cell in running}
    return next(
        (each for each in waiting if not busy & {each[1].source, each[1].teacher}),
        None,
    )


def _script(command: str) -> str:
    """The path of a script, relative to the current folder."""
    return os.path.relpath(commands.script(command))


def _last_line(log: Path) -> str:
    """The error line of the last command in a log, or else its last line."""
    output = log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines()[1:]
    lines = [line for line in output if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["no output"])[-1].strip()[:500]


def main(argv: Sequence[str]) -> int:
    """Run a grid; returns the exit status: 1 where a run failed."""
    config = parse_config(
        AblateConfig, argv, prog="tools/ablate.py", description="A grid of settings and seeds."
    )
    with _Signals() as signals:
        runner = _Runner(config, signals)
        if config.plan_only:
            resolved(config)
            runner.plan()
            return 0
        config.out.mkdir(parents=True, exist_ok=True)
        advice = "wait for it, or choose another --out"
        with FolderLock(config.out, "running a grid", ConfigError, advice):
            _store_settings(config)
            runner.run()
            summary = runner.write()
    _print(f"\n{runner.table}\nwritten to {config.out}/ablation.md and ablation.json")
    missing = [r for r in summary["runs"] if r["status"] != "complete"]
    for run in missing:
        print(f"{run['name']}: {run['reason']}", file=sys.stderr, flush=True)
    return 1 if missing else 0
