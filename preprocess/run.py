"""Shard a set of sources: plan the parts, make those that are missing, join them to shards.

The place of each sample is decided before the first video is opened: the sources on disk are
shuffled with the seed, and a shard is a range of that order, divided into parts. A rejected video
leaves a gap in its own shard and moves no sample of another. So the bytes do not depend on the
number of workers or the order of work, and a resumed run makes only the missing parts.
"""

import dataclasses
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.errors import ShardError
from strata.format.manifest import (
    build_manifest,
    manifest_json,
    rows_json,
)
from strata.format.schema import (
    MANIFEST_NAME,
    SAMPLES_NAME,
    Manifest,
    ShardEntry,
    SourceRow,
)
from strata.logs import get_logger
from strata.preprocess.datasets.folder import Source, SourceSet
from strata.preprocess.executors import (
    Died,
    Executor,
    Failed,
    LocalExecutor,
    Outcome,
    RayExecutor,
)
from strata.preprocess.join import JoinTask, ShardRecord, join_parts, record_name, shard_name
from strata.preprocess.part import (
    PROGRESS_FOLDER,
    PartRecord,
    PartTask,
    encoder_versions,
    make_part,
    make_video_alone,
    part_name,
)
from strata.preprocess.places import Place, open_place
from strata.preprocess.plan import (
    PLAN_NAME,
    Plan,
    claim_folder,
    is_finished,
    make_plan,
    plan_shards,
    ranges_of_slice,
    read_json,
    read_part,
    read_record,
    sizes_of,
)
from strata.preprocess.progress import LogKind, Progress, open_progress
from strata.preprocess.sample import task_of
from strata.preprocess.settings import ShardSettings
from strata.telemetry.metrics import Metrics
from strata.untrusted import decode_json

__all__ = ["merge_set", "plan_shards", "shard_set", "shard_slice"]

logger = get_logger(__name__)

_READERS = 32
"""Records that are read at a time, from a store that takes a while to answer."""
_MOST_DEATHS = 3
"""Times that the process of a task may die; for a video that ends its own process, see `part`."""


def shard_set(
    source_set: SourceSet,
    folder: Path,
    settings: ShardSettings,
    *,
    log: LogKind = "none",
) -> Manifest:
    """Make all missing shards of one split, and the manifest.

    Args:
        source_set: The sources.
        folder: Where the shards go. May hold an earlier, unfinished run of the same command.
        settings: Settings, without slices.
        log: Kind of progress on stderr.

    Returns:
        The manifest; an earlier one if the folder was complete.

    Raises:
        ShardError: The folder holds something else, is in use, or the disk is full.
    """
    if settings.slice_count != 1:
        raise AssertionError("one slice has no manifest")
    if not shard_slice(source_set, folder, settings, log=log):
        return open_place(folder).manifest()
    return merge_set(folder)


def shard_slice(
    source_set: SourceSet,
    folder: Path,
    settings: ShardSettings,
    *,
    log: LogKind = "none",
    metrics: Metrics | None = None,
) -> bool:
    """Make all missing parts of one slice, and the shards of which it has all parts.

    Several slices may work in one folder at the same time, or each in its own folder, whose files
    are then copied together, with those in `.progress`. Afterwards `merge_set` joins the other
    shards and writes the manifest.

    Args:
        source_set: The sources, the same for all slices.
        folder: Where the shards go.
        settings: Settings, with the slice.
        log: Kind of progress on stderr.
        metrics: Counters of finished videos and frames.

    Returns:
        False if the set has a manifest already and is complete.

    Raises:
        ShardError: The folder holds something else, is in use, or the disk is full.
        WorkerError: A bug of the program; finished parts are kept.
    """
    plan, shards = make_plan(source_set, settings)
    place = open_place(folder)
    if is_finished(place, plan):
        return False
    try:
        claim_folder(place, plan)
        slice_name = f"{settings.slice_index}-of-{settings.slice_count}"
        with place.locked(f"{PROGRESS_FOLDER}/lock-{slice_name}"):
            builds = _Builds(place, plan, shards, source_set.classes, settings)
            total, left = builds.count()
            with (
                open_progress(log, source_set.split, total, total - left, metrics) as progress,
                _executor(settings) as executor,
            ):
                builds.run(executor, progress)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return True


def _executor(settings: ShardSettings) -> Executor:
    match settings.executor:
        case "local":
            return LocalExecutor(settings.num_workers)
        case "ray":
            return RayExecutor(settings.ray_address)


@dataclass
class _Job:
    """A task and how often the process that had it died."""

    call: Callable[[Any], Any]
    task: PartTask | JoinTask
    num_deaths: int = 0


@dataclass
class _Shard:
    """A shard under way."""

    index: int
    num_missing: int
    """Videos that no part has yet, also those of other slices."""
    parts: dict[int, tuple[str, PartRecord]]
    """Finished parts by their first place."""


class _Builds:
    """Makes the missing parts of a slice and joins them.

    Args:
        place: Where they go.
        plan: Of the set.
        shards: The sources of each shard.
        classes: Class names by label.
        settings: Settings, with the slice.
    """

    def __init__(
        self,
        place: Place,
        plan: Plan,
        shards: Sequence[Sequence[Source]],
        classes: Sequence[str],
        settings: ShardSettings,
    ) -> None:
        self._place, self._plan, self._settings = place, plan, settings
        self._sources, self._classes = shards, classes
        self._shards: dict[int, _Shard] = {}
        self._urgent: deque[_Job] = deque()
        self._ranges = ranges_of_slice(plan, settings)
        self._missing: list[tuple[int, int, int]] = []
        self._find_finished()

    def count(self) -> tuple[int, int]:
        """Videos of this slice, and those of them that have no part yet."""
        return tuple(  # pyright: ignore[reportReturnType]
            sum(last - first for _, first, last in ranges)
            for ranges in (self._ranges, self._missing)
        )

    def _find_finished(self) -> None:
        """Keep the parts and shards of an earlier run whose videos have not changed."""
        found, tars = self._place.names(PROGRESS_FOLDER), self._place.names("")

        def is_joined(index: int) -> bool:
            record = read_record(self._place, found, tars, index, self._plan)
            stamps = tuple(s.stamp for s in self._sources[index])
            return record is not None and record.stamps == stamps

        indices = sorted({index for index, _, _ in self._ranges})
        with ThreadPoolExecutor(_READERS) as pool:
            joined = dict(zip(indices, pool.map(is_joined, indices), strict=True))
        for index, first, last in self._ranges:
            if joined[index]:
                continue
            self._shards.setdefault(index, _Shard(index, len(self._sources[index]), {}))
            name = part_name(index, first, last)
            part = read_part(self._place, found, name, self._plan)
            if part is not None and part.stamps == tuple(
                s.stamp for s in self._sources[index][first:last]
            ):
                self._put(index, first, name, part)
            else:
                self._missing.append((index, first, last))

    def _task(self, index: int, first: int, last: int) -> PartTask:
        settings = self._settings
        return PartTask(
            location=self._place.location,
            shard=index,
            first=first,
            videos=tuple(task_of(s, self._classes) for s in self._sources[index][first:last]),
            plan=self._plan.names,
            encoder=encoder_versions(),
            form=settings.form,
            read_back=settings.read_back,
            damaged=settings.damaged,
            timeout_s=settings.timeout_s,
        )

    def run(self, executor: Executor, progress: Progress) -> None:
        """Make all that is missing; after an error the finished parts are kept.

        Raises:
            StrataError: A part cannot be made, or processes died again and again.
            WorkerError: A bug of the program.
            OSError: A part or shard cannot be written.
        """
        todo = (_Job(make_part, self._task(*part)) for part in self._missing)
        active: dict[int, _Job] = {}
        number = 0
        while True:
            while len(active) < executor.slots:
                job = self._urgent.popleft() if self._urgent else next(todo, None)
                if job is None:
                    break
                number += 1
                active[number] = job
                executor.submit(number, job.call, job.task)
            if not active:
                return
            for key, outcome in executor.results(1.0):
                self._take(active.pop(key), outcome, progress)
            progress.tick()

    def _take(self, job: _Job, outcome: Outcome, progress: Progress) -> None:
        task = job.task
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Died):
            self._retry(job, outcome)
        elif isinstance(task, PartTask):
            self._put(task.shard, task.first, task.name, outcome)
            for row in outcome.rows:
                if row.status == "rejected":
                    progress.rejected(row.source, row.reason or "", row.detail or "")
                progress.done(row.num_frames)

    def _retry(self, job: _Job, died: Died) -> None:
        """Make the part again, each video in a process of its own, to find the one that kills."""
        task = job.task
        if job.call is make_part and isinstance(task, PartTask):
            names = f"{task.videos[0].name} ... {task.videos[-1].name}"
            logger.warning(
                "a worker process ended (%s) while it had %d videos, %s: each is tried again in a "
                "process of its own",
                died.code,
                len(task.videos),
                names,
            )
            for k, video in enumerate(task.videos):
                single = dataclasses.replace(task, first=task.first + k, videos=(video,))
                self._urgent.append(_Job(make_video_alone, single))
            return
        job.num_deaths += 1
        if job.num_deaths == _MOST_DEATHS:
            raise ShardError(
                f"worker processes ended {_MOST_DEATHS} times ({died.code}) at shard {task.shard}; "
                "look for the kernel's reason (dmesg: out of memory) and run the same command "
                "again, it continues where it stopped"
            )
        self._urgent.append(job)

    def _put(self, index: int, first: int, name: str, part: PartRecord) -> None:
        shard = self._shards[index]
        shard.parts[first] = name, part
        shard.num_missing -= len(part.rows)
        if shard.num_missing == 0:
            parts = tuple(part for _, part in sorted(shard.parts.items()))
            self._urgent.append(_Job(join_parts, _join_task(self._place, index, self._plan, parts)))
            del self._shards[index]


def _join_task(
    place: Place, index: int, plan: Plan, parts: tuple[tuple[str, PartRecord], ...]
) -> JoinTask:
    return JoinTask(
        location=place.location,
        shard=index,
        plan=plan.names,
        sizes=plan.shards[index][1],
        parts=parts,
    )


def merge_set(folder: Path) -> Manifest:
    """Join the shards that lie between slices, and write the manifest over all.

    Args:
        folder: The folder of one set, in which every part is finished.

    Returns:
        The manifest; an earlier one if the folder was complete.

    Raises:
        ShardError: A part is missing, or comes from a run with other videos or settings.
    """
    place = open_place(folder)
    content = place.read(PLAN_NAME)
    if content is None:
        return place.manifest()
    plan = decode_json(content, Plan, f"{place.location}/{PLAN_NAME}", ShardError)
    found, tars = place.names(PROGRESS_FOLDER), place.names("")
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            records = list(
                pool.map(
                    lambda index: read_record(place, found, tars, index, plan),
                    range(len(plan.shards)),
                )
            )
        for index, record in enumerate(records):
            if record is None and _join(place, found, index, plan):
                # As it was stored: the manifest keeps the order of its fields.
                records[index] = read_json(place, record_name(index), ShardRecord)
        lacking = [shard_name(index) for index, record in enumerate(records) if record is None]
        if lacking:
            raise ShardError(
                f"{place.location}: {len(lacking)} of {len(records)} shards are not finished, "
                f"first {lacking[0]}; run the same tools/shard.py command again for their slices, "
                "or without --slice, and bring all slices' files together"
            )
        manifest = _manifest(plan, [record for record in records if record is not None])
        place.remove(name for name in tars if name.endswith(".tmp"))
        place.write(SAMPLES_NAME, rows_json(manifest))
        # Its presence marks the data set as complete.
        place.write(MANIFEST_NAME, manifest_json(manifest))
        place.remove([PROGRESS_FOLDER])
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return manifest


def _manifest(plan: Plan, records: Iterable[ShardRecord]) -> Manifest:
    shards: list[ShardEntry] = []
    rows = [SourceRow(source=name, status="absent", label=label) for name, label in plan.absent]
    for record in records:
        number = len(shards)
        rows += (
            dataclasses.replace(row, shard=number) if row.status == "written" else row
            for row in record.rows
        )
        shards += [record.entry] if record.entry is not None else []
    return build_manifest(
        dataset=plan.dataset,
        split=plan.split,
        form=plan.form,
        classes=plan.classes,
        shards=shards,
        settings=plan.settings,
        rows=rows,
    )


def _join(place: Place, found: dict[str, int], index: int, plan: Plan) -> bool:
    """Join a shard of which several slices have parts; returns whether they cover it."""
    length, sizes = plan.shards[index]
    pattern = re.compile(rf"(shard-{index:06d}\.(\d+)-(\d+)\.part)\.json")
    lasts: dict[int, tuple[int, str]] = {}
    for name in sorted(found):
        if match := pattern.fullmatch(name):
            lasts[int(match[2])] = int(match[3]), f"{PROGRESS_FOLDER}/{match[1]}"
    parts, at = [], 0
    while at < length and at in lasts:
        at, name = lasts[at]
        part = read_part(place, found, name, plan)
        if part is None:
            return False
        parts.append((name, part))
    stamps = [stamp for _, part in parts for stamp in part.stamps]
    # A video that is gone by now has no size.
    if at != length or ("" not in stamps and sizes_of(stamps) != sizes):
        return False
    join_parts(_join_task(place, index, plan, tuple(parts)))
    return True


def _cannot_write(folder: Path, error: OSError) -> ShardError:
    # The error may name a file outside --out.
    named = error.filename if isinstance(error.filename, str | bytes) else None
    place = Path(os.fsdecode(named)) if named else folder
    where = folder if place.is_relative_to(folder) or folder.is_relative_to(place) else place
    return ShardError(
        f"cannot write to {where}: {error.strerror or error}; correct that and run the same "
        "command again, it continues where it stopped"
    )
