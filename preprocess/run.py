"""Shard a set of sources: plan the parts, make those that are missing, join them to shards.

The place of each sample is decided before the first video is opened: the sources on disk are
shuffled with the seed, and a shard is a range of that order, divided into parts. A rejected video
leaves a gap in its own shard and moves no sample of another. So the bytes do not depend on the
number of workers or the order of work, and a resumed run makes only the missing parts.
"""

import dataclasses
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.errors import ShardError
from strata.format.manifest import build_manifest, manifest_json, rows_json
from strata.format.schema import MANIFEST_NAME, SAMPLES_NAME, Manifest, ShardEntry, SourceRow
from strata.logs import get_logger
from strata.preprocess.datasets.folder import Source, SourceSet
from strata.preprocess.executors import (
    Executor,
    LocalExecutor,
    Outcome,
    RayExecutor,
    WorkerDied,
)
from strata.preprocess.join import ShardRecord, join_parts, record_name, shard_name
from strata.preprocess.part import (
    PROGRESS_FOLDER,
    PartRecord,
    PartTask,
    Range,
    encoder_versions,
    fault_of_death,
    make_part,
)
from strata.preprocess.places import Place, open_place
from strata.preprocess.plan import (
    PLAN_NAME,
    Finished,
    Plan,
    claim_folder,
    is_finished,
    make_plan,
    plan_shards,
    ranges_of_slice,
    read_json,
)
from strata.preprocess.progress import LogKind, Progress, open_progress
from strata.preprocess.settings import ShardSettings
from strata.telemetry.metrics import Metrics

__all__ = ["merge_set", "plan_shards", "shard_set", "shard_slice"]

logger = get_logger(__name__)

_READERS = 32
"""Records that are read at a time, from a store that takes a while to answer."""
_MOST_DEATHS = 3
"""Times that the process of a task may die; a video that ends its own is rejected before."""


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
            work = _Work(place, plan, shards, source_set.classes, settings)
            counts = work.total, work.total - work.left
            with (
                closing(open_progress(log, source_set.split, *counts, metrics)) as progress,
                _executor(settings) as executor,
            ):
                work.run(executor, progress)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return True


def _executor(settings: ShardSettings) -> Executor:
    match settings.executor:
        case "local":
            return LocalExecutor(settings.num_workers, settings.worker_bytes)
        case "ray":
            return RayExecutor(settings.ray_address, settings.worker_bytes)


@dataclass
class _Job:
    """A task, and how often a process that had it died."""

    shard: int
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    num_deaths: int = 0


class _Work:
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
        classes: tuple[str, ...],
        settings: ShardSettings,
    ) -> None:
        self._place, self._plan, self._settings = place, plan, settings
        self._sources, self._classes = shards, classes
        self._parts: dict[int, list[tuple[Range, PartRecord]]] = defaultdict(list)
        """Finished parts of shards that are not joined yet."""
        self._urgent: deque[_Job] = deque()
        ranges = ranges_of_slice(plan, settings)
        self._missing = self._keep_finished(ranges)
        self.total, self.left = (
            sum(part.last - part.first for part in parts) for parts in (ranges, self._missing)
        )
        """Videos of the slice, and those of them that had no part at the start."""

    def _keep_finished(self, wanted: Sequence[Range]) -> list[Range]:
        """Keep the parts and shards of an earlier run whose videos have not changed.

        Returns:
            The parts that are missing.
        """
        finished, missing = Finished(self._place, self._plan), list[Range]()

        def is_joined(index: int) -> bool:
            record = finished.shard(index)
            return record is not None and record.stamps == self._stamps(index)

        with ThreadPoolExecutor(_READERS) as pool:
            indices = sorted({part.shard for part in wanted})
            joined = dict(zip(indices, pool.map(is_joined, indices), strict=True))
            wanted = [part for part in wanted if not joined[part.shard]]
            for part, found in zip(wanted, pool.map(finished.parts, wanted), strict=True):
                stamps = tuple(stamp for _, record in found for stamp in record.stamps)
                if stamps == self._stamps(*part):
                    self._put(found)
                else:
                    missing.append(part)
        return missing

    def _stamps(self, index: int, first: int = 0, last: int | None = None) -> tuple[str, ...]:
        return tuple(source.stamp for source in self._sources[index][first:last])

    def _task(self, part: Range) -> PartTask:
        return PartTask(
            location=self._place.location,
            range=part,
            sources=tuple(self._sources[part.shard][part.first : part.last]),
            classes=self._classes,
            plan=self._plan.names,
            encoder=encoder_versions(),
            settings=self._settings,
        )

    def run(self, executor: Executor, progress: Progress) -> None:
        """Make all that is missing; after an error the finished parts are kept.

        Raises:
            StrataError: A part cannot be made, or processes died again and again.
            WorkerError: A bug of the program.
            OSError: A part or shard cannot be written.
        """
        todo = (_Job(part.shard, make_part, (self._task(part),)) for part in self._missing)
        active: dict[Future[Any], _Job] = {}
        while True:
            while len(active) < executor.slots:
                job = self._urgent.popleft() if self._urgent else next(todo, None)
                if job is None:
                    break
                alone = job.num_deaths > 0
                active[executor.submit(job.call, job.arguments, alone=alone)] = job
            if not active:
                return
            for future in wait(active, timeout=1.0, return_when=FIRST_COMPLETED).done:
                self._take(active.pop(future), executor.outcome(future), progress)
            progress.tick()

    def _take(self, job: _Job, outcome: Outcome, progress: Progress) -> None:
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, WorkerDied):
            self._retry(job, outcome.code)
        elif isinstance(outcome, PartRecord):
            self._put([(job.arguments[0].range, outcome)])
            for row in outcome.rows:
                progress.done(row)

    def _retry(self, job: _Job, code: int | None) -> None:
        """Make the part again, each video in a process of its own, to find the one that kills."""
        job.num_deaths += 1
        if job.num_deaths == _MOST_DEATHS:
            raise ShardError(
                f"worker processes ended {_MOST_DEATHS} times ({code}) at shard {job.shard}; "
                "look for the kernel's reason (dmesg: out of memory) and run the same command "
                "again, it continues where it stopped"
            )
        task = job.arguments[0]
        if isinstance(task, PartTask) and job.num_deaths == 1:
            logger.warning(
                "a worker process ended (%s) while it had %d videos, %s ... %s: each is tried "
                "again in a process of its own",
                code,
                len(task.sources),
                task.sources[0].name,
                task.sources[-1].name,
            )
            for place, source in enumerate(task.sources, task.range.first):
                part = Range(task.range.shard, place, place + 1)
                single = dataclasses.replace(task, range=part, sources=(source,))
                self._urgent.append(_Job(job.shard, make_part, (single,), 1))
            return
        if isinstance(task, PartTask) and code is not None:
            fault = fault_of_death(code, self._settings)
            source = dataclasses.replace(task.sources[0], fault=fault)
            job.arguments = (dataclasses.replace(task, sources=(source,)),)
        self._urgent.append(job)

    def _put(self, found: Sequence[tuple[Range, PartRecord]]) -> None:
        """Keep finished parts of a shard, and join it if they are all of it."""
        index = found[0][0].shard
        parts = self._parts[index]
        parts += found
        if sum(len(record.rows) for _, record in parts) == len(self._sources[index]):
            del self._parts[index]
            arguments = self._place.location, sorted(parts)
            self._urgent.append(_Job(index, join_parts, arguments))


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
    plan = read_json(place, PLAN_NAME, Plan)
    if plan is None:
        return place.manifest()
    finished = Finished(place, plan)
    try:
        indices = range(len(plan.shards))
        with ThreadPoolExecutor(_READERS) as pool:
            records = list(pool.map(finished.shard, indices))
        for index in indices:
            if records[index] is None and (parts := finished.all_parts(index)):
                join_parts(place.location, parts)
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
        place.remove(name for name in finished.files if name.endswith(".tmp"))
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


def _cannot_write(folder: Path, error: OSError) -> ShardError:
    # The error may name a file outside --out.
    named = error.filename if isinstance(error.filename, str | bytes) else None
    place = Path(os.fsdecode(named)) if named else folder
    where = folder if place.is_relative_to(folder) or folder.is_relative_to(place) else place
    return ShardError(
        f"cannot write to {where}: {error.strerror or error}; correct that and run the same "
        "command again, it continues where it stopped"
    )
