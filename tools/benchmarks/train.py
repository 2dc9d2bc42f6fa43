"""Where a training step's time goes: `python tools/bench.py train --help`.

The run is the real one: `Trainer.fit` with its loader, engine and metrics. The parts are told
apart by clocks put around their calls; a part inside another stops the outer one's clock, so the
parts add up to the step. On a GPU the clocks are events of the stream, on a CPU the host's.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strata import distributed
from strata.config import parse_config
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.distributed import World, current_world, join_world, leave_world
from strata.errors import ConfigError, StrataError
from strata.metrics import Metrics
from strata.train.budget import memory_estimate, step_cost
from strata.train.config import TrainConfig
from strata.train.engine import choose_device
from strata.train.loop import Trainer

__all__ = ["PARTS", "StepClock", "main"]

PARTS: tuple[str, ...] = (
    "data wait",
    "forward",
    "losses",
    "backward",
    "communication",
    "optimizer",
    "metrics",
    "rest",
)
"""In the order of the table; `rest` is what the loop does between them."""

_MATRIX = {"cpu": 2048, "cuda": 8192}
_COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "barrier", "reduce_scatter_tensor")


class StepClock:
    """Attributes time to the innermost part that is open.

    Args:
        device: Whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open = ["rest"]
        self._marks: list[tuple[str, Any]] = []
        self._starts: list[int] = []

    def start_step(self) -> None:
        """What follows belongs to the next step."""
        self._starts.append(len(self._marks))
        self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside is `name`'s."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        """From now on the time is that of the innermost open part."""
        now: Any = time.perf_counter()
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._open[-1], now))

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each part in each step that another one followed."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps = []
        for begin, end in zip(self._starts, self._starts[1:], strict=False):
            seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
            for (name, now), (_, then) in zip(
                self._marks[begin:end], self._marks[begin + 1 : end + 1], strict=True
            ):
                seconds[name] += now.elapsed_time(then) / 1e3 if self._on_gpu else then - now
            steps.append(seconds)
        return steps


@contextmanager
def _around(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put `make(original)` in an attribute's place for a while."""
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def _watched(trainer: Trainer, clock: StepClock) -> Iterator[None]:
    """Clocks around the parts of a trainer's steps."""

    def timed(part: str) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                with clock.part(part):
                    return original(*args, **kwargs)

            return call

        return make

    def batches(original: Any) -> Any:
        def iterate(loader: TrainLoader) -> Iterator[Any]:
            made = original(loader)
            while True:
                clock.start_step()
                with clock.part("data wait"):
                    batch = next(made, None)
                if batch is None:
                    return
                yield batch

        return iterate

    deepspeed = trainer.engine.engine
    parts: list[tuple[Any, str, str]] = [
        (deepspeed, "forward", "forward"),
        (deepspeed, "backward", "backward"),
        (deepspeed, "step", "optimizer"),
        (trainer.method, "losses", "losses"),
        (trainer.method, "averaged", "metrics"),
        *((trainer.metrics, name, "metrics") for name in ("set", "add", "observe", "record")),
        *((distributed.dist, name, "communication") for name in _COLLECTIVES),
    ]
    with ExitStack() as stack:
        stack.enter_context(_around(TrainLoader, "__iter__", batches))
        for owner, name, part in parts:
            stack.enter_context(_around(owner, name, timed(part)))
        yield


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Operations a second of a large matrix product, the best of the rounds."""
    size = _MATRIX[device.type]
    left = torch.randn(size, size, device=device, dtype=dtype)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.matmul(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The command line, but for what belongs to the run."""

    stages: tuple[int, ...]
    steps: int
    warmup: int
    seconds: float
    out: Path | None


def _resident(name: str) -> int:
    """Bytes of this process by a line of /proc/self/status: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _configure(words: Sequence[str], stage: int, settings: _Settings) -> TrainConfig:
    """The user's run, but for what a measurement needs otherwise."""
    fixed = {
        "run": "unset",
        "stop_after_steps": settings.warmup + settings.steps + 1,
        "schedule.second_stage_epoch": 0 if stage == 2 else 1_000_000,
        "schedule.epochs": 1_000_000,
        "checkpoint.every_steps": 1_000_000,
        "monitor.port": 0,
        "monitor.progress": "false",
    }
    overrides = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
    return parse_config(
        TrainConfig, [*words, *overrides], prog="tools/bench.py train", description=""
    )


def _measure(config: TrainConfig, stage: int, settings: _Settings, world: World) -> dict[str, Any]:
    """One stage's steps, as a record.

    Raises:
        StrataError: A signal stopped the run before all steps were taken.
    """
    config.check_world(world)
    run, device = config.run, choose_device(config.engine, world)
    run.mkdir(parents=True, exist_ok=True)
    reader = ShardReader(config.data.shards, config.data.check)
    metrics = Metrics(run / "log.jsonl" if world.is_first else None)
    trainer = Trainer(config, world=world, device=device, reader=reader, metrics=metrics)
    clock = StepClock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew.
    before = _resident("VmRSS")
    with _watched(trainer, clock):
        finished = trainer.fit()
    if not finished and trainer.state.step < settings.warmup + settings.steps + 1:
        metrics.close()
        raise StrataError(
            f"tools/bench.py train: a signal stopped stage {stage} at step {trainer.state.step} of "
            f"{settings.warmup + settings.steps + 1}; nothing was measured, start it again"
        )
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
    steps = clock.steps()[settings.warmup :]
    metrics.close()

    derived = json.loads((run / "deepspeed.json").read_text(encoding="utf-8"))
    autocast = derived.get("torch_autocast", {}).get("dtype")
    videos = config.data.batch_size // world.size
    cost = step_cost(config, videos=videos, stage=stage)
    estimate = memory_estimate(
        config, cost, videos=videos, ranks=world.size, stage=stage, autocast=autocast is not None
    )
    dtype = torch.float32 if autocast is None else getattr(torch, autocast)
    step_s = statistics.mean(sum(parts.values()) for parts in steps)
    peak_rate = measured_peak(device, dtype, settings.seconds)
    return {
        "stage": stage,
        "model": config.model.name,
        "width": config.model.width,
        "size": config.data.size,
        "batch": config.data.batch_size,
        "ranks": world.size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "autocast": autocast,
        "load": os.getloadavg()[0],
        "steps": len(steps),
        "step_s": step_s,
        "step_s_spread": [min(map(_total, steps)), max(map(_total, steps))],
        "parts_s": {n: statistics.mean(parts[n] for parts in steps) for n in PARTS},
        "samples_per_s": config.data.batch_size / step_s,
        "flops_per_rank": cost.flops,
        "flops_per_s": cost.flops / step_s,
        "matrix_flops_per_s": peak_rate,
        "mfu": cost.flops / step_s / peak_rate,
        "memory_bytes": peak - (0 if device.type == "cuda" else before),
        "memory_estimate_bytes": estimate.total
        - (0 if device.type == "cuda" else estimate.weights + estimate.batches),
    }


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table, one column each."""
    rows: list[list[str]] = [["", *(f"stage {r['stage']}" for r in records)]]
    rows.append(["---"] * len(rows[0]))
    for part in PARTS:
        cells = [
            f"{r['parts_s'][part] * 1e3:.1f} ({r['parts_s'][part] / r['step_s']:.1%})"
            for r in records
        ]
        rows.append([f"{part}, ms", *cells])
    rows.append(["**step, ms**", *(f"**{r['step_s'] * 1e3:.1f}**" for r in records)])
    rows.append(["samples/s", *(f"{r['samples_per_s']:.1f}" for r in records)])
    rows.append(["GFLOP/s a rank", *(f"{r['flops_per_s'] / 1e9:.1f}" for r in records)])
    rows.append(
        [
            "of the matrix product's",
            *(f"{r['mfu']:.1%} of {r['matrix_flops_per_s'] / 1e9:.0f}" for r in records),
        ]
    )
    rows.append(["memory, MiB", *(f"{r['memory_bytes'] / 2**20:.0f}" for r in records)])
    rows.append(
        ["memory estimated, MiB", *(f"{r['memory_estimate_bytes'] / 2**20:.0f}" for r in records)]
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _start_ranks(count: int, argv: Sequence[str]) -> None:
    """Run this command once on each of several ranks of this machine.

    Raises:
        ConfigError: A rank failed; it has said why.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(Path(__file__).with_name("bench.py"))
    command = [*launcher, "--nproc_per_node", str(count), "--", script, "train", *argv]
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=env, check=False)
    if done.returncode:
        raise ConfigError(f"a rank ended with exit code {done.returncode}; see above")


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: A setting is wrong.
        StrataError: A signal stopped it.
    """
    parser = argparse.ArgumentParser(
        prog="tools/bench.py train",
        description="Where a step's time goes. Other options are those of train/main.py, such as "
        "--config and --data.shards.",
        allow_abbrev=False,
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--steps", type=int, default=20, help="steps that count, of each stage")
    parser.add_argument("--warmup", type=int, default=5, help="steps before that do not")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the matrix product")
    parser.add_argument("--ranks", type=int, default=0, help="start so many ranks here")
    parser.add_argument("--out", type=Path, default=None, help="JSON lines to append to")
    args, words = parser.parse_known_args([a for a in argv if not a.startswith("--local_rank")])
    if args.steps < 1 or args.warmup < 1:
        raise ConfigError("tools/bench.py train: --steps and --warmup must be 1 or more")
    if args.ranks and "RANK" not in os.environ:
        _start_ranks(args.ranks, argv)
        return
    settings = _Settings(
        stages=tuple(args.stages),
        steps=args.steps,
        warmup=args.warmup,
        seconds=args.seconds,
        out=args.out,
    )
    configs = {stage: _configure(words, stage, settings) for stage in settings.stages}
    device = choose_device(configs[settings.stages[0]].engine, current_world())
    world = join_world(device)
    try:
        records = []
        with tempfile.TemporaryDirectory() as folder:
            shared = Path(distributed.broadcast_object(folder))
            for stage, config in configs.items():
                here = dataclasses.replace(config, run=shared / f"stage-{stage}")
                records.append(_measure(here, stage, settings, world))
            distributed.barrier()
        if world.is_first:
            print(table(records))
            for record in records:
                line = json.dumps(record)
                print(line, flush=True)
                if settings.out is not None:
                    with settings.out.open("a", encoding="utf-8") as out:
                        out.write(line + "\n")
    finally:
        leave_world()
