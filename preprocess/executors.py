"""Executors of tasks, with one interface: processes of this machine, or a Ray cluster.

A task is a function of a module and its arguments, all pickled. Python's own process pools cannot
say which task a dead process had and need /dev/shm, so here each process has a thread of a
`ThreadPoolExecutor`, which hands it one task at a time through a pipe.
"""

import errno
import logging
import multiprocessing
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from strata.errors import ConfigError, StrataError

__all__ = [
    "OUT_OF_MEMORY",
    "Executor",
    "LocalExecutor",
    "Outcome",
    "RayExecutor",
    "WorkerDied",
    "WorkerError",
    "outcome_of",
]

OUT_OF_MEMORY = errno.ENOMEM
"""`WorkerDied.code` of a process that reached its bound of memory."""


class WorkerError(RuntimeError):
    """A bug of the program, not a fault of a video; shown with its traceback, and the run ends."""


@dataclass(frozen=True)
class WorkerDied:
    """The process ended while it had the task."""

    code: int | None
    """Exit code, negative for a signal; `OUT_OF_MEMORY`; None if it is not known."""


Outcome = Any
"""What the task returned, or the error that it raised, or `WorkerDied`."""


def outcome_of(call: Callable[..., Any], arguments: Sequence[Any]) -> Outcome:
    """Run a task in this process; errors that no user can cause keep their traceback."""
    try:
        return call(*arguments)
    except (StrataError, OSError, WorkerError) as error:
        return error
    except MemoryError:
        return WorkerDied(OUT_OF_MEMORY)
    except Exception:  # The boundary of the process: the driver raises it.
        return WorkerError(traceback.format_exc())


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, even inside a hung codec."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _bound_memory(num_bytes: int) -> None:
    """Make allocations of this process fail beyond so many bytes more than it has now.

    Private memory counts, not libraries and files that are only mapped.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    bound = pages * resource.getpagesize() + num_bytes
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY or bound < most:
        resource.setrlimit(resource.RLIMIT_DATA, (bound, most))


def _serve(connection: Connection, memory_bytes: int) -> None:
    """The body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if memory_bytes:
        _bound_memory(memory_bytes)
    try:
        while True:
            connection.send(outcome_of(*connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class LocalExecutor:
    """Processes of this machine, started when there is work for them.

    A context manager, as `RayExecutor`, that cancels what is not finished.

    Args:
        workers: Most processes.
        memory_bytes: Bound of the memory of each beyond what it has at start; 0 for none.
    """

    def __init__(self, workers: int, memory_bytes: int = 0) -> None:
        self.slots = 2 * workers
        """Tasks that are worth having submitted at a time."""
        self._memory_bytes = memory_bytes
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._processes: set[BaseProcess] = set()
        # A start also waits for other children that ended, and would take their exit codes.
        self._lock = threading.Lock()
        self._closed = False

    def submit(
        self, call: Callable[..., Any], arguments: Sequence[Any], *, alone: bool = False
    ) -> "Future[Any]":
        """Queue a task.

        Args:
            call: A function of a module.
            arguments: Its arguments.
            alone: Whether to start a new process for it.

        Returns:
            A future for `outcome`.
        """
        return self._threads.submit(self._run, call, arguments, alone)

    def outcome(self, future: "Future[Any]") -> Outcome:
        """The outcome of a finished task.

        Raises:
            ConfigError: No process can be started.
        """
        return future.result()

    def _run(self, call: Callable[..., Any], arguments: Sequence[Any], alone: bool) -> Outcome:
        own = self._own
        if alone and hasattr(own, "process"):
            own.process.kill()
            self._end()
        if not hasattr(own, "process"):
            own.process, own.connection = self._start()
        try:
            own.connection.send((call, arguments))
            return own.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return WorkerDied(self._end())

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        # Not a daemon, which may have no children: tasks of Ray run in a child of its process.
        process = context.Process(target=_serve, args=(theirs, self._memory_bytes))
        with self._lock, theirs:
            if self._closed:
                raise RuntimeError("a task after the end")
            try:
                process.start()
            except OSError as error:
                raise ConfigError(
                    f"worker process {len(self._processes) + 1} cannot be started "
                    f"({error.strerror or error}); use fewer --workers, or raise the limits of "
                    "memory, processes (ulimit -u) and open files (ulimit -n)"
                ) from error
            self._processes.add(process)
        return process, connection

    def _end(self) -> int | None:
        """Wait for the end of this thread's process; returns its exit code."""
        process: BaseProcess = self._own.process
        with self._lock:
            process.join()
            self._processes.remove(process)
        self._own.connection.close()
        del self._own.process
        return process.exitcode

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()


@cache
def _executor_of_node(memory_bytes: int) -> LocalExecutor:
    return LocalExecutor(1, memory_bytes)


def _run_on_node(
    call: Callable[..., Any], arguments: Sequence[Any], alone: bool, memory_bytes: int
) -> Outcome:
    """Run a task in a child of one of Ray's processes, so that a death has its exit code."""
    executor = _executor_of_node(memory_bytes)
    return executor.submit(call, arguments, alone=alone).result()


class RayExecutor:
    """A Ray cluster: each task takes one CPU of any node.

    Args:
        address: As `ray.init` takes it: `auto` for the cluster that this machine belongs to, a
            host and port, `local` for one that is started here.
        memory_bytes: Bound of the memory of each task, which Ray also reserves; 0 for none.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str, memory_bytes: int = 0) -> None:
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
        self._memory_bytes = memory_bytes
        # Ray runs a task again if its node or process is lost; a second loss is the driver's.
        options = {"num_cpus": 1, "max_retries": 1, "memory": memory_bytes or None}
        self._remote: Any = ray.remote(**options)(_run_on_node)

    @property
    def slots(self) -> int:
        """Two for each CPU; nodes come and go."""
        return 2 * max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def submit(
        self, call: Callable[..., Any], arguments: Sequence[Any], *, alone: bool = False
    ) -> "Future[Any]":
        """Queue a task, as `LocalExecutor.submit`."""
        return self._remote.remote(call, arguments, alone, self._memory_bytes).future()

    def outcome(self, future: "Future[Any]") -> Outcome:
        """The outcome of a finished task.

        Raises:
            ConfigError: A node cannot run the task.
        """
        try:
            return future.result()
        except self._ray.exceptions.RayTaskError as error:
            raise ConfigError(
                f"a node of the cluster cannot run Strata ({error.cause}); install the same "
                "version on all nodes"
            ) from error
        except self._ray.exceptions.RayError:
            return WorkerDied(None)

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()  # Ends the processes of this job on all nodes.


Executor = LocalExecutor | RayExecutor
