"""The loop over the steps of a training; pretraining and classifiers are tasks of the same loop."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from tqdm import tqdm

from strata.dataload.faults import Fault, SampleFaultError
from strata.dataload.loader import Batch, TrainLoader
from strata.distributed import Ballot, World, barrier, lost_peer
from strata.errors import LostPeerError
from strata.files import FolderLock
from strata.logs import progress_bar
from strata.telemetry.metrics import Metrics
from strata.train.run.checkpoint import CheckpointConfig, RunState
from strata.train.run.gc_schedule import StepGarbage
from strata.train.run.non_finite import SkippedSteps
from strata.train.run.resume import resume_run
from strata.train.run.saver import RunSaver, not_saved_elsewhere
from strata.train.run.stop_signals import StopSignals
from strata.train.run.watchdog import Watchdog
from strata.train.task import Task

__all__ = ["LoopConfig", "Trainer"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the loop; each task derives them from its own."""

    run: Path
    """The run's folder."""
    total_steps: int
    """Steps of the run, at most those until it is asked to stop."""
    steps_per_epoch: int
    checkpoint: CheckpointConfig
    settings: Literal["engine", "training"]
    """Prefix of the user's settings, for advice."""
    restart: str
    """What the user does after an interruption, for advice."""
    timeout_advice: str
    """What the user does after a run without progress."""
    max_skipped_steps: int
    """Steps of the run that may be skipped because they are not finite."""
    timeout_s: float
    """Seconds without progress after which the process ends."""
    collect_every_steps: int = 100
    """Steps between garbage collections; 0 leaves them to Python."""
    title: str
    """Text of the progress bar."""
    progress: bool = True
    """Whether rank 0 shows a progress bar."""


TaskT = TypeVar("TaskT", bound=Task[Any])


class Trainer(Generic[TaskT]):
    """Runs the steps of a task from a position to the end, or to a signal that asks to stop.

    Args:
        task: What is trained.
        state: Position 0 of the run.
        config: The loop's settings.
        keys: Names of the training samples.
        world: This rank and its peers; the process group is formed.
        metrics: Receives counts, checkpoints and faults.
        lock: The lock of the run's folder, on rank 0.
    """

    def __init__(
        self,
        task: TaskT,
        state: RunState,
        config: LoopConfig,
        *,
        keys: Sequence[str],
        world: World,
        metrics: Metrics,
        lock: FolderLock | None = None,
    ) -> None:
        self.task, self.state, self.config = task, state, config
        self._world, self._metrics = world, metrics
        self.saver = RunSaver(
            config.run,
            config.checkpoint,
            task.engine,
            is_first=world.is_first,
            metrics=metrics,
            lock=lock,
        )
        self._skipped = SkippedSteps(
            task.engine,
            allowed=config.max_skipped_steps,
            keys=keys,
            world=world,
            metrics=metrics,
            settings=config.settings,
            dump=task.dump,
        )
        self._garbage = StepGarbage(config.collect_every_steps)
        self._faulty: set[int] = set()
        self._stopped = False

    def resume(self, mode: Literal["never", "auto"]) -> None:
        """Resume from the newest complete checkpoint, if there is one.

        Raises:
            CheckpointError: There is one but resume is off, or it is of another training.
        """
        self.state = resume_run(
            self.task.engine,
            self.task.model,
            self.config.run,
            self.state,
            mode=mode,
            check=lambda found, saved: self.task.check(found, saved, self.state),
        )

    def fit(self) -> bool:
        """Train from the current position to the end or to a signal that requests a stop.

        Returns:
            Whether the end was reached; otherwise a checkpoint has the position.

        Raises:
            LostPeerError: Another rank has died.
            NotSavedError: A checkpoint could not be written, twice or for the first time.
            NotFiniteError: More steps were skipped than allowed.
        """
        self.task.announce(self.state)
        progress = progress_bar(
            total=self.config.total_steps,
            initial=self.state.step,
            unit="step",
            desc=self.config.title,
            disable=not (self.config.progress and self._world.is_first),
        )
        try:
            with (
                self.task.loader(self.state) as loader,
                StopSignals() as stop,
                Watchdog(self.config.timeout_s, self.config.timeout_advice) as watchdog,
            ):
                self._steps(loader, stop, watchdog, progress)
                self.task.clock.progress.enter("end")
                watchdog.beat("writing the last checkpoint")
                self.saver.finish()
                watchdog.beat("waiting for the other ranks")
                barrier()
                if not self._stopped:
                    self._metrics.finish()
        except SampleFaultError as error:
            self._record_faults(error.faults)
            raise
        except RuntimeError as error:
            if not lost_peer(error):
                raise
            raise LostPeerError(
                f"another rank was lost in step {self.state.step + 1} or does not respond "
                f"({str(error).splitlines()[0]}); see its own message. {self.config.restart}"
            ) from error
        finally:
            self._garbage.close()
            self.saver.close()
            self.task.close()
            progress.close()
        if self._stopped:
            self._metrics.record("stopped", step=self.state.step)
        return not self._stopped

    def _steps(
        self, loader: TrainLoader, stop: StopSignals, watchdog: Watchdog, progress: tqdm
    ) -> None:
        """Train until the end or until a rank gets a stop signal, then start the last save."""
        task, clock, ballot = self.task, self.task.clock, Ballot(self.config.timeout_s)
        first, batches = self.state.step, iter(loader)
        clock.interval()
        # Also after a resume: the previous process may have stopped before this was done.
        task.between_steps(self.state, watchdog.beat)
        while self.state.step < self.config.total_steps and not self._stopped:
            clock.waiting()
            watchdog.beat(f"waiting for the batch of step {self.state.step + 1}")
            batch = next(batches)
            clock.data_arrived()
            watchdog.beat(f"computing step {self.state.step + 1}")
            self._record_faults(batch.faults)
            task.model.train()
            self._skipped.note(task.step(batch, self.state))
            clock.step_done()
            self._advance()
            task.count(batch, loader.queue_depth)
            progress.update()
            # Also read before saving, so that weights that are not finite are never saved.
            if self._report_due():
                self._report(batch, progress)
            wrong = self.saver.fault(self.state)
            with clock.communication():
                self._stopped, lost = ballot.vote(stop.received is not None, wrong is not None)
            if lost:
                raise wrong or not_saved_elsewhere()
            if self.saver.is_due(self.state) and not self._stopped:
                self._save()
            if not self._stopped:
                task.between_steps(self.state, watchdog.beat)
        if self.state.step != first and not self.saver.has(self.state):
            self._save()

    def _advance(self) -> None:
        self.state = self.state.after_step(self.config.steps_per_epoch)
        self._garbage.step_done(self.state.step)

    def _report_due(self) -> bool:
        at_end = self.state.step == self.config.total_steps
        return at_end or self.task.report_due(self.state) or self.saver.is_due(self.state)

    def _report(self, batch: Batch, progress: tqdm) -> None:
        """Read the interval's results from the device; besides saving, the only wait for it."""
        num_skipped = self._skipped.judge(self.state.num_skipped)
        self.state = dataclasses.replace(self.state, num_skipped=num_skipped)
        progress.set_postfix(self.task.report(batch, self.state), refresh=False)

    def _save(self) -> None:
        with self.task.clock.checkpoint():
            self.task.before_saving()
            self.saver.save(self.state)

    def _record_faults(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if fault.sample not in self._faulty:
                self._faulty.add(fault.sample)
                self._metrics.add("strata_decode_faults_total", 1)
                self._metrics.record("fault", step=self.state.step, **dataclasses.asdict(fault))
