"""The run plan: a summary of a run that is printed and logged before it starts."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import strata
from strata.dataload.augment_choice import AugmentChoice
from strata.dataload.frame_cache import cache_bytes
from strata.dataload.plan import Plan
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.logs import read_json_lines
from strata.train.config import TrainConfig
from strata.train.engine_config import derive_deepspeed
from strata.train.method.schedules import ScheduleConfig, phase_at
from strata.train.monitor.cost_model import MemoryEstimate, StepCost, memory_estimate, step_cost

__all__ = ["RunPlan", "describe_run", "stage_epochs"]

_RATES = 20
"""Records of log.jsonl whose median is the measured speed."""
_NAMED = 5
"""Number of videos that a line names; the log has all of them."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The summary of a run; rank 0 prints `lines`, and the run's log gets `record`."""

    lines: tuple[tuple[str, str], ...]
    """Name and text of each line."""
    record: dict[str, Any]
    """The same facts as numbers."""

    def text(self) -> str:
        """The lines as one block with aligned names."""
        width = max(len(name) for name, _ in self.lines)
        return "\n".join(f"  {name.ljust(width)}  {text}".rstrip() for name, text in self.lines)


def stage_epochs(schedule: ScheduleConfig) -> dict[int, tuple[int, int]]:
    """For each stage that the run reaches: its first epoch and the one after its last."""
    switch = min(schedule.second_stage_epoch, schedule.epochs)
    spans = {1: (0, switch), 2: (switch, schedule.epochs)}
    return {stage: span for stage, span in spans.items() if span[0] < span[1]}


def describe_run(
    config: TrainConfig,
    *,
    world: World,
    device: torch.device,
    reader: ShardReader,
    plan: Plan,
    step: int = 0,
    augment_choice: AugmentChoice | None = None,
) -> RunPlan:
    """Make the summary of a run.

    Args:
        config: The run's settings.
        world: This rank and the world size.
        device: The device to compute on.
        reader: The data set, opened.
        plan: The order of samples.
        step: Steps already done, if the run is resumed.
        augment_choice: Where views are augmented, if that was measured.

    Raises:
        ConfigError: The device does not support the precision.
    """
    schedule = config.schedule
    derived = derive_deepspeed(
        config.engine, batch_size=config.data.batch_size, world_size=world.size, device=device
    )
    dtype = derived.get("torch_autocast", {}).get("dtype")
    videos = config.data.batch_size // world.size
    all_steps = schedule.epochs * plan.steps_per_epoch
    last = min(all_steps, config.stop_after_steps or all_steps)
    stages = stage_epochs(schedule)
    costs = {stage: step_cost(config, videos=videos, stage=stage) for stage in stages}
    memory = {
        stage: memory_estimate(
            config, cost, videos=videos, ranks=world.size, stage=stage, autocast=dtype is not None
        )
        for stage, cost in costs.items()
    }
    largest = max(stages, key=lambda s: memory[s].total)
    lines = [
        (f"strata {strata.__version__}", str(config.run)),
        ("world", _world(config, world, device, dtype)),
        *_data(config, world, reader, plan),
        *([("augmentation", augment_choice.text())] if augment_choice else []),
        (
            "steps",
            f"{plan.steps_per_epoch} an epoch, {schedule.epochs} epochs: {step} of {last} done; "
            f"order {plan.digest}, seed {config.seed}",
        ),
        ("hours", _hours(config, last - step)),
        ("model", _model(config, costs[largest])),
        *([("teacher", f"{config.method.teacher}, frozen")] if config.method.teacher else []),
        *((f"stage {s}", _stage(config, span, costs[s], s)) for s, span in stages.items()),
        *_graph(config, 2 in stages),
        ("learning rate", _rates(config)),
        ("memory", _memory(memory[largest], largest, world)),
        *_cache(config, reader, device),
        ("checkpoints", _checkpoints(config, plan)),
        *([("probe", _probe(config))] if config.probe.every_epochs else []),
        ("figures", _figures(config)),
    ]
    record = {
        "autocast": dtype,
        "step": step,
        "last_step": last,
        "augment_rates": augment_choice.rates if augment_choice else None,
        "parameters": costs[largest].parameters,
        **_facts(config, world, device, reader, plan),
        "stages": {
            str(stage): {
                "epochs": list(stages[stage]),
                "terms": sorted(config.method.active(stage)),
                "flops_per_step": cost.flops * world.size,
                "memory_bytes_per_rank": vars(memory[stage]) | {"total": memory[stage].total},
            }
            for stage, cost in costs.items()
        },
    }
    return RunPlan(lines=tuple(lines), record=record)


def _facts(
    config: TrainConfig, world: World, device: torch.device, reader: ShardReader, plan: Plan
) -> dict[str, Any]:
    """The run's facts for the record: model, data, device."""
    return {
        "strata": strata.__version__,
        "torch": torch.__version__,
        "world_size": world.size,
        "device": device.type,
        "batch_size": config.data.batch_size,
        "steps_per_epoch": plan.steps_per_epoch,
        "manifest_digest": reader.manifest.digest,
        "plan_digest": plan.digest,
        "left_out": [reader.keys[sample] for sample in plan.left_out],
        "cache_bytes": _cache_bytes(config, reader, device),
    }


def _hours(config: TrainConfig, steps: int) -> str:
    """Time of the remaining steps at the given or the last measured speed."""
    rate, source = config.plan_rate, "as given"
    log = config.run / "log.jsonl"
    if not rate and log.is_file():
        records = [r for r in read_json_lines(log)[0] if r["kind"] == "step"]
        rates = [r["samples_per_second"] for r in records[-_RATES:]]
        rate, source = statistics.median(rates) if rates else 0.0, "as this run's log measured last"
    if not rate:
        return "unknown until the speed is measured; --plan_rate gives it in samples/s"
    hours = steps * config.data.batch_size / rate / 3600
    return f"{hours:.3g} for {steps} steps at {rate:.4g} samples/s, {source}; without evaluation"


def _world(config: TrainConfig, world: World, device: torch.device, dtype: str | None) -> str:
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precision = "float32" if dtype is None else f"{dtype} by autocast, losses float32"
    return f"{ranks} on {name}, {precision}, ZeRO {config.engine.zero}"


def _data(
    config: TrainConfig, world: World, reader: ShardReader, plan: Plan
) -> list[tuple[str, str]]:
    """The data set, the videos that are left out, and what a batch has."""
    data, clips = config.data, config.data.clips
    digest, videos = reader.manifest.digest[:12], data.batch_size // world.size
    batch = (
        f"{data.batch_size} videos, {videos} a rank; clips of {clips.clip_frames} and "
        f"{clips.long_frames} frames, {data.size}x{data.size} pixels"
    )
    return [
        ("data", f"{reader.location}: {plan.num_samples} videos, manifest {digest}"),
        *_left_out(config, reader, plan),
        ("batch", batch),
    ]


def _left_out(config: TrainConfig, reader: ShardReader, plan: Plan) -> list[tuple[str, str]]:
    """Number of videos that are too short for the window, and the first names."""
    if not plan.left_out:
        return []
    lengths = reader.num_frames[np.array(plan.left_out)]
    named = [
        f"{reader.keys[sample]} ({count})"
        for sample, count in zip(plan.left_out[:_NAMED], lengths.tolist(), strict=False)
    ]
    rest = len(plan.left_out) - len(named)
    more = f" and {rest} more, all named in log.jsonl" if rest else ""
    return [
        (
            "left out",
            f"{len(plan.left_out)} of {reader.num_samples} videos have fewer than the window's "
            f"{config.data.clips.window_frames} frames: {', '.join(named)}{more}",
        )
    ]


def _model(config: TrainConfig, cost: StepCost) -> str:
    millions = cost.parameters / 1e6
    return (
        f"{config.model.name}, width {config.model.width}, {millions:.2f} million parameters with "
        "heads"
    )


def _stage(config: TrainConfig, span: tuple[int, int], cost: StepCost, stage: int) -> str:
    weights = vars(config.method.weights)
    terms = " + ".join(
        f"{weight:g} {name}"
        for name, weight in weights.items()
        if name in config.method.active(stage)
    )
    return (
        f"epochs {span[0]} to {span[1] - 1}, {_flops(cost.forward_flops)} forward and "
        f"{_flops(cost.backward_flops)} backward a rank and step: {terms}"
    )


def _graph(config: TrainConfig, second_stage: bool) -> list[tuple[str, str]]:
    """The expected state of the graph term, if the run uses it."""
    method, videos = config.method, config.data.batch_size
    if not second_stage or not any(n.startswith("graph_") for n in method.active(2)):
        return []
    others = (videos - 1) / method.num_prototypes
    expected = (
        "so few that the graph may be the identity; L_gr then only separates a video's two views "
        "from other videos"
        if others < 1
        else "so it can connect a video to other videos"
    )
    return [
        (
            "graph",
            f"{videos} videos and {method.num_prototypes} prototypes: {others:.2g} other videos "
            f"for each prototype if all are used equally, {expected}; see graph_off_diagonal_mass",
        )
    ]


def _rates(config: TrainConfig) -> str:
    """Learning rates with the epoch at which each starts."""
    schedule = config.schedule
    begins = sorted({0, *(e for e in schedule.lr_drop_epochs if e < schedule.epochs)})
    return ", ".join(
        f"{config.engine.learning_rate * phase_at(schedule, epoch).lr_factor:g} from epoch {epoch}"
        for epoch in begins
    )


def _memory(memory: MemoryEstimate, stage: int, world: World) -> str:
    parts = " + ".join(f"{_bytes(value)} {name}" for name, value in vars(memory).items())
    a_rank = "a rank, " if world.size > 1 else ""
    return f"at least {_bytes(memory.total)} {a_rank}in stage {stage}: {parts}"


def _cache_bytes(config: TrainConfig, reader: ShardReader, device: torch.device) -> int:
    if config.data.cache == "none":
        return 0
    return cache_bytes(reader, config.data.augments_on(device))


def _cache(config: TrainConfig, reader: ShardReader, device: torch.device) -> list[tuple[str, str]]:
    size = _bytes(_cache_bytes(config, reader, device))
    if config.data.cache == "none":
        return []
    where = "the host, once a node" if config.data.cache == "host" else "every rank's GPU"
    frames = int(reader.num_frames.sum())
    return [("cache", f"{size} on {where}: {frames:,} decoded frames")]


def _checkpoints(config: TrainConfig, plan: Plan) -> str:
    every = config.checkpoint.every_steps
    when = f"every {every} steps" if every else f"every epoch ({plan.steps_per_epoch} steps)"
    return f"{when}, the last {config.checkpoint.keep} kept; resume {config.resume}"


def _probe(config: TrainConfig) -> str:
    probe = config.probe
    return (
        f"retrieval before training, every {probe.every_epochs} epochs and at the end: "
        f"{probe.test} in {probe.train}, {probe.num_clips} clips a video"
    )


def _figures(config: TrainConfig) -> str:
    monitor = config.monitor
    served = (
        f"http://{monitor.host}:{monitor.port}/metrics, local rank r at {monitor.port} + r"
        if monitor.port
        else "not served"
    )
    return f"{config.run / 'log.jsonl'} every {monitor.log_every} steps; {served}"


def _flops(count: int) -> str:
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
