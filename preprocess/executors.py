"""Executors of tasks, with one interface: processes of this machine, or a Ray cluster.

A task is a function of a module and one argument, both pickled. A process that dies costs its task
alone. Python's own pools cannot say which task a dead process had and need /dev/shm, so the local
one is made of pipes.
"""

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from strata.errors import ConfigError, StrataError

__all__ = [
    "Died",
    "Executor",
    "Failed",
    "LocalExecutor",
    "Outcome",
    "RayExecutor",
    "WorkerError",
    "run_alone",
]


class WorkerError(RuntimeError):
    """A bug of the program, not a fault of a video; shown with its traceback, and the run ends."""


@dataclass(frozen=True)
class Failed:
    """The task raised an error."""

    error: Exception


@dataclass(frozen=True)
class Died:
    """The process ended while it had the task."""

    code: int | None
    """Exit code, negative for a signal; None if it is not known."""


Outcome = Any
"""What the task returned, or `Failed`, or `Died`."""


class Executor(Protocol):
    """Interface of what runs tasks; a context manager that cancels what is not finished."""

    slots: int
    """Tasks that are worth having submitted at a time."""

    def submit(self, key: int, call: Callable[[Any], Any], argument: Any) -> None:
        """Queue a task."""
        ...

    def results(self, timeout_s: float) -> Sequence[tuple[int, Outcome]]:
        """Wait for finished tasks; returns their keys and outcomes, in any order, or nothing."""
        ...

    def __enter__(self) -> "Executor": ...

    def __exit__(self, *_: object) -> None: ...


def outcome_of(call: Callable[[Any], Any], argument: Any) -> Outcome:
    """Run a task in this process; errors that no user can cause keep their traceback."""
    try:
        return call(argument)
    except (StrataError, OSError, WorkerError) as error:
        return Failed(error)
    except Exception:  # The boundary of the process: the driver raises it.
        return Failed(WorkerError(traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, even inside a hung codec."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(connection: Connection) -> None:
    """The body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            connection.send(outcome_of(*connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class _Worker:
    """A worker process and the key of its task."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        # Not a daemon, which could not start a process for a video that kills its own.
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()
        self.key: int | None = None

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class LocalExecutor:
    """Processes of this machine, started when there is work for them.

    Args:
        workers: Most processes.
    """

    def __init__(self, workers: int) -> None:
        self.slots = 2 * workers
        self._most = workers
        self._queue: deque[tuple[int, Callable[[Any], Any], Any]] = deque()
        self._workers: list[_Worker] = []

    def submit(self, key: int, call: Callable[[Any], Any], argument: Any) -> None:
        """Queue a task.

        Raises:
            ConfigError: A process cannot be started.
        """
        self._queue.append((key, call, argument))
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queue:
            worker = next((w for w in self._workers if w.key is None), None)
            if worker is None:
                if len(self._workers) == self._most:
                    return
                worker = self._start()
                self._workers.append(worker)
            worker.key, *task = self._queue.popleft()
            try:
                worker.connection.send(task)
            except (BrokenPipeError, ConnectionResetError):
                pass  # It died idle; reading from it raises EOFError.

    def _start(self) -> _Worker:
        try:
            return _Worker()
        except OSError as error:
            raise ConfigError(
                f"worker process {len(self._workers) + 1} cannot be started "
                f"({error.strerror or error}); use fewer --workers, or raise the limits of memory, "
                "processes (ulimit -u) and open files (ulimit -n)"
            ) from error

    def results(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        """Wait for finished tasks."""
        busy = {w.connection: w for w in self._workers if w.key is not None}
        found: list[tuple[int, Outcome]] = []
        for connection in wait(list(busy), timeout_s):
            worker = busy[connection]  # pyright: ignore[reportArgumentType]
            key, worker.key = worker.key, None
            try:
                outcome = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                outcome = Died(worker.process.exitcode)
                self._workers.remove(worker)
                worker.stop()
            if key is not None:
                found.append((key, outcome))
        self._hand_out()
        return found

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()


class RayExecutor:
    """A Ray cluster: each task takes one CPU of any node.

    Args:
        address: As `ray.init` takes it: `auto` for the cluster that this machine belongs to, a
            host and port, `local` for one that is started here.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        # Ray would report its use to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "--executor ray needs the package ray: pip install 'strata-video[ray]', on all "
                "nodes of the cluster"
            ) from error
        self._ray: Any = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster at {address} ({error}); start one with `ray start --head`, or "
                "correct --ray_address"
            ) from error
        self.slots = self._two_for_each_cpu()
        # Ray runs a task again if its node or process is lost; a second loss is the driver's.
        self._remote: Any = ray.remote(num_cpus=1, max_retries=1)(outcome_of)
        self._pending: dict[Any, int] = {}

    def _two_for_each_cpu(self) -> int:
        return 2 * max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def submit(self, key: int, call: Callable[[Any], Any], argument: Any) -> None:
        """Queue a task."""
        self._pending[self._remote.remote(call, argument)] = key

    def results(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        """Wait for finished tasks.

        Raises:
            ConfigError: A node cannot run the task.
        """
        self.slots = self._two_for_each_cpu()  # Nodes come and go.
        self._ray.wait(list(self._pending), timeout=timeout_s)
        ready, _ = self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        return [(self._pending.pop(reference), self._outcome(reference)) for reference in ready]

    def _outcome(self, reference: Any) -> Outcome:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise ConfigError(
                f"a node of the cluster cannot run Strata ({error.cause}); install the same "
                "version on all nodes"
            ) from error
        except self._ray.exceptions.RayError:
            return Died(None)

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._pending:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()


def run_alone(call: Callable[[Any], Any], argument: Any) -> Outcome:
    """Run a task in a process of its own and wait for it."""
    with LocalExecutor(1) as executor:
        executor.submit(0, call, argument)
        while not (found := executor.results(60.0)):
            continue
    return found[0][1]
