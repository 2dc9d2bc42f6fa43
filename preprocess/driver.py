"""The driver's loop: tasks to workers, what they make to shards, faults to their videos."""

import dataclasses
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
from pathlib import Path

from strata.decoding import Damaged
from strata.errors import ConfigError, FaultKind
from strata.files import write_atomic
from strata.format.manifest import canonical_json
from strata.format.schema import NO_LABEL, NormalForm, ShardEntry, SourceRow
from strata.preprocess.datasets.folder import Source, sample_key
from strata.preprocess.parts import Heartbeat, Refused, Rejected, Sent, WorkerFailure, receive
from strata.preprocess.progress import Progress
from strata.preprocess.settings import ReadBack, ShardSettings
from strata.preprocess.shards import ShardWriter, shard_name
from strata.preprocess.worker import Task, serve

__all__ = ["ShardBuild", "ShardRecord", "WorkerError", "drive", "record_path", "task_of"]

_SEALERS = 2
"""Threads that hash and sync finished shards; hashing is faster than any disk."""


class WorkerError(RuntimeError):
    """The program is at fault, not a video; shown with its traceback, and the run ends."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What is kept of a finished shard until the manifest is written."""

    plan: str
    """Digest of the plan that it belongs to."""
    entry: ShardEntry | None
    """None if all its videos were rejected."""
    rows: tuple[SourceRow, ...]


def record_path(progress_folder: Path, index: int) -> Path:
    """Where the record of a finished shard is."""
    return progress_folder / f"{shard_name(index)}.json"


Message = Sent | Rejected


@dataclass
class _Waiting:
    """What the driver holds for samples whose turn has not come."""

    most_bytes: int
    most_parts: int
    num_bytes: int = 0
    num_parts: int = 0

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= self.most_bytes or self.num_parts >= self.most_parts

    def add(self, message: Message) -> None:
        if isinstance(message, Sent):
            self.num_bytes += message.part.num_bytes
            self.num_parts += 1

    def remove(self, message: Message) -> None:
        if isinstance(message, Sent):
            self.num_bytes -= message.part.num_bytes
            self.num_parts -= 1


def task_of(source: Source, classes: Sequence[str]) -> Task:
    """What a worker has to do for a source that is on the disk."""
    if source.path is None:
        raise AssertionError(f"{source.name} is not on disk")
    return Task(
        path=source.path,
        name=source.name,
        file_name=source.file or source.name,
        key=sample_key(source.name),
        label=source.label,
        class_name=classes[source.label] if source.label != NO_LABEL else None,
    )


class ShardBuild:
    """One shard under way: takes messages in any order, writes samples in the plan's order.

    Args:
        folder: Where the shard goes.
        progress_folder: Where its record goes.
        index: Its number.
        sources: Its videos in the plan's order.
        classes: Class names by label.
        plan_digest: Of the plan, for the record.
        slice_name: For the temporary name.
    """

    def __init__(
        self,
        folder: Path,
        progress_folder: Path,
        index: int,
        sources: Sequence[Source],
        classes: Sequence[str],
        *,
        plan_digest: str,
        slice_name: str,
    ) -> None:
        self.index = index
        self._plan_digest = plan_digest
        self._slice_name = slice_name
        self._folder = folder
        self._progress_folder = progress_folder
        self._sources = sources
        self._classes = classes
        self._next = 0
        self._waiting: dict[int, list[Message]] = {}
        self._rows: list[SourceRow] = []
        self._num_frames = 0
        self._writer: ShardWriter | None = None

    @property
    def next(self) -> int:
        """The place whose messages are written at once."""
        return self._next

    @property
    def is_complete(self) -> bool:
        """Whether all its samples are there, so that it can be sealed."""
        return self._next == len(self._sources)

    def source_name(self, place: int) -> str:
        """The source at a place."""
        return self._sources[place].name

    def tasks(self) -> Iterator[tuple[int, Task | Rejected]]:
        """Places and what is to do there."""
        for place, source in enumerate(self._sources):
            if source.fault is not None:
                yield place, Rejected(*source.fault)
            else:
                yield place, task_of(source, self._classes)

    def forget(self, place: int, waiting: _Waiting) -> None:
        """Drop what a worker sent for a place before it died."""
        if place == self._next and self._writer is not None:
            self._writer.drop_sample()
        for message in self._waiting.pop(place, []):
            waiting.remove(message)
            _close(message)

    def put(self, place: int, message: Message, waiting: _Waiting) -> None:
        """Take a message for a place; what waited for it goes too."""
        if place != self._next:
            self._waiting.setdefault(place, []).append(message)
            waiting.add(message)
            return
        self._apply(message)
        while self._next in self._waiting:
            place = self._next
            for message in self._waiting.pop(place):
                waiting.remove(message)
                self._apply(message)
            if self._next == place:
                break  # The rest of this sample is still to come.

    def _apply(self, message: Message) -> None:
        source = self._sources[self._next]
        match message:
            case Sent(part=part):
                if self._writer is None:
                    self._writer = ShardWriter(self._folder, self.index, tag=self._slice_name)
                    self._writer.begin_sample()
                try:
                    self._writer.add(part.members, message.descriptor, part.num_bytes)
                finally:
                    message.close()
                if part.num_frames is None:
                    return
                position = self._writer.num_samples
                self._writer.end_sample()
                self._num_frames += part.num_frames
                row = SourceRow(
                    source=source.name,
                    status="written",
                    key=part.members[0][0].partition(".")[0],
                    label=source.label,
                    num_frames=part.num_frames,
                    position=position,
                    notes=list(part.notes) or None,
                )
            case Rejected(kind, detail):
                if self._writer is not None:
                    self._writer.drop_sample()
                row = SourceRow(
                    source=source.name,
                    status="rejected",
                    label=source.label,
                    reason=kind.value,
                    detail=detail,
                )
        self._rows.append(row)
        self._next += 1
        if not self.is_complete and self._writer is not None:
            self._writer.begin_sample()

    def seal(self) -> None:
        """Give the shard its name, then write its record."""
        entry = None
        if self._writer is not None and self._writer.num_samples:
            num_bytes, sha256, index_sha256 = self._writer.finish()
            entry = ShardEntry(
                name=self._writer.path.name,
                num_samples=self._writer.num_samples,
                num_frames=self._num_frames,
                num_bytes=num_bytes,
                sha256=sha256,
                index_sha256=index_sha256,
            )
        else:
            self.discard()
        record = ShardRecord(plan=self._plan_digest, entry=entry, rows=tuple(self._rows))
        content = canonical_json(dataclasses.asdict(record))
        write_atomic(record_path(self._progress_folder, self.index), content)

    def discard(self) -> None:
        """Remove what is unfinished; what has its name stays."""
        if self._writer is not None:
            self._writer.discard()
        for messages in self._waiting.values():
            for message in messages:
                _close(message)
        self._waiting.clear()


def _close(message: Message) -> None:
    if isinstance(message, Sent):
        message.close()


@dataclass
class _Work:
    build: ShardBuild
    place: int
    task: Task
    num_crashes: int = 0


class _Worker:
    """A worker process and what it is at."""

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
        """Seconds since it last got on with its video."""
        return time.monotonic() - self._heartbeat.value

    def give(self, work: _Work) -> None:
        self.work = work
        self._heartbeat.value = time.monotonic()
        try:
            self.connection.send(work.task)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It died idle; reading from it tells the driver, which starts another.

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def drive(builds: Sequence[ShardBuild], settings: ShardSettings, progress: Progress) -> None:
    """Finish all shards, or leave only finished ones.

    Raises:
        WorkerError: A worker met a fault of the program.
        OSError: The shards cannot be written.
    """
    with ExitStack() as stack:
        driver = _Driver(builds, settings, progress, stack)
        driver.run()


class _Driver:
    """Hands tasks to workers and messages to shards, within a bound on memory.

    It does nothing in proportion to the bytes of a video but to have the kernel copy them once;
    hashing and syncing go on in threads beside it.
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
        self._waiting = _Waiting(settings.buffer_bytes, _room_for_files() // 2)
        self._todo = self._all_work(builds)
        self._again: deque[_Work] = deque()
        self._workers: list[_Worker] = []
        self._seals: deque[Future[None]] = deque()
        self._next_look_s = 0.0
        # In this order backwards at the end: no worker, no thread, then what is unfinished.
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
        # What is done again goes out in any case: the others may wait for just this one.
        if self._again:
            return self._again.popleft()
        return None if self._waiting.is_full else next(self._todo, None)

    def _listen(self) -> None:
        """Take one message from each worker that has one; see to the dead and the hung."""
        full = self._waiting.is_full
        for worker in self._workers:
            # Under pressure only those are heard whose words can be written at once: the others
            # wait for an answer. The first of the open shards always is among the heard.
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
                self._bury(worker)
                continue
            work = worker.work
            if work is None:
                raise AssertionError("a message from an idle worker")
            if isinstance(message, Refused):
                raise OSError(message.errno, os.strerror(message.errno))
            if isinstance(message, WorkerFailure):
                raise WorkerError(
                    f"{work.build.source_name(work.place)}: a fault of the program, not of the "
                    f"video; finished shards are kept\n{message.trace}"
                )
            if isinstance(message, Rejected) or message.part.num_frames is not None:
                worker.work = None
                # It goes on while this one is written.
                if not full and (following := self._next_work()) is not None:
                    worker.give(following)
            self._take(work.build, work.place, message)
        if time.monotonic() > self._next_look_s:
            self._next_look_s = time.monotonic() + min(1.0, self._settings.timeout_s / 4)
            self._progress.tick()
            for worker in list(self._workers):
                self._end_if_hung(worker)

    def _end_if_hung(self, worker: _Worker) -> None:
        if worker.work is None or worker.silent_s < self._settings.timeout_s:
            return
        if worker.connection.poll():
            return  # It has spoken, and waits for us to listen.
        detail = f"no packet, frame or segment in {self._settings.timeout_s:.0f} s"
        self._replace(worker, Rejected(FaultKind.TIMEOUT, detail))

    def _bury(self, worker: _Worker) -> None:
        """A worker died: try its video once more, as it may have been killed from outside."""
        worker.process.join()
        work = worker.work
        if work is not None and work.num_crashes == 0:
            work.num_crashes += 1
            work.build.forget(work.place, self._waiting)
            self._again.append(work)
            self._replace(worker, None)
            return
        code = worker.process.exitcode
        self._replace(worker, Rejected(FaultKind.CRASH, f"the codec ended its process ({code})"))

    def _replace(self, worker: _Worker, verdict: Rejected | None) -> None:
        self._workers.remove(worker)
        if worker.is_heard:
            self._selector.unregister(worker.connection)
        worker.stop()
        if verdict is not None and worker.work is not None:
            self._take(worker.work.build, worker.work.place, verdict)

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
    """Files that this process may have open, after asking for as many as it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return most if soft == resource.RLIM_INFINITY else soft
