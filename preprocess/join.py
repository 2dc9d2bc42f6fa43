"""The parts of a shard joined to its tar, with its index and its record."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

import msgspec
import xxhash

from strata.errors import ShardError
from strata.format.index import index_bytes
from strata.format.manifest import canonical_json
from strata.format.schema import INDEX_SUFFIX, SHARD_SUFFIX, ShardEntry, SourceRow
from strata.format.shard_tar import ARCHIVE_END, MemberPlace
from strata.preprocess.part import PROGRESS_FOLDER, PartRecord, Range, pieces
from strata.preprocess.places import Place, open_place
from strata.untrusted import decode_json

__all__ = ["ShardRecord", "join_parts", "record_name", "shard_name"]


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:06d}{SHARD_SUFFIX}"


def record_name(index: int) -> str:
    """The file of a finished shard's record, in the set's folder."""
    return f"{PROGRESS_FOLDER}/{shard_name(index)}.json"


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """Facts of a finished shard, stored until the manifest is written."""

    plan: str
    stamps: tuple[str, ...]
    entry: ShardEntry | None
    """None if all its videos were rejected."""
    rows: tuple[SourceRow, ...]


def join_parts(location: str, parts: Sequence[tuple[Range, PartRecord]]) -> ShardRecord:
    """Join the parts of a shard to its tar, write its index and record, and remove the parts.

    Args:
        location: Folder of the set.
        parts: All finished parts of the shard, in order.

    Raises:
        ShardError: A part is missing or damaged.
        OSError: The shard cannot be written.
    """
    place, index = open_place(location), parts[0][0].shard
    records = [record for _, record in parts]
    rows, entry, name = _rows_of_shard(records), None, shard_name(index)
    try:
        if any(record.samples for record in records):
            with place.writing(name) as tar:
                lines, sha256, num_bytes = _copy_parts(place, parts, tar)
            content = index_bytes(lines)
            place.write(name.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX, content)
            entry = ShardEntry(
                name=name,
                num_samples=len(lines),
                num_frames=sum(row.num_frames for row in rows),
                num_bytes=num_bytes,
                sha256=sha256,
                index_sha256=hashlib.sha256(content).hexdigest(),
            )
    except FileNotFoundError as error:
        # Another slice that overlaps with this one may have joined them.
        content = place.read(record_name(index))
        if content is None:
            raise ShardError(
                f"{error.filename} is missing; run the same command again, it makes it again"
            ) from error
        return decode_json(content, ShardRecord, record_name(index), ShardError)
    stamps = tuple(stamp for record in records for stamp in record.stamps)
    shard = ShardRecord(plan=records[0].plan, stamps=stamps, entry=entry, rows=rows)
    place.write(record_name(index), canonical_json(msgspec.to_builtins(shard)))
    place.remove(name for part, _ in parts for name in (f"{part.name}.json", part.name))
    return shard


def _rows_of_shard(parts: Iterable[PartRecord]) -> tuple[SourceRow, ...]:
    """The rows of all parts, with positions that count from the shard's first sample."""
    rows, before = list[SourceRow](), 0
    for part in parts:
        for row in part.rows:
            moved = None if row.position is None else before + row.position
            rows.append(dataclasses.replace(row, position=moved))
        before += len(part.samples)
    return tuple(rows)


def _copy_parts(
    place: Place, parts: Iterable[tuple[Range, PartRecord]], tar: IO[bytes]
) -> tuple[list[str], str, int]:
    """Write a shard; returns the lines of its index, its SHA-256 and its size."""
    digest, lines = hashlib.sha256(), list[str]()
    for part, record in parts:
        start, checksum = tar.tell(), xxhash.xxh3_128()
        with place.reading(part.name) as file:
            for piece in pieces(file):
                checksum.update(piece)
                digest.update(piece)
                tar.write(piece)
        if (tar.tell() - start, checksum.hexdigest()) != (record.num_bytes, record.checksum):
            place.remove([f"{part.name}.json"])
            raise ShardError(
                f"{place.location}/{part.name} was damaged after it was written; run the same "
                "command again, it makes the part again"
            )
        lines += [_index_line(members, start) for members in record.samples]
    tar.write(ARCHIVE_END)
    digest.update(ARCHIVE_END)
    return lines, digest.hexdigest(), tar.tell()


def _index_line(members: Sequence[MemberPlace], start: int) -> str:
    return " ".join(
        f"{name.partition('.')[2]} {start + offset} {size} {name}" for name, offset, size in members
    )
