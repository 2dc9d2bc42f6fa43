"""Where a training step's time goes: `python tools/bench.py train --help`.

The run is the real one: `Trainer.fit` with its loader, engine and metrics. Clocks around the calls
of the parts measure them; a part inside another one stops the outer one's clock, so the parts add
up to the step. On a GPU the clocks are events of the stream, on a CPU the host's.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from strata import distributed, launch
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.distributed import World, current_world, join_world, leave_world
from strata.errors import ConfigError, StrataError
from strata.ranges import check_range
from strata.telemetry.metrics import Metrics
from strata.tools.benchmarks.measure import (
    append_record,
    machine,
    machine_line,
    parse_options,
    status_bytes,
    table,
    wait_for,
)
from strata.train.config import TrainConfig
from strata.train.engine_config import choose_device
from strata.train.loop import Trainer
from strata.train.monitor.cost_model import memory_estimate, step_cost
from strata.train.pretraining import Pretraining, open_pretraining

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
"""In the order of the table; `rest` is the work of the loop between them."""

_NEVER = 1_000_000
"""Steps or epochs that no measurement reaches."""
_MATRIX = {"cpu": 2048, "cuda": 8192}
_COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "barrier", "reduce_scatter_tensor")


class StepClock:
    """Attributes time to the innermost part that is open.

    Args:
        device: The device whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open = ["rest"]
        self._marks: list[tuple[str, Any]] = []
        self._starts: list[int] = []

    def start_step(self) -> None:
        """Begin the next step."""
        self._starts.append(len(self._marks))
        self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute the time inside to `name`."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        """Note that from now on the time belongs to the innermost open part."""
        now: Any = time.perf_counter()
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._open[-1], now))

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each part in each step that was followed by another one."""
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
def _clocked(trainer: Trainer[Pretraining], metrics: Metrics, clock: StepClock) -> Iterator[None]:
    """Clocks around the parts of a trainer's steps."""

    def timed(part: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.part(part):
                return original(*args, **kwargs)

        return call

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

    deepspeed = trainer.task.engine.engine
    parts: list[tuple[Any, str, str]] = [
        (deepspeed, "forward", "forward"),
        (deepspeed, "backward", "backward"),
        (deepspeed, "step", "optimizer"),
        (trainer.task.method, "losses", "losses"),
        (trainer.task.method, "averaged", "metrics"),
        *((metrics, name, "metrics") for name in ("set", "add", "observe", "record")),
        *((distributed.dist, name, "communication") for name in _COLLECTIVES),
    ]
    with ExitStack() as stack:
        stack.enter_context(patch.object(TrainLoader, "__iter__", batches(TrainLoader.__iter__)))
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Operations a second of a large matrix product, the best of the rounds."""
    size = _MATRIX[device.type]
    left = torch.randn(size, size, device=device, dtype=dtype)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.matmul(left, left)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True, kw_only=True)
class StepOptions(TrainConfig):
    """Where a training step's time goes; takes the settings of train/main.py as well."""

    run: Path = Path("unset")
    """Not used: the run is in a temporary folder."""
    stages: tuple[Literal[1, 2], ...] = (1, 2)
    """Stages of the recipe to measure."""
    steps: int = 20
    """Steps that are measured, of each stage."""
    warmup: int = 5
    """Steps before them."""
    seconds: float = 3.0
    """Duration of the matrix product that gives the peak rate."""
    ranks: int = 0
    """Start so many ranks on this machine; 0 measures in the ranks of the launcher, or alone."""
    out: Path | None = None
    """JSON lines to append to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "steps", "warmup", at_least=1)

    @property
    def all_steps(self) -> int:
        """Steps of a run; the last one only ends the one before it."""
        return self.warmup + self.steps + 1


def _stage_run(options: StepOptions, stage: int, run: Path) -> TrainConfig:
    """The user's run with what the measurement of one stage changes."""
    replace = dataclasses.replace
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig)}
    second_stage = 0 if stage == 2 else _NEVER
    fields |= {
        "run": run,
        "stop_after_steps": options.all_steps,
        "schedule": replace(options.schedule, second_stage_epoch=second_stage, epochs=_NEVER),
        "checkpoint": replace(options.checkpoint, every_steps=_NEVER),
        "monitor": replace(options.monitor, port=0, progress=False),
    }
    return TrainConfig(**fields)


def _measure(config: TrainConfig, stage: int, options: StepOptions, world: World) -> dict[str, Any]:
    """Run and measure the steps of one stage.

    Raises:
        StrataError: A signal stopped the run before all steps were taken.
    """
    config.check_world(world)
    run, device = config.run, choose_device(config.engine, world)
    run.mkdir(parents=True, exist_ok=True)
    reader = ShardReader(config.data.shards, config.data.check)
    metrics = Metrics(run / "log.jsonl" if world.is_first else None)
    trainer = open_pretraining(config, world=world, device=device, reader=reader, metrics=metrics)
    clock = StepClock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Resets VmHWM.
    before = status_bytes("VmRSS")
    with _clocked(trainer, metrics, clock):
        finished = trainer.fit()
    if not finished and trainer.state.step < options.all_steps:
        metrics.close()
        raise StrataError(
            f"tools/bench.py train: a signal stopped stage {stage} at step {trainer.state.step} of "
            f"{options.all_steps}; nothing was measured, start it again"
        )
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")
    steps = clock.steps()[options.warmup :]
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
    peak_rate = measured_peak(device, dtype, options.seconds)
    return {
        "stage": stage,
        "model": config.model.name,
        "width": config.model.width,
        "size": config.data.size,
        "batch": config.data.batch_size,
        "ranks": world.size,
        **machine(device),
        "autocast": autocast,
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


def step_table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table, one column each."""

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *map(cell, records)]

    def part_row(part: str) -> list[str]:
        return row(
            f"{part}, ms",
            lambda r: f"{r['parts_s'][part] * 1e3:.1f} ({r['parts_s'][part] / r['step_s']:.1%})",
        )

    rows = [
        *map(part_row, PARTS),
        row("**step, ms**", lambda r: f"**{r['step_s'] * 1e3:.1f}**"),
        row("samples/s", lambda r: f"{r['samples_per_s']:.1f}"),
        row("GFLOP/s a rank", lambda r: f"{r['flops_per_s'] / 1e9:.1f}"),
        row(
            "of the matrix product's",
            lambda r: f"{r['mfu']:.1%} of {r['matrix_flops_per_s'] / 1e9:.0f}",
        ),
        row("memory, MiB", lambda r: f"{r['memory_bytes'] / 2**20:.0f}"),
        row("memory estimated, MiB", lambda r: f"{r['memory_estimate_bytes'] / 2**20:.0f}"),
    ]
    return table(["", *(f"stage {r['stage']}" for r in records)], rows)


def _start_ranks(count: int, argv: Sequence[str]) -> None:
    """Run this command once on each of several ranks of this machine.

    Raises:
        ConfigError: A rank failed; its own error is above.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(Path(__file__).parents[1] / "bench.py")
    command = [*launcher, "--nproc_per_node", str(count), "--", script, "train", *argv]
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=env, check=False)
    if done.returncode:
        raise ConfigError(f"a rank ended with exit code {done.returncode}; see above")


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: A setting is wrong.
        StrataError: A signal stopped it.
    """
    options = parse_options(StepOptions, argv, "train")
    if options.ranks and not launch.is_launched():
        _start_ranks(options.ranks, argv)
        return
    device = choose_device(options.engine, current_world())
    world = join_world(device)
    try:
        if world.is_first:
            print(machine_line(machine(device)))
        records = []
        with tempfile.TemporaryDirectory() as folder:
            shared = Path(distributed.broadcast_object(folder))
            for stage in options.stages:
                config = _stage_run(options, stage, shared / f"stage-{stage}")
                records.append(_measure(config, stage, options, world))
            distributed.barrier()
        if world.is_first:
            print(step_table(records))
            for record in records:
                append_record(options.out, record)
    finally:
        leave_world()
