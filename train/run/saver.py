"""Saving of a run: when its state is written, by a thread, and what a failure means.

The state is copied to the host's memory between two steps (all ranks take part), and rank 0 writes
the copy in a thread while training continues. Nothing else uses the copy, so the files do not
depend on when it is written.
"""

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from strata.distributed import any_true
from strata.errors import NotSavedError
from strata.files import FolderLock
from strata.logs import get_logger
from strata.telemetry.metrics import Metrics
from strata.train.engine import Engine
from strata.train.engine_state import Snapshot
from strata.train.run.checkpoint import CheckpointConfig, RunState, find_checkpoint, write

__all__ = ["RunSaver"]

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Written:
    """A complete checkpoint."""

    path: Path
    step: int
    took_s: float
    """Seconds from the copy in memory to the pointer on disk."""


class RunSaver:
    """Saves the state of a run while it continues, and ends a run that cannot be saved.

    One periodic save may fail while an older checkpoint stays: the next is the second attempt.

    Args:
        run: The run's folder.
        config: When checkpoints are written and how many are kept.
        engine: Whose state is saved.
        is_first: Whether this rank writes.
        metrics: Receives times and failures.
        lock: The lock of the run's folder, on the rank that writes.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        engine: Engine,
        *,
        is_first: bool,
        metrics: Metrics,
        lock: FolderLock | None,
    ) -> None:
        self._run, self._config, self._engine = run, config, engine
        self._is_first, self._metrics, self._lock = is_first, metrics, lock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="strata-saver")
        self._writing: list[Future[_Written]] = []
        """Checkpoints whose result is not recorded yet; at most the last is being written."""
        self._num_failed, self._blocked_s = 0, 0.0
        self._last_step: int | None = None

    def is_due(self, state: RunState) -> bool:
        """Whether a checkpoint is due after the step that led to this state."""
        every = self._config.every_steps
        return state.step % every == 0 if every else state.epoch_step == 0

    def has(self, state: RunState) -> bool:
        """Whether this was the last state to be saved."""
        return self._last_step == state.step

    def save(self, state: RunState) -> None:
        """Copy the state; rank 0 writes it while training continues. All ranks call it."""
        start = time.perf_counter()
        snapshot = self._engine.state.snapshot(keep=self._is_first)
        if self._is_first:
            state = dataclasses.replace(state, loss_scale=dict(snapshot.loss_scale))
            wait(self._writing)
            self._writing.append(self._pool.submit(self._write, snapshot, state))
        self._last_step = state.step
        self._blocked_s = time.perf_counter() - start
        self._metrics.set("strata_checkpoint_blocked_seconds", self._blocked_s)

    def _write(self, snapshot: Snapshot, state: RunState) -> _Written:
        start = time.perf_counter()
        path = write(snapshot, state, self._run, self._config)
        return _Written(path, state.step, time.perf_counter() - start)

    def fault(self, state: RunState) -> NotSavedError | None:
        """Report what was written; return the error if the run cannot continue unsaved."""
        if self._lock is not None and self._lock.lost:
            return NotSavedError(
                f"{self._run} was taken over by another process while this one was stopped for "
                f"more than {FolderLock.STALE_S:.0f} s; nothing more is written there"
            )
        try:
            self._record_written()
        except NotSavedError as error:
            self._num_failed += 1
            self._metrics.add("strata_checkpoint_failures_total", 1)
            self._metrics.record("checkpoint_failed", step=state.step, reason=str(error))
            if self._num_failed > 1 or find_checkpoint(self._run) is None:
                return error
            logger.warning("%s. The run continues and tries again at the next checkpoint", error)
        return None

    def finish(self) -> None:
        """Wait until the last checkpoint is complete. All ranks call it.

        Raises:
            NotSavedError: It could not be written.
        """
        wrong = None
        try:
            wait(self._writing)
            self._record_written()
        except NotSavedError as error:
            wrong = error
        if any_true(wrong is not None, self._engine.device):
            raise wrong or not_saved_elsewhere()

    def _record_written(self) -> None:
        """Record the checkpoints that are complete by now.

        Raises:
            NotSavedError: One could not be written.
        """
        while self._writing and self._writing[0].done():
            written = self._writing.pop(0).result()
            self._num_failed = 0
            self._metrics.set("strata_checkpoint_duration_seconds", written.took_s)
            self._metrics.set("strata_checkpoint_last_success_timestamp_seconds", time.time())
            self._metrics.record(
                "checkpoint",
                step=written.step,
                path=str(written.path),
                took_s=written.took_s,
                blocked_s=self._blocked_s,
            )

    def close(self) -> None:
        """Wait for the thread; its failure is not reported."""
        self._pool.shutdown()


def not_saved_elsewhere() -> NotSavedError:
    """The error of the ranks that do not write."""
    return NotSavedError("rank 0 could not write a checkpoint; see its message")
