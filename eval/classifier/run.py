"""The training of a classifier on the loop of pretraining, and its test."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from strata.config import dump_config
from strata.dataload.config import DataConfig
from strata.dataload.labels import check_labels
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.plan import Plan
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import ClassificationRecipe, open_plan
from strata.distributed import World, barrier, gather, mean_over_ranks
from strata.errors import CheckpointError, ConfigError
from strata.eval.accuracy import Accuracy, ClassSpace, measure_accuracy
from strata.eval.classifier.config import ClassifierConfig
from strata.eval.classifier.model import Classifier, share_statistics, video_probabilities
from strata.files import FolderLock
from strata.telemetry.metrics import Metrics
from strata.train.engine import Engine
from strata.train.engine_config import EngineConfig
from strata.train.loop import LoopConfig, Trainer
from strata.train.models.backbones import Backbone
from strata.train.monitor.clock import Clock
from strata.train.representation.encode import VideoClips
from strata.train.run.checkpoint import RunState
from strata.train.run.non_finite import NonFiniteFlags, Report
from strata.train.task import Task

__all__ = ["ClassifierRun", "ClassifierTask"]

_MOMENTUM = 0.9
"""Of SGD; CoCLR's, and the works' that its protocol comes from."""


class ClassifierTask(Task[Classifier]):
    """The training steps of a classifier and their reports.

    Args:
        model: The classifier.
        reader: The training set.
        config: Settings of the training.
        targets: int64 `[N]`: the class of each training sample.
        clips: Size and frames of a clip.
        folder: The run's folder.
        world: This rank and its peers.
        device: Where to compute.
        metrics: Receives the records.
    """

    def __init__(
        self,
        model: Classifier,
        reader: ShardReader,
        config: ClassifierConfig,
        targets: Tensor,
        clips: VideoClips,
        *,
        folder: Path,
        world: World,
        device: torch.device,
        metrics: Metrics,
    ) -> None:
        self.model, self._config, self._targets = model, config, targets
        self._reader, self._folder, self._metrics = reader, folder, metrics
        self._world, self._device = world, device
        self._data = DataConfig(
            shards=reader.location,
            batch_size=config.batch_size,
            size=clips.size,
            views=config.views,
        )
        self._recipe = ClassificationRecipe(clip_frames=clips.clip_frames, stride=config.stride)
        self.plan: Plan = open_plan(reader, self._data, config.seed, self._recipe)
        self.engine = Engine(
            model,
            model.groups(config),
            EngineConfig(
                precision=config.precision,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
            ),
            batch_size=config.batch_size,
            world=world,
            device=device,
            run=folder,
            momentum=_MOMENTUM if config.optimizer == "sgd" else None,
        )
        model.backbone.channels_last()
        self.clock = Clock(device)
        self._tally: list[Tensor] = []

    def check(self, found: Path, saved: RunState, now: RunState) -> None:
        """Check that evaluation and order are those of the checkpoint."""
        if saved.config != now.config or saved.plan_digest != now.plan_digest:
            raise CheckpointError(
                f"{self._folder} belongs to another evaluation; choose another --run"
            )

    def announce(self, state: RunState) -> None:
        """Write the settings to the run's folder."""
        if self._world.is_first:
            dump_config(self._config, self._folder / "training.yaml")

    def loader(self, state: RunState) -> TrainLoader:
        """The batches from a position to the last epoch."""
        return TrainLoader(
            self._reader,
            self._data,
            self.plan,
            world=self._world,
            device=self._device,
            epochs=(state.epoch, self._config.epochs),
            start_step=state.epoch_step,
            recipe=self._recipe,
        )

    def step(self, batch: Batch, state: RunState) -> NonFiniteFlags:
        """Cross-entropy and the update; loss and accuracy stay on the device."""
        targets = self._targets[torch.from_numpy(batch.samples)].to(self._device)
        num = len(batch.samples)
        if self.model.frozen:
            targets = gather(targets)
        logits = self.engine(batch.short[:, 0], self._keep(num, state.step))
        loss = functional.cross_entropy(logits, targets)
        right = (logits.detach().argmax(dim=1) == targets).float().mean()
        self.engine.step(loss, lr_factor=self._config.lr_factor(batch.epoch))
        self._tally.append(torch.stack([loss.detach().float(), right]))
        # A frozen encoder's head sees the global batch.
        own = logits[self._world.rank * num :][:num] if self.model.frozen else logits
        return NonFiniteFlags.of(
            {"cross_entropy": loss.detach()[None]},
            ~torch.isfinite(own.detach()).all(dim=1),
            skipped=self.engine.skipped,
            step=state.step,
            batch=batch,
        )

    def _keep(self, num_local: int, step: int) -> Tensor | None:
        """Dropout as a function of (seed, step): the same after a resume and on any ranks."""
        config, world = self._config, self._world
        if not config.dropout:
            return None
        generator = torch.Generator().manual_seed((config.seed << 32) + step)
        width = self.model.linear.in_features
        draws = torch.rand(num_local * world.size, width, generator=generator)
        if not self.model.frozen:
            draws = draws[world.rank * num_local : (world.rank + 1) * num_local]
        return ((draws >= config.dropout) / (1 - config.dropout)).to(self._device)

    def count(self, batch: Batch, queue_depth: int) -> None:
        """Nothing: only pretraining is monitored step by step."""

    def report_due(self, state: RunState) -> bool:
        """At the end of an epoch."""
        return state.epoch_step == 0

    def report(self, batch: Batch, state: RunState) -> dict[str, str]:
        """Record mean loss and accuracy of the steps since the last report; skipped ones apart."""
        tally, self._tally = torch.stack(self._tally), []
        finite = tally[torch.isfinite(tally).all(dim=1)]
        self.clock.interval()
        found = mean_over_ranks((finite if len(finite) else tally).mean(dim=0)).tolist()
        loss, top1 = (value if math.isfinite(value) else None for value in found)
        self._metrics.record(
            "step",
            step=state.step,
            epoch=batch.epoch,
            num_steps=len(tally),
            loss=loss,
            top1=top1,
            learning_rate=self._config.learning_rate * self._config.lr_factor(batch.epoch),
        )
        return {}

    def between_steps(self, state: RunState, beat: Callable[[str], None]) -> None:
        """Nothing: no epoch is chosen by a measurement."""

    def before_saving(self) -> None:
        """All ranks test the weights that are saved, with the same batch statistics."""
        share_statistics(self.model, self._world)

    def dump(self, report: Report) -> None:
        """Nothing: the report names the samples."""

    def close(self) -> None:
        """Close the log."""
        self._metrics.close()


class ClassifierRun(Trainer[ClassifierTask]):
    """Trains a classifier on one set and tests it on another; resumes automatically.

    Args:
        backbone: The encoder to begin with.
        train: The training set.
        test: The test set.
        config: Settings of the training.
        clips: Clips of the test; size and frames are those of the training too.
        folder: The run's folder: config, log, checkpoints; a training found there is resumed.
        described: What identifies the run; a folder of another run is refused.
        world: This rank and its peers.
        device: Where to compute.
        lock: The lock of the folder, on rank 0.

    Raises:
        ConfigError: The batch does not divide by the ranks, or the sets do not fit.
        CheckpointError: The folder belongs to another run.
    """

    def __init__(
        self,
        backbone: Backbone,
        train: ShardReader,
        test: ShardReader,
        config: ClassifierConfig,
        clips: VideoClips,
        *,
        folder: Path,
        described: dict[str, Any],
        world: World,
        device: torch.device,
        lock: FolderLock | None = None,
    ) -> None:
        if config.batch_size % world.size:
            raise ConfigError(
                f"training.batch_size {config.batch_size} does not divide by {world.size} ranks; "
                "use a multiple"
            )
        check_labels(train)
        check_labels(test)
        self._config, self._clips, self._test = config, clips, test
        self._device = device
        self.space = ClassSpace.of(train.labels, test.labels, train.manifest.classes, learned=True)
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        barrier()
        self.model = Classifier(backbone, len(self.space), config)
        metrics = Metrics(folder / "log.jsonl" if world.is_first else None)
        task = ClassifierTask(
            self.model,
            train,
            config,
            torch.from_numpy(self.space.index(train.labels)),
            clips,
            folder=folder,
            world=world,
            device=device,
            metrics=metrics,
        )
        steps = config.epochs * task.plan.steps_per_epoch
        super().__init__(
            task,
            RunState(
                step=0,
                epoch=0,
                epoch_step=0,
                manifest_digest=train.manifest.digest,
                plan_digest=task.plan.digest,
                world_size=world.size,
                config=described,
            ),
            LoopConfig(
                run=folder,
                total_steps=min(steps, config.max_steps or steps),
                steps_per_epoch=task.plan.steps_per_epoch,
                checkpoint=config.checkpoint,
                settings="training",
                restart="Start the same command again",
                timeout_advice="look for a dead rank or a hanging file system",
                max_skipped_steps=config.max_skipped_steps,
                timeout_s=EngineConfig().world_timeout_s,
                title=f"train on {train.name}",
            ),
            keys=train.keys,
            world=world,
            metrics=metrics,
            lock=lock,
        )
        self.resume("auto")

    def test(self) -> Accuracy:
        """Accuracy on the test set, of the weights as they are at the end of the training.

        No epoch is chosen by its accuracy on the test set.
        """
        crops = self._config.test_crops
        clips = dataclasses.replace(
            self._clips,
            num_crops=crops,
            videos_per_batch=max(1, self._clips.videos_per_batch // crops),
        )
        probabilities = video_probabilities(
            self.model, self._test, clips, world=self._world, device=self._device
        )
        return measure_accuracy(probabilities, self.space.index(self._test.labels))
