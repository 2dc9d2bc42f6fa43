"""The parallel driver: sources in, shards and a manifest out; the same bytes on every way there.

Which sample stands where is decided before the first video is opened: the sources on disk are
shuffled with the seed, and a shard is a slice of that order. A rejected video leaves a gap in its
own shard and moves nothing in the others. So shards can be made in any order, by any number of
workers, and a run that was stopped makes just those that are not there.
"""

import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import av
from PIL import features

from strata.counter_random import Stream, permutation
from strata.errors import ConfigError, FaultKind, ShardError
from strata.preprocess.manifest import build_manifest, canonical_json, write_manifest
from strata.preprocess.progress import LogKind, Progress, open_progress
from strata.preprocess.shards import ShardWriter, replace_file, shard_name, sync_folder
from strata.preprocess.sources import Source, SourceSet, sample_key
from strata.preprocess.worker import Done, Member, Message, Rejected, Task, serve
from strata.schema import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    NormalForm,
    ShardEntry,
    SourceRow,
    read_manifest,
)

__all__ = ["ShardSettings", "merge_set", "plan_shards", "shard_set", "shard_slice"]

_PROGRESS_FOLDER = ".progress"
_PLAN_NAME = "plan.json"


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How to shard."""

    form: NormalForm = field(default_factory=NormalForm)
    """The form of every sample."""
    samples_per_shard: int = 128
    """Sources to a shard; 128 clips of UCF101 are about 140 MB."""
    seed: int = 0
    """Of the shuffle, in [0, 2^32)."""
    workers: int = 0
    """Processes; 0 for one on each CPU that this process may use."""
    timeout_s: float = 300.0
    """Seconds without a finished segment after which a video counts as hung."""
    buffer_bytes: int = 1 << 30
    """Finished members that may wait for a slower video before them."""
    slice_index: int = 0
    """Which part of the shards to make, from 0."""
    slice_count: int = 1
    """Parts in all; the shards of a part are those whose number leaves its index."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.samples_per_shard < 1:
            raise ConfigError(f"samples per shard is {self.samples_per_shard}; use 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; use 0 to 2^32 - 1")
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; use 1 or more, or 0 for all CPUs")
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout is {self.timeout_s} s; use more than 0")
        if not 0 <= self.slice_index < self.slice_count:
            raise ConfigError(f"slice is {self.slice_index}/{self.slice_count}; use 0/n to (n-1)/n")

    @property
    def num_workers(self) -> int:
        """Processes to start."""
        return self.workers or len(os.sched_getaffinity(0))


def plan_shards(source_set: SourceSet, settings: ShardSettings) -> list[list[Source]]:
    """Which sources, in which order, make each shard; a pure function of its arguments."""
    present = source_set.present
    order = permutation(settings.seed, Stream.SHUFFLE, 0, len(present)).tolist()
    size = settings.samples_per_shard
    return [[present[k] for k in order[i : i + size]] for i in range(0, len(order), size)]


def _identity(source_set: SourceSet, settings: ShardSettings) -> dict[str, Any]:
    """The settings that the manifest stores, with a digest of all that decides the bytes."""
    stored: dict[str, Any] = {
        "seed": settings.seed,
        "samples_per_shard": settings.samples_per_shard,
        "encoder": {
            "pyav": av.__version__,
            "ffmpeg": ".".join(map(str, av.library_versions["libavcodec"])),
            "libjpeg_turbo": features.version_feature("libjpeg_turbo") or "none",
        },
    }
    sources = [
        [s.name, s.label, s.num_bytes, s.path is not None, s.fault and s.fault[0]]
        for s in source_set.sources
    ]
    everything = {
        **stored,
        "dataset": source_set.dataset,
        "split": source_set.split,
        "classes": source_set.classes,
        "form": dataclasses.asdict(settings.form),
        "sources": sources,
    }
    return {**stored, "plan": hashlib.sha256(canonical_json(everything)).hexdigest()}


def shard_set(
    source_set: SourceSet,
    videos: Path,
    folder: Path,
    settings: ShardSettings,
    *,
    log: LogKind = "none",
) -> Manifest:
    """Make all shards of one split, or the rest of them, and the manifest.

    Args:
        source_set: What to shard.
        videos: The folder that the sources are in.
        folder: Where the shards go. May hold an earlier, unfinished run of the same command.
        settings: How. The slice must be the whole.
        log: What to write on stderr as it goes.

    Returns:
        The manifest that was written, or found if all was done before.

    Raises:
        ShardError: The folder holds something else, is in use, or the disk is full.
    """
    if settings.slice_count != 1:
        raise AssertionError("a slice alone has no manifest")
    if not shard_slice(source_set, videos, folder, settings, log=log):
        return read_manifest(folder)
    return merge_set(folder)


def shard_slice(
    source_set: SourceSet,
    videos: Path,
    folder: Path,
    settings: ShardSettings,
    *,
    log: LogKind = "none",
) -> bool:
    """Make the shards of one slice, or the rest of them, without the manifest.

    Any number of slices may work in one folder at the same time, or each in one of its own, whose
    files are brought together afterwards, those in `.progress` too. `merge_set` does the rest.

    Args:
        source_set: What to shard, the same for all slices.
        videos: The folder that the sources are in.
        folder: Where the shards go.
        settings: How.
        log: What to write on stderr as it goes.

    Returns:
        False if the set has a manifest already and all is there.

    Raises:
        ShardError: The folder holds something else, is in use, or the disk is full.
    """
    identity = _identity(source_set, settings)
    plan = plan_shards(source_set, settings)
    if _is_finished(folder, identity):
        return False
    try:
        progress_folder = folder / _PROGRESS_FOLDER
        content = _plan_json(source_set, settings, identity, len(plan))
        _claim_folder(folder, progress_folder, content)
        slice_name = f"{settings.slice_index}-of-{settings.slice_count}"
        with _lock(progress_folder / f"lock-{slice_name}"):
            mine = range(settings.slice_index, len(plan), settings.slice_count)
            todo = [
                index
                for index in mine
                if _read_record(folder, progress_folder, index, identity["plan"]) is None
            ]
            builds = [
                _ShardBuild(
                    folder,
                    progress_folder,
                    index,
                    plan[index],
                    source_set.classes,
                    videos,
                    plan_digest=identity["plan"],
                    slice_name=slice_name,
                )
                for index in todo
            ]
            total = sum(len(plan[index]) for index in mine)
            left = sum(len(plan[index]) for index in todo)
            with open_progress(log, source_set.split, total, total - left) as progress:
                _Driver(builds, settings, progress).run()
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return True


def merge_set(folder: Path) -> Manifest:
    """Write the manifest over the shards of all slices.

    Args:
        folder: The folder of one set, in which every shard is finished.

    Returns:
        The manifest that was written, or found if it was there.

    Raises:
        ShardError: A shard is not there yet, or comes from a run with other videos or settings.
    """
    progress_folder = folder / _PROGRESS_FOLDER
    plan_path = progress_folder / _PLAN_NAME
    if not plan_path.is_file():
        return read_manifest(folder)
    plan = json.loads(plan_path.read_bytes())
    found = [
        _read_record(folder, progress_folder, index, plan["settings"]["plan"])
        for index in range(plan["num_shards"])
    ]
    lacking = [shard_name(index) for index, record in enumerate(found) if record is None]
    if lacking:
        raise ShardError(
            f"{folder}: {len(lacking)} of {len(found)} shards are not finished, first "
            f"{lacking[0]}; run the same tools/shard.py command again for their slices, or "
            "without --slice, and bring all slices' files together"
        )
    shards: list[ShardEntry] = []
    rows = [SourceRow(source=name, status="absent", label=label) for name, label in plan["absent"]]
    for entry, shard_rows in filter(None, found):
        if entry is not None:
            shard_rows = [
                dataclasses.replace(row, shard=len(shards)) if row.status == "written" else row
                for row in shard_rows
            ]
            shards.append(entry)
        rows.extend(shard_rows)
    manifest = build_manifest(
        dataset=plan["dataset"],
        split=plan["split"],
        form=NormalForm(**plan["form"]),
        classes=plan["classes"],
        shards=shards,
        settings=plan["settings"],
        rows=rows,
    )
    try:
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        write_manifest(manifest, folder)
        shutil.rmtree(progress_folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return manifest


def _plan_json(
    source_set: SourceSet, settings: ShardSettings, identity: dict[str, Any], num_shards: int
) -> bytes:
    """All that the manifest needs beside the shards' records."""
    return canonical_json(
        {
            "dataset": source_set.dataset,
            "split": source_set.split,
            "form": dataclasses.asdict(settings.form),
            "classes": source_set.classes,
            "settings": identity,
            "num_shards": num_shards,
            "absent": [[s.name, s.label] for s in source_set.sources if s.path is None],
        }
    )


def _cannot_write(folder: Path, error: OSError) -> ShardError:
    return ShardError(
        f"cannot write to {folder}: {error.strerror or error}; mend that and run the same "
        "command again, it goes on where it stopped"
    )


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    if not (folder / MANIFEST_NAME).exists():
        return False
    manifest = read_manifest(folder)
    if manifest.settings.get("plan") != identity["plan"]:
        raise ShardError(
            f"{folder} already holds shards of other videos or with other settings; "
            "remove it or choose another --out"
        )
    for entry in manifest.shards:
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.num_bytes:
            raise ShardError(f"{path} is missing or damaged; remove {folder} and run again")
    shutil.rmtree(folder / _PROGRESS_FOLDER, ignore_errors=True)
    return True


def _claim_folder(folder: Path, progress_folder: Path, plan: bytes) -> None:
    """Make the folder this plan's own, or see that it is."""
    plan_path = progress_folder / _PLAN_NAME
    if not plan_path.exists():
        ours = {_PROGRESS_FOLDER}
        if folder.exists() and not folder.is_dir():
            raise ShardError(f"{folder} is a file; choose another --out")
        foreign = folder.is_dir() and any(p.name not in ours for p in folder.iterdir())
        # Another slice may have begun between the two looks.
        if foreign and not plan_path.exists():
            raise ShardError(
                f"{folder} holds files that sharding did not write; choose another --out"
            )
        progress_folder.mkdir(parents=True, exist_ok=True)
        if not plan_path.exists():
            replace_file(plan_path, plan)
    if plan_path.read_bytes() != plan:
        raise ShardError(
            f"{folder} holds an unfinished run over other videos or with other settings; "
            "remove it or choose another --out"
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"another process is sharding into {path.parent.parent}; wait for it"
            ) from error
        yield


_Record = tuple[ShardEntry | None, list[SourceRow]]
"""A finished shard: its entry, or None if all its videos were rejected; and its rows."""


def _record_path(progress_folder: Path, index: int) -> Path:
    return progress_folder / f"{shard_name(index)}.json"


def _read_record(
    folder: Path, progress_folder: Path, index: int, plan_digest: str
) -> _Record | None:
    """The record of a finished shard, if its files are there.

    Raises:
        ShardError: It was made by a run with other videos or settings.
    """
    path = _record_path(progress_folder, index)
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    if content["plan"] != plan_digest:
        raise ShardError(
            f"{path} comes from a slice that saw other videos or had other settings; all slices "
            "need the same command and the same videos: remove what that slice wrote, run it again"
        )
    entry = ShardEntry(**content["entry"]) if content["entry"] else None
    if entry is not None:
        tar = folder / entry.name
        whole = tar.is_file() and tar.stat().st_size == entry.num_bytes
        if not whole or not tar.with_suffix(INDEX_SUFFIX).is_file():
            return None
    return entry, [SourceRow(**row) for row in content["rows"]]


class _ShardBuild:
    """One shard under way: takes messages in any order, writes samples in the plan's order."""

    def __init__(
        self,
        folder: Path,
        progress_folder: Path,
        index: int,
        sources: Sequence[Source],
        classes: Sequence[str],
        videos: Path,
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
        self._videos = videos
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
    def is_finished(self) -> bool:
        """Whether the shard and its record are on disk."""
        return self._next == len(self._sources)

    def source_name(self, place: int) -> str:
        """The source at a place."""
        return self._sources[place].name

    def tasks(self) -> Iterator[tuple[int, Task | Rejected]]:
        """Places and what is to do there."""
        for place, source in enumerate(self._sources):
            if source.fault is not None:
                yield place, Rejected(*source.fault)
            elif source.path is None:
                raise AssertionError(f"{source.name} is not on disk")
            else:
                label = source.label
                yield (
                    place,
                    Task(
                        path=source.path,
                        name=source.name,
                        file_name=source.path.relative_to(self._videos).as_posix(),
                        key=sample_key(source.name),
                        label=label,
                        class_name=self._classes[label] if label >= 0 else None,
                    ),
                )

    def forget(self, place: int) -> int:
        """Drop what a dead worker sent for a place; returns the bytes that waited."""
        if place == self._next:
            if self._writer is not None:
                self._writer.drop_sample()
            return 0
        return _waiting_bytes(self._waiting.pop(place, []))

    def put(self, place: int, message: Message) -> int:
        """Take a message for a place; returns by how much the waiting bytes changed."""
        if place != self._next:
            self._waiting.setdefault(place, []).append(message)
            return len(message.content) if isinstance(message, Member) else 0
        change = 0
        self._apply(message)
        while self._next in self._waiting:
            place = self._next
            messages = self._waiting.pop(place)
            change -= _waiting_bytes(messages)
            for waiting in messages:
                self._apply(waiting)
            if self._next == place:
                break  # The rest of this sample is still to come.
        return change

    def _apply(self, message: Message) -> None:
        source = self._sources[self._next]
        key = sample_key(source.name)
        match message:
            case Member(ext, content):
                writer = self._writer
                if writer is None:
                    writer = self._writer = ShardWriter(
                        self._folder, self.index, tag=self._slice_name
                    )
                    writer.begin_sample()
                writer.add(key, ext, content)
                return
            case Done(num_frames):
                if self._writer is None:
                    raise AssertionError("a sample without members")
                position = self._writer.num_samples
                self._writer.end_sample()
                self._num_frames += num_frames
                row = SourceRow(
                    source=source.name,
                    status="written",
                    key=key,
                    label=source.label,
                    num_frames=num_frames,
                    position=position,
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
        if self._next < len(self._sources):
            if self._writer is not None:
                self._writer.begin_sample()
        else:
            self._finish()

    def _finish(self) -> None:
        entry = None
        if self._writer is not None and self._writer.num_samples:
            num_bytes, sha256 = self._writer.finish()
            entry = ShardEntry(
                name=self._writer.path.name,
                num_samples=self._writer.num_samples,
                num_frames=self._num_frames,
                num_bytes=num_bytes,
                sha256=sha256,
            )
        else:
            self.discard()
        record = {
            "plan": self._plan_digest,
            "entry": entry and dataclasses.asdict(entry),
            "rows": [dataclasses.asdict(row) for row in self._rows],
        }
        replace_file(_record_path(self._progress_folder, self.index), canonical_json(record))
        sync_folder(self._progress_folder)

    def discard(self) -> None:
        """Remove what is unfinished."""
        if self._writer is not None and not self.is_finished:
            self._writer.discard()


def _waiting_bytes(messages: Sequence[Message]) -> int:
    return sum(len(m.content) for m in messages if isinstance(m, Member))


@dataclass
class _Work:
    build: _ShardBuild
    place: int
    task: Task
    num_crashes: int = 0


class _Worker:
    """A worker process and what it is at."""

    def __init__(self, form: NormalForm) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(theirs, form), daemon=True)
        self.process.start()
        theirs.close()
        self.work: _Work | None = None
        self.heard_s = time.monotonic()

    def give(self, work: _Work) -> None:
        self.work = work
        self.heard_s = time.monotonic()
        try:
            self.connection.send(work.task)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It died idle; reading from it tells the driver, which starts another.

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class _Driver:
    """Hands tasks to workers and messages to shards, within a bound on memory."""

    def __init__(
        self, builds: Sequence[_ShardBuild], settings: ShardSettings, progress: Progress
    ) -> None:
        self._builds = builds
        self._settings = settings
        self._progress = progress
        self._todo = self._all_work()
        self._again: deque[_Work] = deque()
        self._waiting_bytes = 0
        self._workers: list[_Worker] = []

    def run(self) -> None:
        """Finish all shards, or leave only finished ones."""
        with ExitStack() as stack:
            stack.callback(self._clean_up)
            while True:
                self._hand_out()
                if not any(worker.work for worker in self._workers):
                    return
                self._listen()

    def _clean_up(self) -> None:
        for worker in self._workers:
            worker.stop()
        for build in self._builds:
            build.discard()

    def _all_work(self) -> Iterator[_Work]:
        for build in self._builds:
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
            # What is done again goes out in any case: the others may wait for just this one.
            if self._again:
                work = self._again.popleft()
            elif self._waiting_bytes < self._settings.buffer_bytes:
                work = next(self._todo, None)
            else:
                return
            if work is None:
                return
            if worker is None:
                worker = _Worker(self._settings.form)
                self._workers.append(worker)
            worker.give(work)

    def _listen(self) -> None:
        """Take one message from each worker that has one; see to the dead and the hung."""
        readable: dict[Connection, _Worker] = {}
        for worker in self._workers:
            # Under pressure only those are heard whose words can be written at once: the others
            # wait in their pipes. The first of the open shards always is among the heard.
            work = worker.work
            if work is not None and (
                self._waiting_bytes < self._settings.buffer_bytes or work.place == work.build.next
            ):
                readable[worker.connection] = worker
        for connection in wait(list(readable), timeout=1.0):
            worker = readable[connection]  # pyright: ignore[reportArgumentType]
            try:
                message = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._bury(worker)
                continue
            worker.heard_s = time.monotonic()
            if worker.work is None:
                raise AssertionError("a message from an idle worker")
            self._take(worker.work.build, worker.work.place, message)
            if not isinstance(message, Member):
                worker.work = None
        for worker in list(readable.values()):
            silent_s = time.monotonic() - worker.heard_s
            if worker.work is not None and silent_s > self._settings.timeout_s:
                if worker.connection.poll():
                    continue  # It has spoken; it was we who did not listen.
                detail = f"no segment in {self._settings.timeout_s:.0f} s"
                self._replace(worker, Rejected(FaultKind.TIMEOUT, detail))

    def _bury(self, worker: _Worker) -> None:
        """A worker died: try its video once more, as it may have been killed from outside."""
        worker.process.join()
        work = worker.work
        if work is not None and work.num_crashes == 0:
            work.num_crashes += 1
            self._waiting_bytes -= work.build.forget(work.place)
            self._again.append(work)
            self._replace(worker, None)
            return
        code = worker.process.exitcode
        self._replace(worker, Rejected(FaultKind.CRASH, f"the codec ended its process ({code})"))

    def _replace(self, worker: _Worker, verdict: Rejected | None) -> None:
        self._workers.remove(worker)
        worker.stop()
        if verdict is not None and worker.work is not None:
            self._take(worker.work.build, worker.work.place, verdict)

    def _take(self, build: _ShardBuild, place: int, message: Message) -> None:
        self._waiting_bytes += build.put(place, message)
        if isinstance(message, Rejected):
            name = build.source_name(place)
            self._progress.rejected(name, message.kind.value, message.detail)
        if not isinstance(message, Member):
            self._progress.done()
