"""Monitoring of a running training: counters, times and the bottleneck, as metrics."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from strata.code_digest import commit
from strata.config import dotted, plain
from strata.dataload.loader import Batch
from strata.distributed import World, broadcast_object, gather, watch_collectives
from strata.errors import ConfigError
from strata.logs import get_logger
from strata.telemetry.gpu import GpuCollector
from strata.telemetry.host import HostCollector, ProcessCollector
from strata.telemetry.loggers import MlflowLogger, TensorBoard, WandbLogger
from strata.telemetry.metrics import Metrics
from strata.telemetry.readings import Reading, ReadingCollector
from strata.telemetry.serve import export
from strata.telemetry.targets import run_name
from strata.train.config import TrainConfig
from strata.train.monitor.bottleneck import (
    DATA_PARTS,
    PARTS,
    Bottleneck,
    RankTimes,
    Utilisation,
    find_bottleneck,
)
from strata.train.monitor.clock import Clock, peak_flops
from strata.train.monitor.cost_model import step_cost
from strata.train.monitor.health import health_series
from strata.train.monitor.progress import ACTIVITIES

__all__ = ["RunMonitor", "count_starts", "serve_run"]

logger = get_logger(__name__)


def count_starts(log: Path) -> int:
    """Number of previous starts of a run, from its log.jsonl."""
    if not log.exists():
        return 0
    with log.open(encoding="utf-8", errors="replace") as lines:
        return sum('"kind": "start"' in line for line in lines)


def _loggers(config: TrainConfig) -> Iterator[TensorBoard | WandbLogger | MlflowLogger]:
    """The loggers that the settings name."""
    monitor, settings = config.monitor, dotted(plain(config))
    if monitor.tensorboard:
        yield TensorBoard(config.run / "tensorboard")
    if monitor.wandb:
        yield WandbLogger(config.run, settings)
    if monitor.mlflow:
        yield MlflowLogger(config.run, settings)


def _open_run(config: TrainConfig, world: World, opened: ExitStack) -> Metrics:
    """Create the run's folder and log, and count previous starts. All ranks call it.

    Args:
        config: The run's settings.
        world: This rank and its peers.
        opened: Closes the loggers.

    Raises:
        ConfigError: The folder cannot be written.
    """
    metrics, wrong = None, ""
    try:
        if world.is_first:
            config.run.mkdir(parents=True, exist_ok=True)
        log = config.run / "log.jsonl"
        starts = count_starts(log) if world.is_first else 0
        metrics = Metrics(log if world.is_first else None)
        if world.is_first:
            metrics.add("strata_restarts_total", starts)
        if world.is_first:
            for sink in _loggers(config):
                metrics.add_listener(sink)
                opened.callback(sink.close)
    except ConfigError as error:
        wrong = str(error)
    except OSError as error:
        wrong = f"the run's folder cannot be written: {error}; choose another --run, or fix it"
    wrong = broadcast_object(wrong)
    if metrics is None or wrong:
        raise ConfigError(wrong)
    return metrics


@contextmanager
def serve_run(config: TrainConfig, world: World) -> Iterator[Metrics]:
    """Serve the metrics of one rank and list them for Prometheus until the run ends normally.

    Args:
        config: The run's settings.
        world: This rank and its peers.

    Raises:
        ConfigError: The run's folder cannot be written, or another live run has the same name.
    """
    with ExitStack() as opened:
        metrics = _open_run(config, world, opened)
        run = run_name(config.monitor, config.run)
        with export(metrics, config.monitor, role="train", run=run, world=world):
            yield metrics


class RunMonitor:
    """Updates the metrics of a rank from its steps.

    Args:
        config: The run's settings.
        world: This rank and its peers.
        device: Where steps are computed.
        metrics: The metrics to update.
        clock: The clock of the steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World,
        device: torch.device,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._config, self._world, self._device = config, world, device
        self._metrics, self._clock = metrics, clock
        # Counted at start: in the loop this time would count as the host's.
        videos = config.data.batch_size // world.size
        self._flops_per_sample = {
            stage: step_cost(config, videos=videos, stage=stage).flops / videos for stage in (1, 2)
        }
        self._peak: float | None = None
        self._gpu: GpuCollector | None = None
        self._loader_s = {"read": 0.0, "graph": 0.0}
        self._sums: list[RankTimes] = []
        self._own: RankTimes | None = None
        self.bottleneck: Bottleneck | None = None
        clock.progress.stalled_s = config.monitor.stalled_s
        metrics.add_collector(ReadingCollector(self._read))
        metrics.add_collector(ProcessCollector())
        if world.local_rank == 0:
            places = {"run": config.run}
            if "://" not in str(config.data.shards):
                places["shards"] = Path(config.data.shards)
            metrics.add_collector(HostCollector(places, config.monitor.node))
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            uuid = str(properties.uuid)
            metrics.add_collector(GpuCollector(uuid))
            # A separate reader, since GPM reports means since the last reading.
            self._gpu = GpuCollector(uuid)
            metrics.add_collector(ReadingCollector(self._allocator))
            if config.engine.precision_on(device) == "bf16":
                self._peak = peak_flops(properties.name)
        watch_collectives(clock.communication)

    def start(self, *, step: int, total_steps: int, data: str) -> None:
        """Report what is about to be trained.

        Args:
            step: Steps that earlier processes of the run have taken.
            total_steps: Steps of the complete run.
            data: Digest of the manifest.
        """
        metrics = self._metrics
        metrics.set("strata_step", step)
        metrics.set("strata_total_steps", total_steps)
        metrics.set("strata_start_timestamp_seconds", time.time())
        metrics.set("strata_world_size", self._world.size)
        metrics.set(
            "strata_run_info",
            1,
            commit=commit(),
            model=self._config.model.name,
            world_size=str(self._world.size),
            precision=self._config.engine.precision_on(self._device),
            data=data[:12],
        )

    def health(self, measured: Mapping[str, float]) -> None:
        """Set the metrics of the representation's health."""
        for measure, value in measured.items():
            name, labels = health_series(measure)
            self._metrics.set(name, value, **labels)

    def count(self, batch: Batch, queue_depth: int) -> None:
        """Count an issued step without using the device."""
        metrics, clock, num = self._metrics, self._clock, len(batch.samples)
        metrics.add("strata_steps_total", 1)
        metrics.add("strata_samples_total", num)
        metrics.add("strata_clips_total", num * (2 if batch.long is None else 3))
        metrics.add("strata_frames_decoded_total", batch.frames_decoded)
        metrics.add("strata_bytes_read_total", batch.bytes_read)
        metrics.observe("strata_step_duration_seconds", clock.last_step_s)
        metrics.set("strata_loader_queue_depth", queue_depth)
        for part, seconds in (("read", batch.read_s), ("graph", batch.graph_s)):
            metrics.add("strata_loader_seconds_total", seconds, part=part)
            self._loader_s[part] += seconds

    def report(self, times: RankTimes, stage: int) -> None:
        """Set the metrics of an interval's times; all ranks call it at the same step.

        Args:
            times: Of this rank, by its clock.
            stage: Stage of the interval's last step.
        """
        metrics = self._metrics
        samples = self._config.data.batch_size // self._world.size
        flops = times.rate(samples) * self._flops_per_sample[stage]
        metrics.set("strata_model_flops_per_second", flops)
        if self._peak is not None:
            metrics.set("strata_mfu_ratio", flops / self._peak)
        mine = replace(times, read_s=self._loader_s["read"], graph_s=self._loader_s["graph"])
        metrics.set("strata_own_step_seconds", mine.own_s / max(times.num_steps, 1))
        self._loader_s = {"read": 0.0, "graph": 0.0}
        # Replaced in one piece, so that a scrape sees all parts of an interval or none.
        self._own = mine if self._own is None else self._own + mine
        local = torch.tensor([mine.values()], dtype=torch.float64, device=self._device)
        ranks = [RankTimes.from_values(row) for row in gather(local).tolist()]
        self._sums = (
            [a + b for a, b in zip(self._sums, ranks, strict=True)] if self._sums else ranks
        )
        # The sums are the same on every rank, so all report at the same step.
        if self._sums[0].wall_s >= self._config.monitor.verdict_s:
            self._judge()

    def _judge(self) -> None:
        bottleneck = find_bottleneck(self._sums, self._utilisation())
        self._sums, self.bottleneck = [], bottleneck
        record: dict[str, Any] = {
            "bound_by": bottleneck.bound_by,
            "data_by": bottleneck.data_by,
            "shares": bottleneck.shares,
            "optimizer_share": bottleneck.optimizer_share,
            "slowest_rank": bottleneck.slowest_rank,
            "straggler_ratio": bottleneck.straggler_ratio,
        }
        self._metrics.record("verdict", **record)
        logger.info("%s", bottleneck.text())

    def _read(self) -> Iterator[Reading]:
        """Readings of this moment: the activity, the times, and the bottleneck while it holds."""
        progress = self._clock.progress
        spent_s, activity, stalled = progress.spent_s(), progress.activity, progress.stalled
        for name in ACTIVITIES:
            label = {"activity": name}
            yield Reading("strata_activity_seconds_total", spent_s[name], label)
            yield Reading("strata_activity", float(name == activity), label)
        yield Reading("strata_stall_limit_seconds", progress.limit_s, {})
        if progress.last_step_time is not None:
            yield Reading("strata_last_step_timestamp_seconds", progress.last_step_time, {})
        if (own := self._own) is not None:
            for part in PARTS:
                yield Reading(
                    "strata_time_seconds_total", getattr(own, f"{part}_s"), {"part": part}
                )
            yield Reading("strata_optimizer_seconds_total", own.optimizer_s, {})
        found = self.bottleneck
        if found is not None or stalled:
            bound_by = "stalled" if stalled or found is None else found.bound_by
            for name in (*PARTS, "stalled"):
                yield Reading("strata_bound", float(name == bound_by), {"by": name})
        # Measurements from before a stall do not describe it.
        if found is None or stalled:
            return
        for part in DATA_PARTS:
            yield Reading("strata_data_bound_by", float(part == found.data_by), {"part": part})
        for part, share in found.shares.items():
            yield Reading("strata_time_share_ratio", share, {"part": part})
        if found.straggler_ratio is not None:
            yield Reading("strata_straggler_ratio", found.straggler_ratio, {})
            yield Reading("strata_straggler_rank", found.slowest_rank, {})

    def _allocator(self) -> Iterator[Reading]:
        """Readings of torch's allocator of device memory."""
        stats = torch.cuda.memory_stats(self._device)
        for kind in ("active", "reserved"):
            peak = stats.get(f"{kind}_bytes.all.peak", 0)
            yield Reading("strata_torch_memory_peak_bytes", peak, {"kind": kind})
        retries, failed = stats.get("num_alloc_retries", 0), stats.get("num_ooms", 0)
        yield Reading("strata_torch_allocator_retries_total", retries, {})
        yield Reading("strata_torch_out_of_memory_total", failed, {})

    def _utilisation(self) -> Utilisation:
        if self._gpu is None:
            return Utilisation()
        found = {r.name: r.value for r in self._gpu.read()}
        return Utilisation(
            gpu=found.get("strata_gpu_utilization_ratio") if self._gpu.has_means else None,
            decoder=found.get("strata_gpu_decoder_utilization_ratio"),
            jpeg=found.get("strata_gpu_jpeg_utilization_ratio"),
        )

    def close(self) -> None:
        """Stop timing collectives."""
        watch_collectives(None)
