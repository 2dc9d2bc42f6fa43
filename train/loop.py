"""One training step, and the loop over steps; nothing else."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from strata.config import dotted, plain
from strata.dataload.faults import Fault, SampleFaultError
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.plan import Plan
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import PretrainingRecipe, open_plan
from strata.distributed import Ballot, World, all_equal, any_true, barrier, lost_peer
from strata.errors import CheckpointError, LostPeerError, NotFiniteError, NotSavedError
from strata.files import FolderLock, open_atomic
from strata.logs import SteadyStream, get_logger
from strata.telemetry.metrics import Metrics
from strata.train.config import TrainConfig
from strata.train.engine import Engine
from strata.train.fast_encoder import arrange_encoder
from strata.train.method.model import VideoModel
from strata.train.method.objective import LossTerms, Method
from strata.train.method.schedules import Phase, phase_at
from strata.train.monitor.clock import Clock
from strata.train.monitor.health import IDENTITY_MASS, graph_in_words
from strata.train.monitor.run_monitor import RunMonitor
from strata.train.representation.online_retrieval import OnlineProbe
from strata.train.run import checkpoint
from strata.train.run.checkpoint import RunState, Saver
from strata.train.run.gc_schedule import StepGarbage
from strata.train.run.non_finite import NonFiniteFlags, Report, mean_terms
from strata.train.run.run_plan import describe_run
from strata.train.run.stop_signals import StopSignals
from strata.train.run.watchdog import Watchdog

__all__ = ["Trainer"]

logger = get_logger(__name__)

_RECIPE = ("method.", "model.", "data.clips.", "data.views.", "data.size", "seed")
"""Settings that a run cannot change when it resumes; changes of others are logged."""
_FREE = (
    *("run", "resume", "stop_after_steps", "plan_only"),
    *("data.shards", "probe.train", "probe.test"),
)


@dataclass
class _Interval:
    """Results of an interval of steps that stay on the device until they are read."""

    latest: LossTerms | None = None
    non_finite: list[NonFiniteFlags] = field(default_factory=list)


class Trainer:
    """A training run: built, resumed if requested, fitted and closed.

    Args:
        config: The run's settings.
        world: This rank and its peers; the process group is formed.
        device: Where to compute.
        reader: The opened data set.
        metrics: Receives the metrics.
        probe: Measures retrieval of the encoder between epochs.
        lock: The lock of the run's folder, on rank 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World,
        device: torch.device,
        reader: ShardReader,
        metrics: Metrics,
        probe: OnlineProbe | None = None,
        lock: FolderLock | None = None,
    ) -> None:
        self.config, self.world, self.device = config, world, device
        self.reader, self.metrics, self.probe, self._lock = reader, metrics, probe, lock
        self.plan: Plan = open_plan(reader, config.data, config.seed)
        torch.manual_seed(config.seed)
        self.model = VideoModel(config.model, config.method, config.data.clips.clip_frames)
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
        self.state = RunState(
            step=0,
            epoch=0,
            epoch_step=0,
            manifest_digest=reader.manifest.digest,
            plan_digest=self.plan.digest,
            world_size=world.size,
            config=plain(config),
        )
        self._progress: Any = None
        self._clock = Clock(device)
        self.monitor = RunMonitor(
            config, world=world, device=device, metrics=metrics, clock=self._clock
        )
        self.engine.watch_averaging(self._clock.communication)
        self.engine.watch_update(self._clock.optimizer)
        self._garbage = StepGarbage(config.collect_every_steps)
        self._faulty: set[int] = set()
        self._saver = Saver(config.run, config.checkpoint)
        self._seen_skipped = 0
        self._failed_saves, self._blocked_s, self._stopped = 0, 0.0, False
        self._graph_is_identity: bool | None = None

    @property
    def total_steps(self) -> int:
        """Number of steps of the run, at most `stop_after_steps`."""
        steps = self.config.schedule.epochs * self.plan.steps_per_epoch
        return min(steps, self.config.stop_after_steps or steps)

    def resume(self) -> None:
        """Resume from the newest complete checkpoint, if the config requests it.

        Raises:
            CheckpointError: There is one but resume is off, or it belongs to other data.
        """
        found = checkpoint.find_checkpoint(self.config.run)
        all_equal("newest checkpoint", "none" if found is None else found.name)
        if found is None:
            return
        if self.config.resume == "never":
            raise CheckpointError(
                f"{self.config.run} already holds {found.name}; add --resume auto to resume, or "
                "choose another --run"
            )
        state = checkpoint.restore(self.engine, self.model, found)
        for name in ("manifest_digest", "plan_digest"):
            mine, theirs = getattr(self.state, name), getattr(state, name)
            if mine != theirs:
                raise CheckpointError(
                    f"{found} was trained on other data or in another order ({name} {theirs}, now "
                    f"{mine}); use the same shards, batch size and seed, or another --run"
                )
        self._compare_recipes(found, state.config)
        self.state = dataclasses.replace(
            state, world_size=self.world.size, config=plain(self.config)
        )
        logger.info("resumed %s at step %d", found, state.step)

    def _compare_recipes(self, found: Path, saved: dict[str, Any]) -> None:
        """Reject a changed recipe, and log all other settings that have changed.

        Raises:
            CheckpointError: The method, the model or the views have changed.
        """
        before, now = dotted(saved), dotted(plain(self.config))
        for name in sorted(before.keys() & now.keys()):
            # A list from JSON and a tuple from YAML are the same setting.
            old, new = (json.loads(json.dumps(each[name])) for each in (before, now))
            if old == new or name in _FREE:
                continue
            if name.startswith(_RECIPE):
                raise CheckpointError(
                    f"{found} was trained with {name} {old}, now it is {new}: another recipe; set "
                    f"--{name} as it was, or choose another --run"
                )
            if self.world.is_first:
                logger.warning("%s was %s before and is %s from here on", name, old, new)

    def fit(self) -> bool:
        """Train from the current position to the end or to a signal that requests a stop.

        Returns:
            Whether the end was reached; otherwise a checkpoint has the position.

        Raises:
            LostPeerError: Another rank has died.
            NotSavedError: A checkpoint could not be written, twice or for the first time.
        """
        self._announce()
        schedule = self.config.schedule
        loader = TrainLoader(
            self.reader,
            self.config.data,
            self.plan,
            world=self.world,
            device=self.device,
            epochs=(self.state.epoch, schedule.epochs),
            start_step=self.state.epoch_step,
            recipe=self._recipe(),
        )
        limit_s = self.config.engine.world_timeout_s
        advice = "look for a dead rank or a hanging file system, or raise engine.world_timeout_s"
        try:
            with loader, StopSignals() as stop, Watchdog(limit_s, advice) as watchdog:
                self._steps(loader, stop, watchdog)
                self._clock.progress.enter("end")
                watchdog.beat("writing the last checkpoint")
                self._finish_saving()
                watchdog.beat("waiting for the other ranks")
                barrier()
        except SampleFaultError as error:
            self._record_faults(error.faults)
            raise
        except RuntimeError as error:
            if not lost_peer(error):
                raise
            raise LostPeerError(
                f"another rank was lost in step {self.state.step + 1} or does not respond "
                f"({str(error).splitlines()[0]}); see its own message. Start again with "
                "--resume auto"
            ) from error
        finally:
            self._garbage.close()
            self._saver.close()
            self.monitor.close()
            if self._progress is not None:
                self._progress.close()
        if self._stopped:
            self.metrics.record("stopped", step=self.state.step)
        return not self._stopped

    def _recipe(self) -> PretrainingRecipe:
        schedule, method = self.config.schedule, self.config.method
        return PretrainingRecipe(
            self.config.data.clips, lambda e: method.wants_long(phase_at(schedule, e).stage)
        )

    def _steps(self, loader: TrainLoader, stop: StopSignals, watchdog: Watchdog) -> None:
        """Train until the end or until a rank gets a stop signal, then start the last save."""
        config, ballot = self.config, Ballot(self.config.engine.world_timeout_s)
        clock, interval = self._clock, _Interval()
        last_saved, batches = self.state.step, iter(loader)
        clock.interval()
        # Also after a resume: the previous process may have stopped before this measurement.
        self._probe(watchdog)
        while self.state.step < self.total_steps and not self._stopped:
            clock.waiting()
            watchdog.beat(f"waiting for the batch of step {self.state.step + 1}")
            batch = next(batches)
            clock.data_arrived()
            watchdog.beat(f"computing step {self.state.step + 1}")
            self._record_faults(batch.faults)
            self.model.train()
            interval.latest, flags = self.step(batch)
            interval.non_finite.append(flags)
            clock.step_done()
            self._advance()
            self.monitor.count(batch, loader.queue_depth)
            if self._progress is not None:
                self._progress.update()
            # Also read before saving, so that weights that are not finite are never saved.
            if self._due(config.monitor.log_every) or self._save_due():
                self._report(interval, clock, batch)
                interval = _Interval()
            wrong = self._look_after_save()
            with clock.communication():
                self._stopped, lost = ballot.vote(stop.received is not None, wrong is not None)
            if lost:
                raise wrong or NotSavedError("rank 0 could not write a checkpoint; see its message")
            if self._save_due() and not self._stopped:
                with clock.checkpoint():
                    self.save()
                last_saved = self.state.step
            if not self._stopped:
                self._probe(watchdog)
        if last_saved != self.state.step:
            self.save()

    def step(self, batch: Batch) -> tuple[LossTerms, NonFiniteFlags]:
        """One training step: forward, losses and backward for each micro-batch, then update."""
        phase = phase_at(self.config.schedule, batch.epoch)
        size = len(batch.samples) // self.config.engine.accumulation
        parts: list[LossTerms] = []
        bad_samples: list[Tensor] = []
        was_filling = not self.model.queue.is_full
        for start in range(0, len(batch.samples), size):
            part = slice(start, start + size)
            terms, bad = self._part(batch, part, phase)
            parts.append(terms)
            bad_samples.append(bad)
        if was_filling:
            self.model.queue.recount()
        flags = NonFiniteFlags.of(
            parts,
            bad_samples,
            skipped=self.engine.skipped,
            step=self.state.step,
            batch=batch,
        )
        return mean_terms(parts), flags

    def _part(self, batch: Batch, part: slice, phase: Phase) -> tuple[LossTerms, Tensor]:
        config, samples = self.config, batch.samples[part]
        orders = [
            # From pinned memory; otherwise the copy would wait for the device.
            (order.pin_memory() if self.device.type == "cuda" else order).to(
                self.device, non_blocking=True
            )
            for order in self.model.orders(
                samples, batch.epoch, config.seed, config.data.clips.clip_frames
            )
        ]
        long = None if batch.long is None else batch.long[part]
        out = self.engine(batch.short[part], long, *orders, phase)
        health = (self.state.step + 1) % config.monitor.health_every == 0
        terms = self.method.losses(out, phase, with_health=health)
        self.engine.step(
            terms.total, lr_factor=phase.lr_factor, frozen=self.model.frozen_groups(phase)
        )
        bad = ~torch.isfinite(out.instance.detach()).flatten(1).all(1)
        return terms, bad

    def _judge(self, non_finite: Sequence[NonFiniteFlags]) -> None:
        """Count and report the skipped steps; end the run if there are too many.

        Raises:
            NotFiniteError: More than `engine.max_skipped_steps` were skipped.
        """
        new = self.engine.num_skipped() - self._seen_skipped
        if new == 0:
            return
        self._seen_skipped += new
        self.metrics.add("strata_skipped_steps_total", new)
        self.state = dataclasses.replace(self.state, num_skipped=self.state.num_skipped + new)
        reports = [
            Report.gathered(flags, self.world.rank, self.reader.keys)
            for flags in non_finite
            if bool(flags.skipped)
        ]
        for report in reports:
            self.metrics.record("skipped_step", **dataclasses.asdict(report))
            logger.warning("%s; the step was skipped", report)
            if self.config.engine.dump_bad_batch and report.concerns(self.world.rank):
                self._dump(report)
        budget = self.config.engine.max_skipped_steps
        if self.state.num_skipped > budget:
            raise NotFiniteError(
                f"{reports[0]}; {self.state.num_skipped} steps were skipped, "
                f"engine.max_skipped_steps is {budget}. Resume from the last checkpoint with a "
                "smaller --engine.learning_rate, with --engine.grad_clip 1 or with more "
                "--engine.max_skipped_steps"
            )

    def _dump(self, report: Report) -> None:
        """Make the rank's batch again, which is deterministic, and write it to a file."""
        # Only this rank calls this, but a shared cache needs all ranks of a node.
        data = self.config.data
        if data.cache != "none":
            data = dataclasses.replace(data, cache="none", decode="cpu")
        loader = TrainLoader(
            self.reader,
            data,
            self.plan,
            world=self.world,
            device=self.device,
            epochs=(report.epoch, report.epoch + 1),
            start_step=report.epoch_step,
            recipe=self._recipe(),
        )
        with loader:
            batch = next(iter(loader))
        folder = self.config.run / "bad-batches"
        path = folder / f"step-{report.step:09d}-rank-{self.world.rank}.safetensors"
        tensors = {"short": batch.short, "samples": torch.from_numpy(batch.samples)}
        if batch.long is not None:
            tensors["long"] = batch.long
        try:
            folder.mkdir(exist_ok=True)
            with open_atomic(path, sync=False) as out:
                save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, out.name)
        except (OSError, SafetensorError) as error:
            logger.warning("the batch of rank %d cannot be written: %s", self.world.rank, error)
            return
        logger.warning("the batch of rank %d is in %s", self.world.rank, path)

    def _probe(self, watchdog: Watchdog) -> None:
        """Measure retrieval if it is due, outside of the interval's times."""
        state, last = self.state, self.config.schedule.epochs
        if self.probe is None or not self.probe.is_due(
            epoch=state.epoch, epoch_step=state.epoch_step, last_epoch=last
        ):
            return
        with self._clock.paused():
            self.probe.report(
                self.model.backbone,
                step=state.step,
                epoch=state.epoch,
                world=self.world,
                device=self.device,
                metrics=self.metrics,
                beat=watchdog.beat,
            )

    def save(self) -> None:
        """Copy the state; rank 0 writes it while training continues. All ranks call it."""
        start = time.perf_counter()
        snapshot = self.engine.snapshot(keep=self.world.is_first)
        if self.world.is_first:
            state = dataclasses.replace(self.state, loss_scale=dict(snapshot.loss_scale))
            self._saver.begin(snapshot, state)
        self._blocked_s = time.perf_counter() - start
        self.metrics.set("strata_checkpoint_blocked_seconds", self._blocked_s)

    def _look_after_save(self) -> NotSavedError | None:
        """Report a written checkpoint; return the error if the run cannot continue.

        One periodic save may fail while an older checkpoint stays: the next is the second attempt.
        """
        if self._lock is not None and self._lock.lost:
            return NotSavedError(
                f"{self.config.run} was taken over by another process while this one was stopped "
                f"for more than {FolderLock.STALE_S:.0f} s; nothing more is written there"
            )
        try:
            written = self._saver.take()
        except NotSavedError as error:
            self._failed_saves += 1
            self.metrics.record("checkpoint_failed", step=self.state.step, reason=str(error))
            if self._failed_saves > 1 or checkpoint.find_checkpoint(self.config.run) is None:
                return error
            logger.warning("%s. The run continues and tries again at the next checkpoint", error)
            return None
        if written is not None:
            self._record_save(written)
        return None

    def _record_save(self, written: checkpoint.Written) -> None:
        self._failed_saves = 0
        self.metrics.set("strata_checkpoint_duration_seconds", written.took_s)
        self.metrics.set("strata_checkpoint_last_success_timestamp_seconds", time.time())
        self.metrics.record(
            "checkpoint",
            step=written.step,
            path=str(written.path),
            took_s=written.took_s,
            blocked_s=self._blocked_s,
        )

    def _finish_saving(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            NotSavedError: It could not be written.
        """
        wrong = None
        try:
            written = self._saver.finish()
            if written is not None:
                self._record_save(written)
        except NotSavedError as error:
            wrong = error
        if any_true(wrong is not None, self.device):
            raise wrong or NotSavedError("rank 0 could not write a checkpoint; see its message")

    def _announce(self) -> None:
        config, plan = self.config, None
        if self.world.is_first:
            page = describe_run(
                config,
                world=self.world,
                device=self.device,
                reader=self.reader,
                plan=self.plan,
                step=self.state.step,
            )
            logger.info("run plan:\n%s", page.text())
            plan = page.record
        clips = config.data.clips
        chance = self.method.chance(config.data.batch_size, clips.clip_frames, clips.long_frames)
        for term, value in chance.items():
            self.metrics.set("strata_loss_chance", value, term=term)
        self.metrics.record(
            "start", step=self.state.step, chance=chance, plan=plan, config=plain(config)
        )
        if self.world.is_first and config.monitor.progress:
            self._progress = tqdm(
                total=self.total_steps,
                initial=self.state.step,
                unit="step",
                desc="pretrain",
                file=SteadyStream(),
            )

    def _advance(self) -> None:
        state, last = self.state, self.state.epoch_step + 1 == self.plan.steps_per_epoch
        self.state = dataclasses.replace(
            state,
            step=state.step + 1,
            epoch=state.epoch + last,
            epoch_step=0 if last else state.epoch_step + 1,
        )
        self._garbage.step_done(self.state.step)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def _save_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        return self.state.step % every == 0 if every else self.state.epoch_step == 0

    def _say_graph(self, health: Mapping[str, float], phase: Phase) -> None:
        """Log when the graph becomes the identity or stops being it."""
        mass = health.get("graph_off_diagonal_mass")
        used = any(n.startswith("graph_") for n in self.config.method.active(phase.stage))
        if mass is None or not used or not self.world.is_first:
            return
        is_identity = mass < IDENTITY_MASS
        if is_identity != self._graph_is_identity:
            self._graph_is_identity = is_identity
            logger.info("step %d: %s", self.state.step, graph_in_words(mass))

    def _record_faults(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if fault.sample not in self._faulty:
                self._faulty.add(fault.sample)
                self.metrics.add("strata_decode_faults_total", 1)
                self.metrics.record("fault", step=self.state.step, **dataclasses.asdict(fault))

    def _report(self, interval: _Interval, clock: Clock, batch: Batch) -> None:
        """Read the interval's metrics from the device; besides saving, the only wait for it."""
        terms = interval.latest
        assert terms is not None
        self._judge(interval.non_finite)
        losses = self.method.averaged({**terms.terms, "total": terms.total.detach()})
        health = self.method.averaged(terms.health)
        times = clock.interval()
        phase = phase_at(self.config.schedule, batch.epoch)
        rate = self.config.engine.learning_rate * phase.lr_factor
        samples_per_s = times.rate(self.config.data.batch_size)
        metrics = self.metrics
        for term, value in losses.items():
            metrics.set("strata_loss", value, term=term)
        for measure, value in health.items():
            metrics.set("strata_health", value, measure=measure)
        self._say_graph(health, phase)
        metrics.set("strata_learning_rate", rate)
        metrics.set("strata_stage", phase.stage)
        metrics.set("strata_epoch", batch.epoch)
        metrics.set("strata_step", self.state.step)
        self.monitor.report(times, phase.stage)
        metrics.set("strata_samples_per_second", samples_per_s)
        grad_norm = self.engine.grad_norm
        if grad_norm is not None:
            metrics.set("strata_grad_norm", grad_norm)
        metrics.record(
            "step",
            step=self.state.step,
            epoch=batch.epoch,
            stage=phase.stage,
            # JSON has no NaN, which is the value if the last step was skipped.
            losses={k: v if math.isfinite(v) else None for k, v in losses.items()},
            health={k: v if math.isfinite(v) else None for k, v in health.items()},
            learning_rate=rate,
            grad_norm=grad_norm,
            samples_per_second=samples_per_s,
            data_wait_ratio=times.data_wait_ratio,
        )
        if self._progress is not None:
            shown = {"loss": f"{losses['total']:.3f}", "ins": f"{losses['instance']:.3f}"}
            shown |= {"stage": str(phase.stage), "wait": f"{times.data_wait_ratio:.0%}"}
            self._progress.set_postfix(shown, refresh=False)
