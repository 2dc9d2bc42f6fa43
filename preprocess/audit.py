"""Audit a finished shard folder: read every file once and list all faults."""

import hashlib
import io
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import av
import av.error
import numpy as np
from PIL import Image

from strata.errors import ShardError, VideoFault
from strata.format.index import SampleMembers, escape_name, parse_index
from strata.format.manifest import manifest_json, read_manifest, rows_json
from strata.format.schema import (
    FACTS_EXT,
    FRAMES_EXT,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    SAMPLES_NAME,
    SHARD_SUFFIX,
    FrameTable,
    Manifest,
    SampleFacts,
    ShardEntry,
    SourceRow,
    checksum,
    segment_checksums,
    segment_ext,
)
from strata.format.shard_tar import BLOCK, member_header
from strata.format.source_video import measure_video, video_ext
from strata.format.strip_jpeg import check_head, parse_strip
from strata.limits import usable_cpus
from strata.preprocess.datasets.listing import is_ignored
from strata.preprocess.existing_tars import index_text, read_tar
from strata.untrusted import decode_json

__all__ = ["check_folder"]

_CHUNK_BYTES = 1 << 20


def check_folder(folder: Path, *, decode: int = 64, seed: int = 0, workers: int = 0) -> list[str]:
    """Read every file once; compare all hashes and checksums; decode a sample of the videos.

    Args:
        folder: A finished shard folder.
        decode: How many samples to decode; -1 for all.
        seed: Seed that chooses the samples.
        workers: Threads; 0 for one on each CPU.

    Returns:
        One line for each fault; empty if there is none.

    Raises:
        ShardError: The manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    faults = list(_check_manifest(folder, manifest))
    rows: list[list[SourceRow]] = [[] for _ in manifest.shards]
    for row in manifest.written:
        rows[row.shard or 0].append(row)
    every = [(s, p) for s, part in enumerate(rows) for p in range(len(part))]
    count = len(every) if decode < 0 else min(decode, len(every))
    chosen: list[set[int]] = [set() for _ in rows]
    for shard, position in random.Random(seed).sample(every, count):
        chosen[shard].add(position)

    def check(shard: int) -> list[str]:
        return _check_shard(folder, manifest, shard, rows[shard], chosen[shard])

    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        for found in pool.map(check, range(len(rows))):
            faults.extend(found)
    known = {MANIFEST_NAME, SAMPLES_NAME}
    for entry in manifest.shards:
        known |= {entry.name, Path(entry.name).with_suffix(INDEX_SUFFIX).name}
    if manifest.form.payload == "foreign":  # A tar in which all samples were rejected is no shard.
        known |= {row.source.partition("/")[0] for row in manifest.rows}
    for path in sorted(folder.iterdir()):
        if path.name not in known and not is_ignored(path.name) and not _is_empty(path, manifest):
            faults.append(f"{path.name}: the manifest does not know it; remove it")
    return faults


def _is_empty(path: Path, manifest: Manifest) -> bool:
    """Whether a file is a foreign tar without a sample, which the manifest does not name."""
    if manifest.form.payload != "foreign" or path.suffix.lower() != SHARD_SUFFIX:
        return False
    try:
        return not read_tar(path).samples
    except ShardError:
        return False


def _check_manifest(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, expected in (
        (MANIFEST_NAME, manifest_json(manifest)),
        (SAMPLES_NAME, rows_json(manifest)),
    ):
        if (folder / name).read_bytes() != expected:
            yield f"{name}: its bytes are not those that its content has when it is written"


def _check_shard(
    folder: Path, manifest: Manifest, number: int, rows: Sequence[SourceRow], chosen: set[int]
) -> list[str]:
    entry = manifest.shards[number]
    path = folder / entry.name
    faults: list[str] = []
    if not path.is_file():
        return [f"{entry.name}: missing"]
    size = path.stat().st_size
    if size != entry.num_bytes:
        faults.append(f"{entry.name}: {size} bytes, the manifest says {entry.num_bytes}")
    samples: list[SampleMembers] = []
    try:
        samples = _members(path, manifest, entry, rows, faults)
        keys = [key for key, _ in samples]
        if keys != [row.key for row in rows]:
            wrong = [
                k for k, (key, row) in enumerate(zip(keys, rows, strict=False)) if key != row.key
            ]
            where = f", sample {wrong[0]} is {keys[wrong[0]]}, expected key {rows[wrong[0]].key}"
            faults.append(
                f"{entry.name}: {len(keys)} samples, the manifest says {len(rows)}"
                + (where if wrong else "")
            )
            samples = []
    except ShardError as error:
        faults.append(f"{entry.name}: {error}")
    checked = _ShardPass(manifest, entry)
    with path.open("rb", buffering=0) as file:
        checked.run(file, rows, samples, chosen)
    is_other = checked.sha256 != entry.sha256
    if is_other and manifest.schema == 1 and samples and not checked.faults:
        # Schema 1 has no checksums: only decoding shows which samples are damaged.
        with path.open("rb", buffering=0) as file:
            checked.run(file, rows, samples, set(range(len(rows))))
    faults += [f"{entry.name}: {fault}" for fault in checked.faults]
    if is_other:
        where = "" if checked.faults or not samples else "; no sample shows the damage"
        faults.append(f"{entry.name}: its SHA-256 is not what the manifest says{where}")
    return faults


def _members(
    path: Path,
    manifest: Manifest,
    entry: ShardEntry,
    rows: Sequence[SourceRow],
    faults: list[str],
) -> list[SampleMembers]:
    """Keys and members from the index if its hash is right, otherwise from the tar's headers."""
    index_path = path.with_suffix(INDEX_SUFFIX)
    found = None
    if index_path.is_file():
        found = index_path.read_bytes()
    else:
        faults.append(f"{index_path.name}: missing")
    if found is not None and entry.index_sha256 is not None:
        if hashlib.sha256(found).hexdigest() == entry.index_sha256:
            return parse_index(found, index_path, entry.num_bytes)
        faults.append(f"{index_path.name}: its SHA-256 is not what the manifest says")
    is_foreign = manifest.form.payload == "foreign"
    contents = read_tar(path, dotted_keys=is_foreign).samples
    if is_foreign:  # Samples that cannot be used are not in the index.
        keys = {row.key for row in rows}
        contents = [sample for sample in contents if escape_name(sample.key) in keys]
    index = index_text(contents)
    if found is not None and entry.index_sha256 is None and found != index:
        faults.append(f"{index_path.name}: not the index of {entry.name}")
    return parse_index(index, path, entry.num_bytes)


@dataclass
class _ShardPass:
    """One pass over a shard that hashes the file and checks each sample."""

    manifest: Manifest
    entry: ShardEntry
    faults: list[str] = field(default_factory=list)
    """One line for each faulty sample."""
    sha256: str = ""

    def run(
        self,
        file: IO[bytes],
        rows: Sequence[SourceRow],
        samples: Sequence[SampleMembers],
        chosen: set[int],
    ) -> None:
        """Read the complete file.

        Args:
            file: The shard.
            rows: Its samples as the manifest lists them.
            samples: Its samples as the index lists them.
            chosen: Positions of the samples to decode.
        """
        self._file, self._place, self._digest = file, 0, hashlib.sha256()
        for position, (row, (key, members)) in enumerate(zip(rows, samples, strict=False)):
            try:
                if self.manifest.form.payload == "foreign":
                    self._check_foreign(row, members, position in chosen)
                else:
                    self._check_sample(row, members, position in chosen)
            except KeyError as error:
                self.faults.append(f"{key} has no member {error}")
            except (ShardError, OSError, ValueError, SyntaxError, av.error.FFmpegError) as error:
                self.faults.append(f"{key}: {error}")
            except VideoFault as fault:
                self.faults.append(f"{key}: {fault.detail}")
            if self.manifest.form.payload != "foreign":
                # After a fault the rest of the sample is hashed too, so that the next sample is
                # read from its start.
                self._skip_to(max(offset + size for offset, size in members.values()))
        while self._read(_CHUNK_BYTES):
            pass
        self.sha256 = self._digest.hexdigest()

    def _read(self, num_bytes: int) -> bytes:
        parts = []
        while num_bytes and (part := self._file.read(num_bytes)):
            self._digest.update(part)
            self._place += len(part)
            num_bytes -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _skip_to(self, place: int) -> None:
        while place > self._place and self._read(min(place - self._place, _CHUNK_BYTES)):
            pass

    def _content(self, key: str, ext: str, place: tuple[int, int]) -> bytes:
        """The next member.

        Raises:
            ShardError: It is cut off, or its header in the tar is another.
        """
        offset, size = place
        if self.manifest.form.payload == "foreign":
            if offset < self._place:  # A link in the tar refers to an earlier member.
                return os.pread(self._file.fileno(), size, offset)
            self._skip_to(offset - BLOCK)  # Skip samples that are not in the index.
        before = self._read(max(offset - self._place, 0))
        if self._place > offset:
            raise ShardError(f"member {ext} lies within the one before it")
        content = self._read(size)
        if len(content) != size:
            raise ShardError(f"member {ext} is cut off")
        if self.manifest.schema > 1 and self.manifest.form.payload != "foreign":
            header = member_header(f"{key}.{ext}", size)
            if before[-BLOCK:] != header or any(before[:-BLOCK]):
                raise ShardError(f"the tar's header of member {ext} is damaged")
        return content

    def _check_foreign(
        self, row: SourceRow, members: dict[str, tuple[int, int]], decode: bool
    ) -> None:
        """Compare a foreign video with its checksum; decode it in full."""
        ext = video_ext(members) or "mp4"
        content = self._content(row.key or "", ext, members[ext])
        if row.checksum is not None and checksum(content) != row.checksum:
            raise ShardError("the video is damaged, its checksum differs")
        if decode:
            found = measure_video(content, row.source).num_frames
            if found != row.num_frames:
                raise ShardError(f"{found} frames decode, the manifest says {row.num_frames}")

    def _check_sample(
        self, row: SourceRow, members: dict[str, tuple[int, int]], decode: bool
    ) -> None:
        """Compare every member of a sample with its checksum and with the row."""
        form = self.manifest.form
        offset, size = members[FRAMES_EXT]
        # Read first, as it describes the segments before it.
        content = os.pread(self._file.fileno(), size, offset)
        table = FrameTable.from_bytes(content)
        table.check(form, row)
        exts = [segment_ext(k, form.payload) for k in range(table.num_segments)]
        if list(members) != [*exts, FRAMES_EXT, FACTS_EXT]:
            raise ShardError(f"members are {', '.join(members)[:200]}")
        for segment, ext in enumerate(exts):
            segment_content = self._content(row.key or "", ext, members[ext])
            _check_segment(self.manifest, table, segment, segment_content)
            if decode:
                _decode_segment(self.manifest, table, segment, segment_content)
        self._content(row.key or "", FRAMES_EXT, members[FRAMES_EXT])
        _check_facts(row, table, self._content(row.key or "", FACTS_EXT, members[FACTS_EXT]))


def _check_facts(row: SourceRow, table: FrameTable, facts: bytes) -> None:
    """Compare the JSON member with the row and its checksum.

    Raises:
        ShardError: They disagree.
    """
    if table.checksums is not None and checksum(facts) != table.checksums.facts:
        raise ShardError("the facts are damaged, their checksum differs")
    stored = vars(decode_json(facts, SampleFacts, "the facts", ShardError))
    expected = {"key": row.key, "label": row.label, "num_frames": row.num_frames}
    wrong = [name for name, value in expected.items() if stored[name] != value]
    if wrong:
        raise ShardError(f"the facts' {' and '.join(wrong)} are not what the manifest says")


def _check_segment(manifest: Manifest, table: FrameTable, segment: int, content: bytes) -> None:
    """Compare one segment with the table, without decoding it.

    Raises:
        ShardError: They disagree.
    """
    form, here = manifest.form, table.segment(segment)
    offsets, lengths = table.offsets[here], table.lengths[here]
    if form.payload == "jpeg":
        found = parse_strip(content)
        if not (np.array_equal(found[0], offsets) and np.array_equal(found[1], lengths)):
            raise ShardError(f"segment {segment}: the frames are not where the table says")
        check_head(content[: int(offsets[0])], form.width, form.height)
    if table.checksums is None:
        return
    frames, head = segment_checksums(content, offsets, lengths, form.payload)
    if head != int(table.checksums.heads[segment]):
        raise ShardError(f"segment {segment}: the header is damaged, its checksum differs")
    wrong = np.flatnonzero(frames != table.checksums.frames[here])
    if len(wrong):
        raise ShardError(
            f"segment {segment}: {len(wrong)} frames are damaged, their checksums differ, first "
            f"frame {here.start + int(wrong[0])}"
        )


def _decode_segment(manifest: Manifest, table: FrameTable, segment: int, content: bytes) -> None:
    """Decode one segment in full.

    Raises:
        ShardError: It has other frames than the table says.
    """
    form, here = manifest.form, table.segment(segment)
    if form.payload == "jpeg":
        num_rows = (here.stop - here.start) * form.height
        with Image.open(io.BytesIO(content)) as picture:
            if picture.size != (form.width, num_rows):
                raise ShardError(
                    f"segment {segment}: {picture.size}, expected {form.width, num_rows}"
                )
            picture.load()
        return
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        sizes = {(f.width, f.height) for f in container.decode(stream)} or {(0, 0)}
        container.seek(0)
        packets = [(p.pos or 0, p.size) for p in container.demux(stream) if p.size]
    if packets != list(
        zip(table.offsets[here].tolist(), table.lengths[here].tolist(), strict=True)
    ):
        raise ShardError(f"segment {segment}: the frames are not where the table says")
    if sizes != {(form.width, form.height)}:
        raise ShardError(f"segment {segment}: pictures of {sizes}")
