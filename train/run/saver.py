"""Saving of a run: when its state is written, by a thread, and what a failure means.

The state is copied to the host's memory between two steps (all ranks take part), and rank 0 writes
the copy in a thread while training continues. Nothing else uses the copy, so the files do not
depend on when it is written.
"""

import dataclasses
import threading
import time
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

__all__ = ["CheckpointThread", "RunSaver", "Written"]

logger = get_logger(__name__)


@dataclass(frozen=True)
class Written:
    """A complete checkpoint."""

    path: Path
    step: int
    took_s: float
    """Seconds from the copy in memory to the pointer on disk."""


class CheckpointThread:
    """Writes the checkpoints of a run, one at a time, in a thread of rank 0.

    Args:
        run: The run's folder.
        config: How many to keep.
    """

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self._run, self._config = run, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: Written | None = None

    def begin(self, snapshot: Snapshot, state: RunState) -> None:
        """Start to write a checkpoint, after waiting for the previous one."""
        self._join()
        self._thread = threading.Thread(
            target=self._work, args=(snapshot, state), name="strata-saver"
        )
        self._thread.start()

    def _work(self, snapshot: Snapshot, state: RunState) -> None:
        start = time.perf_counter()
        try:
            path = write(snapshot, state, self._run, self._config)
            self._written = Written(path, state.step, time.perf_counter() - start)
        except BaseException as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait for the checkpoint that is being written; its failure is not reported."""
        self._join()

    def finish(self) -> Written | None:
        """Wait for the checkpoint that is being written and return its result.

        Raises:
            NotSavedError: It could not be written.
        """
        self._join()
        return self.take()

    def take(self) -> Written | None:
        """The checkpoint written since the last call, if any, without waiting.

        Raises:
            NotSavedError: It could not be written.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        written, self._written = self._written, None
        return written


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
        self._thread = CheckpointThread(run, config)
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
            self._thread.begin(snapshot, state)
        self._last_step = state.step
        self._blocked_s = time.perf_counter() - start
        self._metrics.set("strata_checkpoint_blocked_seconds", self._blocked_s)

    def fault(self, state: RunState) -> NotSavedError | None:
        """Report what was written; return the error if the run cannot continue unsaved."""
        if self._lock is not None and self._lock.lost:
            return NotSavedError(
                f"{self._run} was taken over by another process while this one was stopped for "
                f"more than {FolderLock.STALE_S:.0f} s; nothing more is written there"
            )
        try:
            self._record(self._thread.take())
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
            self._record(self._thread.finish())
        except NotSavedError as error:
            wrong = error
        if any_true(wrong is not None, self._engine.device):
            raise wrong or not_saved_elsewhere()

    def _record(self, written: Written | None) -> None:
        if written is None:
            return
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
        self._thread.close()


def not_saved_elsewhere() -> NotSavedError:
    """The error of the ranks that do not write."""
    return NotSavedError("rank 0 could not write a checkpoint; see its message")
