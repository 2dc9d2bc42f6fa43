"""A grid of pretraining settings and seeds: each run pretrained and evaluated, then one table."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

import torch

from strata.config import dotted, parse_config, plain
from strata.errors import EXIT_PREEMPTED, ConfigError, StrataError
from strata.eval.protocols import RUNNERS
from strata.tools.ablation_table import Cell, read_json, summarise, write_json, write_tables
from strata.tools.launchers import QUIET, program
from strata.train.config import TrainConfig

__all__ = ["AblateConfig", "EvaluationConfig", "RowConfig", "gpu_shares", "main"]

_ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.2
_CHOOSE_GPUS = frozenset("--num_gpus --num_nodes --include -i --exclude -e --hostfile -H".split())
"""Options of DeepSpeed's launcher, which then does not look at CUDA_VISIBLE_DEVICES."""
_PORTS = 16
"""Between the ports of runs side by side; each local rank of a run has one."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_OURS = ("run", "seed", "resume", "plan_only")
"""Settings of a pretraining that the grid decides."""
_OURS_TOO = ("checkpoint", "out", "weights", "seed", "train", "test", "gallery", "query")
"""Settings of an evaluation that the grid decides."""
_FREE = ("run", "seed", "resume", "data.shards", "checkpoint", "out", "monitor.", "checkpoint.")
"""Settings that do not change what a figure means: they may differ when a grid goes on."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """One row of the table: a pretraining that each seed repeats."""

    pretrain: Path | None = None
    """Configuration of the pretraining instead of the grid's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of train/main.py by their dotted names."""
    untrained: str = ""
    """Instead of a pretraining: another row, whose network is evaluated with weights drawn anew
    from the seed. The baseline."""

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
            ConfigError: A row is both trained and untrained, or sets what the grid decides.
        """
        if self.untrained and (self.set or self.pretrain is not None):
            raise ConfigError("a row with untrained has no set and no pretrain of its own")
        _refuse(self.set, _OURS, "a row")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One evaluation of every run."""

    protocol: Literal["retrieval", "linear", "finetune"]
    """First word of eval/main.py."""
    train: Path | None = None
    """Shards of the training set (retrieval's gallery); by default the pretraining's."""
    test: Path | None = None
    """Shards of the test set (retrieval's queries); by default the grid's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of eval/main.py by their dotted names. With `data`, train and test are left out."""

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
            ConfigError: It sets what the grid decides, or names sets twice.
        """
        _refuse(self.set, _OURS_TOO, "an evaluation")
        if "data" in self.set and (self.train or self.test):
            raise ConfigError("an evaluation has data in its set; leave out train and test")


def _refuse(settings: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if name in settings:
            raise ConfigError(f"{where} sets {name}, which the grid decides; leave it out")


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """A grid."""

    rows: dict[str, RowConfig]
    """The table's rows by name."""
    evaluations: dict[str, EvaluationConfig]
    """The table's columns by name."""
    pretrain: Path
    """Configuration of the pretrainings, for train/main.py."""
    shards: str | Path
    """What is pretrained on: a folder of shards, or its URL."""
    out: Path
    """Folder for everything; the same command goes on in it."""
    test: Path | None = None
    """Test set of the evaluations that name none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a run of every row; it decides weights, order and augmentation of the pretraining."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of train/main.py for all rows; a row's own come after them."""
    launcher: str = "deepspeed"
    """Starts each process: for instance `deepspeed --num_gpus 4`, `deepspeed --hostfile hosts
    --master_addr NODE`, `torchrun --standalone --nproc_per_node 4 --`, `srun python`, `python`."""
    side_by_side: int = 1
    """Runs at once, each with its share of the GPUs that are visible here: many small runs on one
    node, or on one GPU. The launcher must not choose GPUs then."""
    on_failure: Literal["go on", "stop"] = "go on"
    """What follows a run that failed. It is named in the table either way, and tried again when
    the same command is given again."""
    plan_only: bool = False
    """Print the commands and end."""
    title: str = "Ablation"
    """Of the table."""

    def __post_init__(self) -> None:
        """Check the ranges and the names.

        Raises:
            ConfigError: Something is empty, badly named, or names a row that is not there.
        """
        for what in ("rows", "evaluations", "seeds"):
            if not getattr(self, what):
                raise ConfigError(f"{what} is empty; a grid needs one or more")
        for name in (*self.rows, *self.evaluations):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"the name {name!r} becomes that of a folder; use letters, digits and _.+- only"
                )
        for name, row in self.rows.items():
            other = self.rows.get(row.untrained)
            if row.untrained and (other is None or other.untrained):
                raise ConfigError(
                    f"row {name}: untrained is {row.untrained!r}; name a row that is pretrained"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds {list(self.seeds)} repeat; each counts once")
        if not shlex.split(self.launcher):
            raise ConfigError("launcher is empty; use for instance deepspeed")
        if self.side_by_side < 1:
            raise ConfigError(f"side_by_side is {self.side_by_side}; use 1 or more")
        _refuse(self.set, _OURS, "set")

    def cells(self) -> list[Cell]:
        """All runs, seed by seed: a first table is there after the first seed."""
        rows = self.out / "rows"
        # What is untrained needs another row's checkpoint for its configuration.
        ordered = sorted(self.rows, key=lambda name: bool(self.rows[name].untrained))
        return [
            Cell(
                row=name,
                seed=seed,
                folder=rows / name / f"seed-{seed}",
                source=rows / (self.rows[name].untrained or name) / f"seed-{seed}",
            )
            for seed in self.seeds
            for name in ordered
        ]


def _words(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(plain(value))]
    return words


def pretraining(config: AblateConfig, cell: Cell) -> list[str]:
    """Arguments of train/main.py for a run."""
    row = config.rows[cell.row]
    return [
        *("--config", str(row.pretrain or config.pretrain)),
        *("--data.shards", str(config.shards)),
        *_words({**config.set, **row.set}),
        *("--seed", str(cell.seed), "--run", str(cell.run), "--resume", "auto"),
    ]


def evaluating(config: AblateConfig, cell: Cell, name: str) -> list[str]:
    """Arguments of eval/main.py for an evaluation of a run."""
    evaluation = config.evaluations[name]
    words = [evaluation.protocol, "--checkpoint", str(cell.run)]
    if "data" not in evaluation.set:
        train, test = evaluation.train or config.shards, evaluation.test or config.test
        if test is None:
            raise ConfigError(f"evaluation {name} has no test set; give test to it or to the grid")
        if "://" in str(train):
            raise ConfigError(
                f"evaluation {name}: {train} is not a folder; give it a train of its own"
            )
        ours = ("gallery", "query") if evaluation.protocol == "retrieval" else ("train", "test")
        words += [f"--{ours[0]}", str(train), f"--{ours[1]}", str(test)]
    # The grid has a row for untrained networks, or does not want any.
    words += ["--untrained_seeds", "[]", *_words(evaluation.set)]
    if config.rows[cell.row].untrained:
        words += ["--weights", "untrained", "--seed", str(cell.seed)]
    return [*words, "--out", str(cell.report(name))]


def _resolved(config: AblateConfig) -> dict[str, Any]:
    """What each row and evaluation is, with all defaults.

    Raises:
        ConfigError: A setting is unknown or out of its range.
    """
    rows, evaluations = {}, {}
    cells = [c for c in config.cells() if c.seed == config.seeds[0]]
    for cell in cells:
        row = config.rows[cell.row]
        rows[cell.row] = {"untrained": row.untrained}
        if not row.untrained:
            prog = f"row {cell.row}: train/main.py"
            built = parse_config(TrainConfig, pretraining(config, cell), prog=prog, description="")
            rows[cell.row] |= _leaves(built)
    for name, evaluation in config.evaluations.items():
        prog = f"evaluation {name}: eval/main.py {evaluation.protocol}"
        settings, _ = RUNNERS[evaluation.protocol]
        trained = next(c for c in cells if not config.rows[c.row].untrained)
        words = evaluating(config, trained, name)[1:]
        built = parse_config(settings, words, prog=prog, description="")
        evaluations[name] = {"protocol": evaluation.protocol} | _leaves(built)
    return {"schema": 1, "rows": rows, "evaluations": evaluations}


def _leaves(built: Any) -> dict[str, Any]:
    found = dotted(plain(built))
    return {k: v for k, v in found.items() if not k.startswith(_FREE)}


def _keep(config: AblateConfig) -> None:
    """Refuse a folder whose rows or evaluations were others; add what is new.

    Raises:
        ConfigError: A row or an evaluation of the folder is set otherwise now.
    """
    path = config.out / "grid.json"
    # As JSON has it, so that tuples compare with lists.
    now = json.loads(json.dumps(_resolved(config)))
    if path.exists():
        before = read_json(path)
        for kind in ("rows", "evaluations"):
            for name in before[kind].keys() & now[kind].keys():
                old, new = before[kind][name], now[kind][name]
                # What only one of them has is a setting that the code got or lost since.
                for key in sorted(old.keys() & new.keys()):
                    if old[key] != new[key]:
                        raise ConfigError(
                            f"{config.out} was made with {kind[:-1]} {name} having {key} "
                            f"{old[key]!r}, now it is {new[key]!r}; set it as it was, or give the "
                            f"{kind[:-1]} another name, or choose another --out"
                        )
            now[kind] = before[kind] | now[kind]
    write_json(path, now)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder.

    Raises:
        ConfigError: Another grid runs in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another grid runs in {out}; wait for it, or choose another --out"
            ) from None
        yield


class _StoppedError(StrataError):
    """A signal asked to stop."""

    exit_code = EXIT_PREEMPTED


class _Signals:
    """While entered, notes SIGTERM and SIGINT.

    Noted and not raised: raised while a process starts, nobody would know of the process.
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

    def obey(self) -> None:
        """Stop where a signal asked to.

        Raises:
            _StoppedError: One did.
        """
        if self.received is not None:
            raise _StoppedError(
                f"stopped by {self.received.name}; the same command goes on where it was"
            )


def _say(text: str) -> None:
    print(text, flush=True)


def gpu_shares(runs: int, launcher: Sequence[str]) -> list[dict[str, str]]:
    """What each of several runs at once has in its environment: its share of the GPUs.

    Args:
        runs: How many. One has all GPUs; more than there are GPUs share them.
        launcher: Words that start a process.

    Returns:
        Variables for each run.

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
    """Runs what is not whole yet, and remembers what became of it.

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
        """Run all, in order; as many at once as the grid says."""
        waiting = list(enumerate(self._cells, start=1))
        slots = list(range(len(self._shares)))
        running: dict[Future[bool], tuple[int, Cell]] = {}
        with ThreadPoolExecutor(len(slots)) as pool:
            try:
                while waiting or running:
                    while slots and (following := _next(waiting, running.values())):
                        waiting.remove(following)
                        slot, (number, cell) = slots.pop(0), following
                        running[pool.submit(self._run, number, cell, slot)] = (slot, cell)
                    done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        slots.append(running.pop(future)[0])
                        whole = future.result()
                        self.write()
                        if not whole and self._config.on_failure == "stop":
                            waiting.clear()
            except BaseException:
                # The pool waits for its threads: they stop theirs.
                self._stopped = True
                raise

    def commands(self, cell: Cell) -> dict[str, list[str]]:
        """What a run consists of, by the step's name: script and arguments."""
        config = self._config
        steps = {}
        if not config.rows[cell.row].untrained:
            steps["pretraining"] = [_script("train/main.py"), *pretraining(config, cell)]
        for name in config.evaluations:
            steps[name] = [_script("eval/main.py"), *evaluating(config, cell, name)]
        return steps

    def shown(self, words: Sequence[str]) -> str:
        """A command as a person types it."""
        return shlex.join([*self._launcher, *words])

    def plan(self) -> None:
        """Print all commands."""
        for cell in self._cells:
            for words in self.commands(cell).values():
                _say(self.shown(words))

    def _run(self, number: int, cell: Cell, slot: int) -> bool:
        """Run what a cell lacks; whether it is whole then."""
        whole = True
        place = f"[{number}/{len(self._cells)}] {cell.row}, seed {cell.seed}"
        for step, words in self.commands(cell).items():
            if cell.is_whole(step):
                continue
            if step != "pretraining" and not cell.is_pretrained():
                _say(f"{place}: {step}: left out, its pretraining is not whole")
                whole = False
            elif not self._step(place, cell, step, [*words, *self._port(step, words, slot)], slot):
                whole = False
                if self._config.on_failure == "stop":
                    break
        return whole

    def _port(self, step: str, words: Sequence[str], slot: int) -> list[str]:
        """Another port for metrics than that of the runs beside this one."""
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
        """Run one process to its end; whether it succeeded."""
        log, shown = cell.log(step), self.shown(words)
        _say(f"{place}: {step} (output: {log})\n   $ {shown}")
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
            raise _StoppedError(
                f"{cell.row}, seed {cell.seed}: {step} was stopped by a signal and has saved; the "
                "same command goes on"
            )
        ended = "done" if code == 0 else f"failed with exit code {code}"
        _say(f"{place}: {step} {ended} after {took:.0f} s")
        if code:
            _say(f"   {_last_line(log)}")
        return code == 0

    def _obey(self) -> None:
        """Stop where a signal asked to, or where another run has stopped the grid.

        Raises:
            _StoppedError: One did.
        """
        self._signals.obey()
        if self._stopped:
            raise _StoppedError("stopped with the grid; the same command goes on where it was")

    def _wait_for_former(self, log: IO[bytes], path: Path) -> None:
        """Wait for what a killed grid left behind: it goes on, and holds the lock of its output."""
        said = False
        while True:
            self._obey()
            try:
                return fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    _say(f"   a process of a former start still works ({path}); waiting for it")
                said = True
                time.sleep(_POLL_S)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code of a process; a signal to the grid ends it first."""
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if self._signals.received is None and not self._stopped:
                    continue
            _say("   stopping; a training saves first")
            # The group: a launcher alone would leave its ranks behind.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            self._obey()

    def write(self) -> dict[str, Any]:
        """Write the tables of what is there."""
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


def _next(
    waiting: Sequence[tuple[int, Cell]], running: Iterable[tuple[int, Cell]]
) -> tuple[int, Cell] | None:
    """The first that can start: what is untrained needs a checkpoint that may be in the making."""
    busy = {cell.source for _, cell in running}
    return next((each for each in waiting if each[1].source not in busy), None)


def _script(path: str) -> str:
    """A script of ours from the folder where the command was given."""
    return os.path.relpath(_ROOT / path)


def _last_line(log: Path) -> str:
    """The error line of the last command in a log, or else its last line."""
    said = log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines()[1:]
    lines = [line for line in said if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["it said nothing"])[-1].strip()[:500]


def main(argv: Sequence[str]) -> int:
    """Run a grid; returns the exit status: 1 where a run failed."""
    config = parse_config(
        AblateConfig, argv, prog="tools/ablate.py", description="A grid of settings and seeds."
    )
    with _Signals() as signals:
        runner = _Runner(config, signals)
        if config.plan_only:
            _resolved(config)
            runner.plan()
            return 0
        with _alone(config.out):
            _keep(config)
            runner.run()
            summary = runner.write()
    _say(f"\n{runner.table}\nwritten to {config.out}/ablation.md and ablation.json")
    missing = [r for r in summary["runs"] if r["status"] != "whole"]
    for run in missing:
        print(f"{run['row']}, seed {run['seed']}: {run['reason']}", file=sys.stderr, flush=True)
    return 1 if missing else 0
