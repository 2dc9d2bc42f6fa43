"""The driver: it gives tasks to workers, and their results to the shards, until all are done."""

import multiprocessing
import os
import resource
import selectors
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from strata.decoding import Damaged
from strata.errors import ConfigError, FaultKind
from strata.format.schema import NormalForm
from strata.preprocess.parts import Heartbeat, Refused, Rejected, WorkerFailure, receive
from strata.preprocess.progress import Progress
from strata.preprocess.settings import ReadBack, ShardSettings
from strata.preprocess.shard_build import Message, ShardBuild, Waiting
from strata.preprocess.worker import Task, serve

__all__ = ["WorkerError", "drive"]

_SEALERS = 2
"""Threads that hash and sync finished shards; hashing is faster than any disk."""


class WorkerError(RuntimeError):
    """A bug of the program, not a fault of a video; shown with its traceback, and the run ends."""


@dataclass
class _Work:
    build: ShardBuild
    place: int
    task: Task
    num_crashes: int = 0


class _Worker:
    """A worker process and the video that it works on."""

    def __init__(self, form: NormalForm, read_back: ReadBack, damaged: Damaged) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self._heartbeat = Heartbeat()
        self.process: BaseProcess = context.Process(
            target=serve,
            args=(theirs, form, read_back, damaged, self._heartbeat),
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self.work: _Work | None = None
        self.is_heard = False
        """Whether the driver's selector has its connection."""

    @property
    def silent_s(self) -> float:
        """Seconds since the last progress with its video."""
        return time.monotonic() - self._heartbeat.value

    def give(self, work: _Work) -> None:
        self.work = work
        self._heartbeat.value = time.monotonic()
        try:
            self.connection.send(work.task)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It died idle; reading from it raises EOFError, and the driver starts another.

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def drive(builds: Sequence[ShardBuild], settings: ShardSettings, progress: Progress) -> None:
    """Make all shards; after an error only finished ones are left.

    Raises:
        WorkerError: A worker met a bug of the program.
        OSError: The shards cannot be written.
    """
    with ExitStack() as stack:
        driver = _Driver(builds, settings, progress, stack)
        driver.run()


class _Driver:
    """Hands tasks to workers and messages to shards, within a bound on memory.

    Its only work in proportion to the bytes of a video is one copy, done by the kernel; finished
    shards are hashed and synced in other threads.
    """

    def __init__(
        self,
        builds: Sequence[ShardBuild],
        settings: ShardSettings,
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self._settings = settings
        self._progress = progress
        self._waiting = Waiting(settings.buffer_bytes, _room_for_files() // 2)
        self._todo = self._all_work(builds)
        self._retries: deque[_Work] = deque()
        self._workers: list[_Worker] = []
        self._seals: deque[Future[None]] = deque()
        self._next_check_s = 0.0
        # Closed in reverse: first workers stop, then threads, then unfinished shards go.
        for build in builds:
            stack.callback(build.discard)
        self._sealers = ThreadPoolExecutor(_SEALERS, "sealer")
        stack.callback(self._sealers.shutdown, cancel_futures=True)
        self._selector = stack.enter_context(selectors.DefaultSelector())
        stack.callback(self._stop_workers)

    def run(self) -> None:
        """Finish all shards."""
        while True:
            self._hand_out()
            if not any(worker.work for worker in self._workers):
                break
            self._listen()
            while self._seals and self._seals[0].done():
                self._seals.popleft().result()
        for seal in self._seals:
            seal.result()

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _all_work(self, builds: Sequence[ShardBuild]) -> Iterator[_Work]:
        for build in builds:
            for place, task in build.tasks():
                if isinstance(task, Rejected):
                    self._take(build, place, task)
                else:
                    yield _Work(build, place, task)

    def _hand_out(self) -> None:
        """Give every idle worker a task, unless too much already waits for a slow video."""
        while True:
            worker = next((w for w in self._workers if w.work is None), None)
            if worker is None and len(self._workers) == self._settings.num_workers:
                return
            work = self._next_work()
            if work is None:
                return
            if worker is None:
                worker = self._start_worker()
                self._workers.append(worker)
            worker.give(work)

    def _start_worker(self) -> _Worker:
        try:
            settings = self._settings
            return _Worker(settings.form, settings.read_back, settings.damaged)
        except OSError as error:
            raise ConfigError(
                f"worker process {len(self._workers) + 1} cannot be started "
                f"({error.strerror or error}); use fewer --workers, or raise the limits of memory, "
                "processes (ulimit -u) and open files (ulimit -n)"
            ) from error

    def _next_work(self) -> _Work | None:
        # A retry is started even when memory is full: the others may wait for this sample.
        if self._retries:
            return self._retries.popleft()
        return None if self._waiting.is_full else next(self._todo, None)

    def _listen(self) -> None:
        """Take one message from each worker that has one; replace dead and hung workers."""
        full = self._waiting.is_full
        for worker in self._workers:
            # When memory is full, only workers whose messages can be written immediately are read;
            # the others block. The next sample of the first open shard is always one of these.
            work = worker.work
            hear = work is not None and (not full or work.place == work.build.next)
            if hear and not worker.is_heard:
                self._selector.register(worker.connection, selectors.EVENT_READ, worker)
            elif worker.is_heard and not hear:
                self._selector.unregister(worker.connection)
            worker.is_heard = hear
        for key, _ in self._selector.select(timeout=1.0):
            worker: _Worker = key.data
            try:
                message = receive(worker.connection)
            except EOFError:
                self._replace_dead(worker)
                continue
            work = worker.work
            if work is None:
                raise AssertionError("a message from an idle worker")
            if isinstance(message, Refused):
                raise OSError(message.errno, os.strerror(message.errno))
            if isinstance(message, WorkerFailure):
                raise WorkerError(
                    f"{work.build.source_name(work.place)}: a bug of the program, not a fault of "
                    f"the video; finished shards are kept\n{message.trace}"
                )
            if isinstance(message, Rejected) or message.part.num_frames is not None:
                worker.work = None
                # The worker starts its next video while this sample is written.
                if not full and (following := self._next_work()) is not None:
                    worker.give(following)
            self._take(work.build, work.place, message)
        if time.monotonic() > self._next_check_s:
            self._next_check_s = time.monotonic() + min(1.0, self._settings.timeout_s / 4)
            self._progress.tick()
            for worker in list(self._workers):
                self._end_if_hung(worker)

    def _end_if_hung(self, worker: _Worker) -> None:
        if worker.work is None or worker.silent_s < self._settings.timeout_s:
            return
        if worker.connection.poll():
            return  # It has sent a message that is not read yet, so it is not hung.
        detail = f"no packet, frame or segment in {self._settings.timeout_s:.0f} s"
        self._replace(worker, Rejected(FaultKind.TIMEOUT, detail))

    def _replace_dead(self, worker: _Worker) -> None:
        """Replace a dead worker; try its video once more, as something else may have killed it."""
        worker.process.join()
        work = worker.work
        if work is not None and work.num_crashes == 0:
            work.num_crashes += 1
            work.build.forget(work.place, self._waiting)
            self._retries.append(work)
            self._replace(worker, None)
            return
        code = worker.process.exitcode
        self._replace(worker, Rejected(FaultKind.CRASH, f"the codec ended its process ({code})"))

    def _replace(self, worker: _Worker, rejected: Rejected | None) -> None:
        self._workers.remove(worker)
        if worker.is_heard:
            self._selector.unregister(worker.connection)
        worker.stop()
        if rejected is not None and worker.work is not None:
            self._take(worker.work.build, worker.work.place, rejected)

    def _take(self, build: ShardBuild, place: int, message: Message) -> None:
        build.put(place, message, self._waiting)
        if build.is_complete:
            self._seals.append(self._sealers.submit(build.seal))
        if isinstance(message, Rejected):
            name = build.source_name(place)
            self._progress.rejected(name, message.kind.value, message.detail)
            self._progress.done(0)
        elif message.part.num_frames is not None:
            self._progress.done(message.part.num_frames)


def _room_for_files() -> int:
    """Files that this process may have open, after raising the soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return most if soft == resource.RLIM_INFINITY else soft
