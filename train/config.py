"""The configuration of a pretraining run, and the checks between its parts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from strata.dataload.config import DataConfig
from strata.distributed import World
from strata.errors import ConfigError
from strata.ranges import check_range
from strata.telemetry.loggers import require_logger
from strata.telemetry.metrics import ExporterConfig
from strata.train.engine_config import EngineConfig
from strata.train.method.schedules import ScheduleConfig
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig
from strata.train.representation.online_retrieval import ProbeConfig
from strata.train.run.checkpoint import CheckpointConfig

__all__ = ["MonitorConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(ExporterConfig):
    """Settings of logs, metrics and health measurements of a run."""

    log_every: int = 10
    """Steps between log lines, JSON records and readings of the losses."""
    health_every: int = 50
    """Steps between measurements of the representation's health."""
    verdict_s: float = 60.0
    """Seconds between reports of the bottleneck; 0 reports it with each log line."""
    stalled_s: float = 60.0
    """Seconds without a step from which a run is reported as stalled, or five median steps if that
    is longer."""
    progress: bool = True
    """Whether rank 0 shows a progress bar."""
    tensorboard: bool = False
    """Whether rank 0 also writes TensorBoard's event files, to <run>/tensorboard; needs the package
    tensorboard."""
    wandb: bool = False
    """Whether rank 0 also writes to Weights & Biases, whose own variables say where (WANDB_MODE,
    WANDB_PROJECT); needs strata-video[wandb]."""
    mlflow: bool = False
    """Whether rank 0 also writes to MLflow, whose own variables say where (MLFLOW_TRACKING_URI);
    needs strata-video[mlflow]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "log_every", "health_every", prefix="monitor.", at_least=1)
        check_range(self, "stalled_s", prefix="monitor.", above=0)
        check_range(self, "verdict_s", prefix="monitor.", at_least=0)
        for name in ("tensorboard", "wandb", "mlflow"):
            if getattr(self, name):
                require_logger(name)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A pretraining run."""

    SHOWN: ClassVar = (
        *("run", "data.shards", "data.batch_size", "model.name", "schedule.epochs", "seed"),
        *("engine.learning_rate", "engine.precision", "resume", "plan_only"),
    )
    RENAMED: ClassVar = {
        "probe.gallery": "probe.train",
        "probe.query": "probe.test",
        "model.fold_stem": "engine.fold_stem",
    }
    RECIPES: ClassVar = "pretrain"

    run: Path
    """The run's folder: config, log, checkpoints."""
    data: DataConfig
    """Training data: shards, batch size, clips and augmentation."""
    model: BackboneConfig = field(default_factory=BackboneConfig)
    """The encoder."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """The recipe."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Epochs at which stage, learning rate and queue change."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Device, precision, optimizer and parallelism."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Logs, metrics and health measurements."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Retrieval on a labelled set during training."""
    seed: int = 0
    """Seed of weights, order and augmentation; in [0, 2^32)."""
    resume: Literal["never", "auto"] = "never"
    """auto resumes from the run's newest checkpoint, or starts if there is none."""
    stop_after_steps: int = 0
    """Number of steps after which the run saves and ends; 0 runs all epochs."""
    collect_every_steps: int = 100
    """Steps between garbage collections, the same on all ranks; with 0 Python collects at any time
    on any rank while the others wait."""
    plan_rate: float = 0.0
    """Samples per second on all ranks, for the hours of the start-up page; 0 takes the speed that
    the run's log measured last."""
    plan_only: bool = False
    """Print the run plan (docs/operations.md, The start-up page) and end."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; use 0 to 2^32 - 1")
        check_range(self, "plan_rate", "stop_after_steps", "collect_every_steps", at_least=0)
        if self.method.queue_length < self.data.batch_size:
            raise ConfigError(
                f"method.queue_length {self.method.queue_length} is shorter than "
                f"data.batch_size {self.data.batch_size}; lengthen the queue"
            )
        clips = self.data.clips
        self.method.check_clips(clips.clip_frames, clips.long_frames, self.model.time_strides)
        if self.data.batch_size < 2:
            raise ConfigError(
                "data.batch_size is 1; a video is contrasted with others, use 2 or more"
            )

    def check_world(self, world: World) -> None:
        """Check settings that depend on the number of ranks.

        Raises:
            ConfigError: The number of ranks does not divide the batch size.
        """
        parts = world.size * self.engine.accumulation
        if self.data.batch_size % parts:
            times = f" in {self.engine.accumulation} parts" if self.engine.accumulation > 1 else ""
            raise ConfigError(
                f"data.batch_size {self.data.batch_size} does not divide by {world.size} ranks"
                f"{times}; use a multiple"
            )
        if self.data.batch_size // self.engine.accumulation < 2:
            raise ConfigError(
                f"engine.accumulation {self.engine.accumulation} leaves parts of one video; a "
                "video is contrasted with others"
            )
