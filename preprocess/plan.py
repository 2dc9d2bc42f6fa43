"""What a run will make and what there is of it: the plan, its parts and their records."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
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
from strata.preprocess.part import PROGRESS_FOLDER, PartRecord, Range, encoder_versions
from strata.preprocess.places import Place
from strata.preprocess.settings import ShardSettings
from strata.untrusted import checked_name, decode_json

__all__ = [
    "PLAN_NAME",
    "Finished",
    "Plan",
    "claim_folder",
    "is_finished",
    "make_plan",
    "plan_shards",
    "ranges_of_slice",
    "read_json",
]

T = TypeVar("T")
RecordT = TypeVar("RecordT", PartRecord, ShardRecord)
_PART_NAME = re.compile(r"shard-(\d+)\.(\d+)-(\d+)\.part")

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
        shards=tuple((len(shard), _sizes_of(s.stamp for s in shard)) for shard in shards),
        absent=tuple((s.name, s.label) for s in source_set.sources if s.path is None),
    )
    return plan, shards


def _sizes_of(stamps: Iterable[str]) -> str:
    """A digest of the sizes that stamps of sources begin with; empty if one is not known."""
    sizes = [stamp.partition(":")[0] for stamp in stamps]
    return "" if "" in sizes else hashlib.sha256(canonical_json(sizes)).hexdigest()[:16]


def ranges_of_slice(plan: Plan, settings: ShardSettings) -> list[Range]:
    """The parts of a slice."""
    size = settings.samples_per_part
    parts = [
        Range(index, first, min(first + size, length))
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
    # In this order: another slice may start at the same time.
    foreign = any(not is_ignored(name) for name in place.names("", folders=True))
    old = read_json(place, PLAN_NAME, Plan)
    if old is None and foreign:
        raise ShardError(
            f"{place.location} holds files that sharding did not write; choose another --out"
        )
    if old is not None and old.names != plan.names:
        raise ShardError(
            f"{place.location} holds an unfinished run over other videos or with other settings; "
            "remove it or choose another --out"
        )
    # If some videos changed, what was made of them is made again.
    if old != plan:
        place.write(PLAN_NAME, canonical_json(dataclasses.asdict(plan)))


class Finished:
    """The finished shards and parts of a set.

    Args:
        place: Where they are.
        plan: Of the set.

    Raises:
        ShardError: From `shard` and `parts`: a record comes from a run with other videos or
            settings, or is damaged.
    """

    def __init__(self, place: Place, plan: Plan) -> None:
        self._place, self._plan = place, plan
        self.files = place.names("")
        """Sizes of the files in the set's folder."""
        self._found = place.names(PROGRESS_FOLDER)
        matches = (_PART_NAME.fullmatch(name) for name in sorted(self._found))
        ranges = (Range(*map(int, match.groups())) for match in matches if match)
        self._parts = {(part.shard, part.first): part for part in ranges}

    def shard(self, index: int) -> ShardRecord | None:
        """The record of a shard, if its files exist and its videos have the sizes of the plan."""
        name = record_name(index)
        record = self._record(name, ShardRecord)
        if record is None or not self._has_sizes(index, record.stamps):
            return None
        if record.entry is not None:
            tar = checked_name(record.entry.name, "shard", name, ShardError)
            if self.files.get(tar) != record.entry.num_bytes:
                return None
            if tar.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX not in self.files:
                return None
        return record

    def parts(self, wanted: Range) -> list[tuple[Range, PartRecord]]:
        """Parts that together have a range, in order; none if it has a gap."""
        parts, at = list[tuple[Range, PartRecord]](), wanted.first
        while at < wanted.last:
            part = self._parts.get((wanted.shard, at))
            record = self._record(f"{part.name}.json", PartRecord) if part else None
            if part is None or record is None or not at < part.last <= wanted.last:
                return []
            if self._found.get(Path(part.name).name) != record.num_bytes:
                return []
            parts.append((part, record))
            at = part.last
        return parts

    def all_parts(self, index: int) -> list[tuple[Range, PartRecord]]:
        """The parts of a shard, also of several slices; none if one lacks or has another size."""
        parts = self.parts(Range(index, 0, self._plan.shards[index][0]))
        stamps = [stamp for _, record in parts for stamp in record.stamps]
        return parts if self._has_sizes(index, stamps) else []

    def _has_sizes(self, index: int, stamps: Sequence[str]) -> bool:
        sizes, planned = _sizes_of(stamps), self._plan.shards[index][1]
        # A video that is gone by now has no size.
        return not sizes or not planned or sizes == planned

    def _record(self, name: str, kind: type[RecordT]) -> RecordT | None:
        if Path(name).name not in self._found:
            return None
        record = read_json(self._place, name, kind)
        if record is not None and record.plan != self._plan.names:
            raise ShardError(
                f"{name} comes from a slice that saw other videos or had other settings; all "
                "slices need the same command and the same videos: remove what that slice wrote, "
                "run it again"
            )
        return record


def read_json(place: Place, name: str, kind: type[T]) -> T | None:
    """Read a record of ours; None if it is missing.

    Raises:
        ShardError: It is damaged.
    """
    content = place.read(name)
    where = f"{place.location}/{name}"
    return None if content is None else decode_json(content, kind, where, ShardError)
