"""Shard a set of sources: plan the shards, make those that are missing, write the manifest.

The place of each sample is decided before the first video is opened: the sources on disk are
shuffled with the seed, and a shard is a slice of that order. A rejected video leaves a gap in its
own shard and moves no sample of another. So the bytes do not depend on the number of workers or
the order of work, and a resumed run makes only the missing shards.
"""

import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import av
import msgspec
from PIL import features

from strata.counter_random import Stream, permutation
from strata.errors import ShardError
from strata.files import write_atomic
from strata.format.manifest import build_manifest, canonical_json, read_manifest, write_manifest
from strata.format.schema import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    NormalForm,
    ShardEntry,
    SourceRow,
)
from strata.preprocess.datasets.folder import Source, SourceSet
from strata.preprocess.datasets.listing import is_ignored
from strata.preprocess.driver import drive
from strata.preprocess.progress import LogKind, open_progress
from strata.preprocess.settings import ShardSettings
from strata.preprocess.shard_build import ShardBuild, ShardRecord, record_path
from strata.preprocess.shards import shard_name
from strata.telemetry.metrics import Metrics
from strata.untrusted import checked_name, decode_json

__all__ = ["merge_set", "plan_shards", "shard_set", "shard_slice"]

_PROGRESS_FOLDER = ".progress"
_PLAN_NAME = "plan.json"


def plan_shards(source_set: SourceSet, settings: ShardSettings) -> list[list[Source]]:
    """The sources of each shard, in order; a pure function of its arguments."""
    present = source_set.present
    order = permutation(settings.seed, Stream.SHARD_PLACES, 0, len(present)).tolist()
    size = settings.samples_per_shard
    return [[present[k] for k in order[i : i + size]] for i in range(0, len(order), size)]


def _identity(source_set: SourceSet, settings: ShardSettings) -> dict[str, Any]:
    """The settings that the manifest stores, with a digest of everything that decides the bytes."""
    stored: dict[str, Any] = {
        "seed": settings.seed,
        "samples_per_shard": settings.samples_per_shard,
        "read_back": settings.read_back,
        "encoder": {
            "pyav": av.__version__,
            "ffmpeg": ".".join(map(str, av.library_versions["libavcodec"])),
            "libjpeg_turbo": features.version_feature("libjpeg_turbo") or "none",
        },
    }
    if settings.damaged != "reject":
        stored["damaged"] = settings.damaged
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
        return read_manifest(folder)
    return merge_set(folder)


def shard_slice(
    source_set: SourceSet,
    folder: Path,
    settings: ShardSettings,
    *,
    log: LogKind = "none",
    metrics: Metrics | None = None,
) -> bool:
    """Make all missing shards of one slice, without the manifest.

    Several slices may work in one folder at the same time, or each in its own folder, whose files
    are then copied together, with those in `.progress`. Afterwards `merge_set` writes the manifest.

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
                ShardBuild(
                    folder,
                    progress_folder,
                    index,
                    plan[index],
                    source_set.classes,
                    plan_digest=identity["plan"],
                    slice_name=slice_name,
                )
                for index in todo
            ]
            total = sum(len(plan[index]) for index in mine)
            left = sum(len(plan[index]) for index in todo)
            split = source_set.split
            with open_progress(log, split, total, total - left, metrics) as progress:
                drive(builds, settings, progress)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return True


def merge_set(folder: Path) -> Manifest:
    """Write the manifest over the shards of all slices.

    Args:
        folder: The folder of one set, in which every shard is finished.

    Returns:
        The manifest; an earlier one if the folder was complete.

    Raises:
        ShardError: A shard is missing, or comes from a run with other videos or settings.
    """
    progress_folder = folder / _PROGRESS_FOLDER
    plan_path = progress_folder / _PLAN_NAME
    if not plan_path.is_file():
        return read_manifest(folder)
    plan = decode_json(plan_path.read_bytes(), _Plan, plan_path, ShardError)
    found = [
        _read_record(folder, progress_folder, index, plan.settings.get("plan"))
        for index in range(plan.num_shards)
    ]
    lacking = [shard_name(index) for index, record in enumerate(found) if record is None]
    if lacking:
        raise ShardError(
            f"{folder}: {len(lacking)} of {len(found)} shards are not finished, first "
            f"{lacking[0]}; run the same tools/shard.py command again for their slices, or "
            "without --slice, and bring all slices' files together"
        )
    shards: list[ShardEntry] = []
    rows = [SourceRow(source=name, status="absent", label=label) for name, label in plan.absent]
    for record in filter(None, found):
        shard_rows = record.rows
        if record.entry is not None:
            shard_rows = tuple(
                dataclasses.replace(row, shard=len(shards)) if row.status == "written" else row
                for row in shard_rows
            )
            shards.append(record.entry)
        rows.extend(shard_rows)
    manifest = build_manifest(
        dataset=plan.dataset,
        split=plan.split,
        form=plan.form,
        classes=plan.classes,
        shards=shards,
        settings=plan.settings,
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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Content of the manifest except the shards' records; stored in the progress folder."""

    dataset: str
    split: str
    form: NormalForm
    classes: tuple[str, ...]
    settings: dict[str, Any]
    num_shards: Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]
    absent: tuple[tuple[str, int], ...]


def _plan_json(
    source_set: SourceSet, settings: ShardSettings, identity: dict[str, Any], num_shards: int
) -> bytes:
    plan = _Plan(
        dataset=source_set.dataset,
        split=source_set.split,
        form=settings.form,
        classes=tuple(source_set.classes),
        settings=identity,
        num_shards=num_shards,
        absent=tuple((s.name, s.label) for s in source_set.sources if s.path is None),
    )
    return canonical_json(dataclasses.asdict(plan))


def _cannot_write(folder: Path, error: OSError) -> ShardError:
    # The error may name a file outside --out.
    named = error.filename if isinstance(error.filename, str | bytes) else None
    place = Path(os.fsdecode(named)) if named else folder
    where = folder if place.is_relative_to(folder) or folder.is_relative_to(place) else place
    return ShardError(
        f"cannot write to {where}: {error.strerror or error}; correct that and run the same "
        "command again, it continues where it stopped"
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
    """Reserve the folder for this plan.

    Raises:
        ShardError: It holds other files, or the work of another plan.
    """
    plan_path = progress_folder / _PLAN_NAME
    if not plan_path.exists():
        ours = {_PROGRESS_FOLDER}
        if folder.exists() and not folder.is_dir():
            raise ShardError(f"{folder} is a file; choose another --out")
        foreign = folder.is_dir() and any(
            p.name not in ours and not is_ignored(p.name) for p in folder.iterdir()
        )
        # Another slice may have started between the two checks.
        if foreign and not plan_path.exists():
            raise ShardError(
                f"{folder} holds files that sharding did not write; choose another --out"
            )
        progress_folder.mkdir(parents=True, exist_ok=True)
        if not plan_path.exists():
            write_atomic(plan_path, plan)
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


def _read_record(
    folder: Path, progress_folder: Path, index: int, plan_digest: str | None
) -> ShardRecord | None:
    """The record of a finished shard, if its files exist.

    Raises:
        ShardError: It was made by a run with other videos or settings, or is damaged.
    """
    path = record_path(progress_folder, index)
    if not path.exists():
        return None
    record = decode_json(path.read_bytes(), ShardRecord, path, ShardError)
    if record.plan != plan_digest:
        raise ShardError(
            f"{path} comes from a slice that saw other videos or had other settings; all slices "
            "need the same command and the same videos: remove what that slice wrote, run it again"
        )
    entry = record.entry
    if entry is not None:
        tar = folder / checked_name(entry.name, "shard", path, ShardError)
        is_complete = tar.is_file() and tar.stat().st_size == entry.num_bytes
        if not is_complete or not tar.with_suffix(INDEX_SUFFIX).is_file():
            return None
    return record
