"""A step of pretraining, and the run that takes such steps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from strata.config import plain
from strata.dataload.augment_choice import AugmentChoice
from strata.dataload.config import DataConfig
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.plan import Plan
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import PretrainingRecipe, open_plan
from strata.distributed import World
from strata.files import FolderLock
from strata.logs import get_logger
from strata.telemetry.metrics import Metrics
from strata.train.config import TrainConfig
from strata.train.engine import Engine
from strata.train.fast_encoder import arrange_encoder
from strata.train.loop import LoopConfig, Trainer
from strata.train.method.model import VideoModel
from strata.train.method.objective import LossTerms, Method
from strata.train.method.schedules import Phase, phase_at
from strata.train.method.teacher import Teacher
from strata.train.monitor.clock import Clock
from strata.train.monitor.run_monitor import RunMonitor
from strata.train.representation.online_retrieval import OnlineProbe
from strata.train.run.bad_batch import write_bad_batch
from strata.train.run.checkpoint import RunState
from strata.train.run.non_finite import NonFiniteFlags, Report
from strata.train.run.resume import check_same_training
from strata.train.run.run_plan import describe_run
from strata.train.run.step_report import StepReport
from strata.train.task import Task

__all__ = ["Pretraining", "open_pretraining"]

logger = get_logger(__name__)


class Pretraining(Task[VideoModel]):
    """A step of the method on DeepSpeed, and what a run reports of its steps.

    Args:
        config: The run's settings.
        plan: The order of samples.
        world: This rank and its peers; the process group is formed.
        device: Where to compute.
        reader: The opened data set.
        metrics: Receives the metrics.
        probe: Measures retrieval of the encoder between epochs.
        teacher: The encoder that teaches, if the method has one.
        augment_choice: Where views are augmented, if that was measured; for the start-up page.

    Raises:
        ConfigError: The teacher is of another width.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        *,
        world: World,
        device: torch.device,
        reader: ShardReader,
        metrics: Metrics,
        probe: OnlineProbe | None = None,
        teacher: Teacher | None = None,
        augment_choice: AugmentChoice | None = None,
    ) -> None:
        self._augment_choice = augment_choice
        self._config, self._plan, self._reader = config, plan, reader
        self._world, self._device = world, device
        self._metrics, self._probe = metrics, probe
        torch.manual_seed(config.seed)
        self.model = VideoModel(config.model, config.method, config.data.clips.clip_frames)
        self._teacher = teacher
        if teacher is not None:
            teacher.check(self.model)
            teacher.to(device)
        self.engine = Engine(
            self.model,
            self.model.groups(),
            config.engine,
            batch_size=config.data.batch_size,
            world=world,
            device=device,
            run=config.run,
        )
        arrange_encoder(
            self.model,
            config.engine,
            device,
            num_frames=config.data.batch_size // world.size * 2 * config.data.clips.long_frames,
            size=config.data.size,
        )
        self.method = Method(self.model, config.method, world)
        self.clock = Clock(device)
        self.monitor = RunMonitor(
            config, world=world, device=device, metrics=metrics, clock=self.clock
        )
        self.engine.watch_averaging(self.clock.communication)
        self.engine.watch_update(self.clock.optimizer)
        self._step_report = StepReport(config, metrics, is_first=world.is_first)
        self._latest: LossTerms | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the run, at most `stop_after_steps`."""
        steps = self._config.schedule.epochs * self._plan.steps_per_epoch
        return min(steps, self._config.stop_after_steps or steps)

    def _phase(self, epoch: int) -> Phase:
        return phase_at(self._config.schedule, epoch)

    def step(self, batch: Batch, state: RunState) -> NonFiniteFlags:
        """Forward, losses and backward for each micro-batch, then the update."""
        phase, num = self._phase(batch.epoch), len(batch.samples)
        size = num // self._config.engine.accumulation
        was_filling = not self.model.queue.is_full
        done = [
            self._part(batch, slice(start, start + size), phase, state.step)
            for start in range(0, num, size)
        ]
        if was_filling:
            self.model.queue.recount()
        parts = [terms for terms, _ in done]
        self._latest = _mean_terms(parts)
        every = [{**part.terms, "total": part.total.detach()} for part in parts]
        return NonFiniteFlags.of(
            {name: torch.stack([terms[name] for terms in every]) for name in every[0]},
            torch.cat([bad for _, bad in done]),
            skipped=self.engine.skipped,
            step=state.step,
            batch=batch,
        )

    def _part(self, batch: Batch, part: slice, phase: Phase, step: int) -> tuple[LossTerms, Tensor]:
        """The loss terms of a micro-batch, and which samples' embeddings are not finite."""
        config, samples = self._config, batch.samples[part]
        orders = [
            # From pinned memory; otherwise the copy would wait for the device.
            (order.pin_memory() if self._device.type == "cuda" else order).to(
                self._device, non_blocking=True
            )
            for order in self.model.orders(
                samples, batch.epoch, config.seed, config.data.clips.clip_frames
            )
        ]
        long = None if batch.long is None else batch.long[part]
        out = self.engine(batch.short[part], long, *orders, phase)
        health = (step + 1) % config.monitor.health_every == 0
        teacher = None if self._teacher is None else self._teacher.features(batch.short[part])
        terms = self.method.losses(out, phase, with_health=health, teacher=teacher)
        self.engine.step(
            terms.total, lr_factor=phase.lr_factor, frozen=self.model.frozen_groups(phase)
        )
        return terms, ~torch.isfinite(out.instance.detach()).flatten(1).all(1)

    def loader(self, state: RunState) -> TrainLoader:
        """The batches from a position to the last epoch."""
        last = self._config.schedule.epochs
        return self._loader(self._config.data, (state.epoch, last), state.epoch_step)

    def _loader(self, data: DataConfig, epochs: tuple[int, int], start_step: int) -> TrainLoader:
        method = self._config.method
        return TrainLoader(
            self._reader,
            data,
            self._plan,
            world=self._world,
            device=self._device,
            epochs=epochs,
            start_step=start_step,
            recipe=PretrainingRecipe(
                data.clips, lambda epoch: method.wants_long(self._phase(epoch).stage)
            ),
        )

    def check(self, found: Path, saved: RunState, now: RunState) -> None:
        """Data, order and recipe must be the same; other changes are logged."""
        check_same_training(found, saved, now, is_first=self._world.is_first)

    def announce(self, state: RunState) -> None:
        """Log the run plan and the losses at chance level."""
        self.monitor.start(
            step=state.step, total_steps=self.total_steps, data=self._reader.manifest.digest
        )
        config, clips, record = self._config, self._config.data.clips, None
        if self._world.is_first:
            page = describe_run(
                config,
                world=self._world,
                device=self._device,
                reader=self._reader,
                plan=self._plan,
                step=state.step,
                augment_choice=self._augment_choice,
            )
            logger.info("run plan:\n%s", page.text())
            record = page.record
        chance = self.method.chance(config.data.batch_size, clips.clip_frames, clips.long_frames)
        for term, value in chance.items():
            self._metrics.set("strata_loss_chance", value, term=term)
        self._metrics.record(
            "start", step=state.step, chance=chance, plan=record, config=plain(config)
        )

    def count(self, batch: Batch, queue_depth: int) -> None:
        """Add the step to the counters."""
        self.monitor.count(batch, queue_depth)

    def report_due(self, state: RunState) -> bool:
        """Every `monitor.log_every` steps."""
        return state.step % self._config.monitor.log_every == 0

    def report(self, batch: Batch, state: RunState) -> dict[str, str]:
        """Losses, health and times of the steps since the last report."""
        terms = self._latest
        assert terms is not None
        losses = self.method.averaged({**terms.terms, "total": terms.total.detach()})
        health = self.method.averaged(terms.health)
        times, phase = self.clock.interval(), self._phase(batch.epoch)
        self.monitor.report(times, phase.stage)
        self.monitor.health(health)
        self._step_report.write(
            state,
            batch.epoch,
            phase,
            losses=losses,
            health=health,
            times=times,
            grad_norm=self.engine.grad_norm,
        )
        return {
            "loss": f"{losses['total']:.3f}",
            **({"ins": f"{losses['instance']:.3f}"} if "instance" in losses else {}),
            "stage": str(phase.stage),
            "wait": f"{times.data_wait_ratio:.0%}",
        }

    def between_steps(self, state: RunState, beat: Callable[[str], None]) -> None:
        """Measure retrieval if it is due, outside of the interval's times."""
        if self._probe is None or not self._probe.is_due(
            epoch=state.epoch,
            epoch_step=state.epoch_step,
            last_epoch=self._config.schedule.epochs,
        ):
            return
        with self.clock.paused():
            self._probe.report(
                self.model.backbone,
                step=state.step,
                epoch=state.epoch,
                world=self._world,
                device=self._device,
                metrics=self._metrics,
                beat=beat,
            )

    def before_saving(self) -> None:
        """Nothing: rank 0's batch statistics are saved."""

    def dump(self, report: Report) -> None:
        """Write the batch of a step that was not finite, if `engine.dump_bad_batch` asks for it."""
        if not self._config.engine.dump_bad_batch:
            return
        # Only this rank calls this, but a shared cache needs all ranks of a node.
        data = self._config.data
        if data.cache != "none":
            data = dataclasses.replace(data, cache="none", decode="cpu")
        loader = self._loader(data, (report.epoch, report.epoch + 1), report.epoch_step)
        write_bad_batch(loader, report, self._config.run, self._world.rank)

    def close(self) -> None:
        """Stop timing collectives."""
        self.monitor.close()


def open_pretraining(
    config: TrainConfig,
    *,
    world: World,
    device: torch.device,
    reader: ShardReader,
    metrics: Metrics,
    probe: OnlineProbe | None = None,
    teacher: Teacher | None = None,
    lock: FolderLock | None = None,
    augment_choice: AugmentChoice | None = None,
) -> Trainer[Pretraining]:
    """Make a pretraining run at its first step.

    The arguments are those of `Pretraining`; `lock` is that of the run's folder, on rank 0.

    Raises:
        ConfigError: The data set is smaller than a batch, or the device lacks a feature.
    """
    plan = open_plan(reader, config.data, config.seed)
    task = Pretraining(
        config,
        plan,
        world=world,
        device=device,
        reader=reader,
        metrics=metrics,
        probe=probe,
        teacher=teacher,
        augment_choice=augment_choice,
    )
    return Trainer(
        task,
        RunState(
            step=0,
            epoch=0,
            epoch_step=0,
            manifest_digest=reader.manifest.digest,
            plan_digest=plan.digest,
            teacher_digest="" if teacher is None else teacher.digest,
            world_size=world.size,
            config=plain(config),
        ),
        LoopConfig(
            run=config.run,
            total_steps=task.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            checkpoint=config.checkpoint,
            settings="engine",
            restart="Start again with --resume auto",
            timeout_advice="look for a dead rank or a hanging file system, or raise "
            "engine.world_timeout_s",
            max_skipped_steps=config.engine.max_skipped_steps,
            timeout_s=config.engine.world_timeout_s,
            collect_every_steps=config.collect_every_steps,
            title="pretrain",
            progress=config.monitor.progress,
        ),
        keys=reader.keys,
        world=world,
        metrics=metrics,
        lock=lock,
    )


def _mean_terms(parts: list[LossTerms]) -> LossTerms:
    """The mean of loss terms and health over the parts of an accumulated batch."""
    if len(parts) == 1:
        return parts[0]

    def mean(of: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([each[name] for each in of]).mean(0) for name in of[0]}

    return LossTerms(
        total=torch.stack([part.total.detach() for part in parts]).mean(0),
        terms=mean([part.terms for part in parts]),
        health=mean([part.health for part in parts]),
    )
