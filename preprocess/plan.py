"""What a run will make and what there is of it: the plan, its parts and their records."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from strata.counter_random import Stream, permutation
from strata.errors import ShardError
from strata.format.manifest import canonical_json
from strata.format.schema import INDEX_SUFFIX, MANIFEST_NAME, SHARD_SUFFIX, NormalForm
from strata.preprocess.datasets.folder import Source, SourceSet
from strata.preprocess.datasets.listing import is_ignored
from strata.preprocess.join import ShardRecord, record_name
from strata.preprocess.part import PROGRESS_FOLDER, PartRecord, encoder_versions
from strata.preprocess.places import Place
from strata.preprocess.settings import ShardSettings
from strata.untrusted import checked_name, decode_json

__all__ = [
    "PLAN_NAME",
    "Plan",
    "claim_folder",
    "is_finished",
    "make_plan",
    "plan_shards",
    "ranges_of_slice",
    "read_json",
    "read_part",
    "read_record",
    "sizes_of",
]

RecordT = TypeVar("RecordT")

PLAN_NAME = f"{PROGRESS_FOLDER}/plan.json"
"""File of the plan, in the set's folder, until the manifest is written."""


def plan_shards(source_set: SourceSet, settings: ShardSettings) -> list[list[Source]]:
    """The sources of each shard, in order; a pure function of its arguments."""
    present = source_set.present
    order = permutation(settings.seed, Stream.SHARD_PLACES, 0, len(present)).tolist()
    size = settings.samples_per_shard
    return [[present[k] for k in order[i : i + size]] for i in range(0, len(order), size)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will make; stored in the progress folder until the manifest is written."""

    dataset: str
    split: str
    form: NormalForm
    classes: tuple[str, ...]
    settings: dict[str, Any]
    """Those of the manifest, with a digest of everything that determines the bytes."""
    names: str
    """The same digest without the sizes of the videos, which may change until the end."""
    shards: tuple[tuple[Annotated[int, msgspec.Meta(ge=1, le=1 << 32)], str], ...]
    """For each shard the number of its videos, and a digest of their sizes."""
    absent: tuple[tuple[str, int], ...]


def make_plan(source_set: SourceSet, settings: ShardSettings) -> tuple[Plan, list[list[Source]]]:
    """The plan of a set, and the sources of each shard; nothing is read or written."""
    stored: dict[str, Any] = {
        "seed": settings.seed,
        "samples_per_shard": settings.samples_per_shard,
        "read_back": settings.read_back,
        "encoder": encoder_versions(),
    }
    if settings.damaged != "reject":
        stored["damaged"] = settings.damaged

    def digest(with_sizes: bool) -> str:
        sources = [
            [s.name, s.label, s.num_bytes * with_sizes, s.path is not None, s.fault and s.fault[0]]
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
        return hashlib.sha256(canonical_json(everything)).hexdigest()

    shards = plan_shards(source_set, settings)
    plan = Plan(
        dataset=source_set.dataset,
        split=source_set.split,
        form=settings.form,
        classes=tuple(source_set.classes),
        settings={**stored, "plan": digest(True)},
        names=digest(False),
        shards=tuple((len(shard), sizes_of(s.stamp for s in shard)) for shard in shards),
        absent=tuple((s.name, s.label) for s in source_set.sources if s.path is None),
    )
    return plan, shards


def sizes_of(stamps: Iterable[str]) -> str:
    """A digest of the sizes that stamps of sources begin with."""
    sizes = [stamp.partition(":")[0] for stamp in stamps]
    return hashlib.sha256(canonical_json(sizes)).hexdigest()[:16]


def ranges_of_slice(plan: Plan, settings: ShardSettings) -> list[tuple[int, int, int]]:
    """Shard, first place and last place (exclusive) of each part of a slice."""
    size = settings.samples_per_part
    parts = [
        (index, first, min(first + size, length))
        for index, (length, _) in enumerate(plan.shards)
        for first in range(0, length, size)
    ]
    first, last = (
        k * len(parts) // settings.slice_count
        for k in (settings.slice_index, settings.slice_index + 1)
    )
    return parts[first:last]


def is_finished(place: Place, plan: Plan) -> bool:
    """Whether the set has its manifest and all shards.

    Raises:
        ShardError: It has those of other videos or settings, or a shard is missing.
    """
    found = place.names("")
    if MANIFEST_NAME not in found:
        return False
    manifest = place.manifest()
    if manifest.settings.get("plan") != plan.settings["plan"]:
        raise ShardError(
            f"{place.location} already holds shards of other videos or with other settings; "
            "remove it or choose another --out"
        )
    for entry in manifest.shards:
        if found.get(entry.name) != entry.num_bytes:
            raise ShardError(
                f"{place.location}/{entry.name} is missing or damaged; remove {place.location} "
                "and run again"
            )
    place.remove([PROGRESS_FOLDER])
    return True


def claim_folder(place: Place, plan: Plan) -> None:
    """Reserve the folder for this plan.

    Raises:
        ShardError: It holds other files, or the work of another plan.
    """
    content = canonical_json(dataclasses.asdict(plan))
    old = place.read(PLAN_NAME)
    if old is None:
        foreign = any(not is_ignored(name) for name in place.names("", folders=True))
        # Another slice may have started between the two checks.
        old = place.read(PLAN_NAME)
        if foreign and old is None:
            raise ShardError(
                f"{place.location} holds files that sharding did not write; choose another --out"
            )
        if old is None:
            place.write(PLAN_NAME, content)
            return
    if old == content:
        return
    if decode_json(old, Plan, f"{place.location}/{PLAN_NAME}", ShardError).names != plan.names:
        raise ShardError(
            f"{place.location} holds an unfinished run over other videos or with other settings; "
            "remove it or choose another --out"
        )
    # Some videos changed: what was made of them is made again.
    place.write(PLAN_NAME, content)


def read_record(
    place: Place, found: dict[str, int], tars: dict[str, int], index: int, plan: Plan
) -> ShardRecord | None:
    """The record of a finished shard, if its files exist and its videos have the same sizes.

    Raises:
        ShardError: It was made by a run with other videos or settings, or is damaged.
    """
    name = record_name(index)
    if Path(name).name not in found:
        return None
    record = read_json(place, name, ShardRecord)
    if record is None:
        return None
    _check_plan(record.plan, plan, name)
    entry = record.entry
    if entry is not None:
        tar = checked_name(entry.name, "shard", name, ShardError)
        if tars.get(tar) != entry.num_bytes:
            return None
        if tar.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX not in tars:
            return None
    return record if record.sizes == plan.shards[index][1] else None


def read_part(place: Place, found: dict[str, int], name: str, plan: Plan) -> PartRecord | None:
    """The record of a finished part, if its file exists.

    Raises:
        ShardError: It was made by a run with other videos or settings, or is damaged.
    """
    file = Path(name).name
    part = read_json(place, f"{name}.json", PartRecord) if f"{file}.json" in found else None
    if part is None or found.get(file) != part.num_bytes:
        return None
    _check_plan(part.plan, plan, f"{name}.json")
    return part


def read_json(place: Place, name: str, kind: type[RecordT]) -> RecordT | None:
    """Read a record of ours; None if it is missing.

    Raises:
        ShardError: It is damaged.
    """
    content = place.read(name)
    where = f"{place.location}/{name}"
    return None if content is None else decode_json(content, kind, where, ShardError)


def _check_plan(names: str, plan: Plan, where: str) -> None:
    if names != plan.names:
        raise ShardError(
            f"{where} comes from a slice that saw other videos or had other settings; all slices "
            "need the same command and the same videos: remove what that slice wrote, run it again"
        )
