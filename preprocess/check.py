"""Read a finished shard folder anew and name every fault in it."""

import io
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import av.error
import numpy as np
from PIL import Image

from strata.errors import ShardError, VideoFault
from strata.files import sha256_of
from strata.foreign import measure_video, video_ext
from strata.limits import usable_cpus
from strata.preprocess.listing import is_ignored
from strata.preprocess.manifest import digest_of, manifest_json, rows_json
from strata.preprocess.tars import Member, index_text, read_tar
from strata.schema import (
    FACTS_EXT,
    FRAMES_EXT,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    SAMPLES_NAME,
    SHARD_SUFFIX,
    FrameTable,
    Manifest,
    SourceRow,
    read_manifest,
    segment_ext,
)
from strata.strip import parse_strip

__all__ = ["check_folder"]


def check_folder(folder: Path, *, decode: int = 64, seed: int = 0, workers: int = 0) -> list[str]:
    """Hash every file and decode a sample of the videos.

    Args:
        folder: A finished shard folder.
        decode: How many samples to decode; -1 for all.
        seed: Which ones.
        workers: Threads; 0 for one on each CPU.

    Returns:
        One line for each fault; empty if there is none.

    Raises:
        ShardError: There is no manifest to hold the folder against.
    """
    manifest = read_manifest(folder)
    faults = list(_check_manifest(folder, manifest))
    rows: list[list[SourceRow]] = [[] for _ in manifest.shards]
    for row in manifest.written:
        if row.shard is None or not 0 <= row.shard < len(rows):
            faults.append(f"{SAMPLES_NAME}: {row.source} is in shard {row.shard}, there is none")
        else:
            rows[row.shard].append(row)
    every = [(s, p) for s, part in enumerate(rows) for p in range(len(part))]
    count = len(every) if decode < 0 else min(decode, len(every))
    chosen: list[set[int]] = [set() for _ in rows]
    for shard, position in random.Random(seed).sample(every, count):
        chosen[shard].add(position)

    def check(shard: int) -> list[str]:
        return list(_check_shard(folder, manifest, shard, rows[shard], chosen[shard]))

    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        for found in pool.map(check, range(len(rows))):
            faults.extend(found)
    known = {MANIFEST_NAME, SAMPLES_NAME}
    for entry in manifest.shards:
        known |= {entry.name, Path(entry.name).with_suffix(INDEX_SUFFIX).name}
    if manifest.form.payload == "foreign":  # A tar of rejected samples alone is no shard.
        known |= {row.source.partition("/")[0] for row in manifest.rows}
    for path in sorted(folder.iterdir()):
        if path.name not in known and not is_ignored(path.name) and not _is_empty(path, manifest):
            faults.append(f"{path.name}: the manifest does not know it; remove it")
    return faults


def _is_empty(path: Path, manifest: Manifest) -> bool:
    """Whether a file is a tar of others without a sample, which the manifest does not name."""
    if manifest.form.payload != "foreign" or path.suffix.lower() != SHARD_SUFFIX:
        return False
    try:
        return not read_tar(path).samples
    except ShardError:
        return False


def _check_manifest(folder: Path, manifest: Manifest) -> Iterator[str]:
    if digest_of(manifest) != manifest.digest:
        yield f"{MANIFEST_NAME} or {SAMPLES_NAME}: the digest is not that of their content"
    for name, expected in (
        (MANIFEST_NAME, manifest_json(manifest)),
        (SAMPLES_NAME, rows_json(manifest)),
    ):
        if (folder / name).read_bytes() != expected:
            yield f"{name}: its bytes are not those that its content has when it is written"


def _check_shard(
    folder: Path, manifest: Manifest, number: int, rows: Sequence[SourceRow], chosen: set[int]
) -> Iterator[str]:
    entry = manifest.shards[number]
    path = folder / entry.name
    index_path = path.with_suffix(INDEX_SUFFIX)
    if not path.is_file():
        yield f"{entry.name}: missing"
        return
    size = path.stat().st_size
    if size != entry.num_bytes:
        yield f"{entry.name}: {size} bytes, the manifest says {entry.num_bytes}"
    if sha256_of(path) != entry.sha256:
        yield f"{entry.name}: its SHA-256 is not what the manifest says"
    try:
        is_foreign = manifest.form.payload == "foreign"
        samples = read_tar(path, dotted_keys=is_foreign).samples
    except ShardError as error:
        yield f"{entry.name}: {error}"
        return
    if is_foreign:  # Samples that cannot be used are not in the index.
        keys = {row.key for row in rows}
        samples = [s for s in samples if s.key in keys]
    num_samples = len(samples)
    if not index_path.is_file():
        yield f"{index_path.name}: missing"
    elif index_path.read_bytes() != index_text(samples):
        yield f"{index_path.name}: not the index of {entry.name}"
    positions = [row.position for row in rows]
    if not num_samples == entry.num_samples == len(rows) or positions != list(range(len(rows))):
        yield (
            f"{entry.name}: {num_samples} samples, the manifest says {entry.num_samples}, "
            f"{SAMPLES_NAME} {len(rows)}"
        )
        return
    # The tar's own structure is sound, so the members can be found by it and not by the index.
    with path.open("rb") as file:
        for position, (row, sample) in enumerate(zip(rows, samples, strict=True)):
            members = sample.members
            if sample.key != row.key:
                yield f"{entry.name}: sample {position} is {sample.key}, expected key {row.key}"
                continue

            def content(ext: str, members: dict[str, Member] = members) -> bytes:
                file.seek(members[ext].offset)
                return file.read(members[ext].size)

            try:
                if manifest.form.payload == "foreign":
                    if position in chosen:
                        _check_foreign(row, content(video_ext(members) or "mp4"))
                    continue
                table = _check_facts(manifest, row, content(FRAMES_EXT), content(FACTS_EXT))
                exts = [segment_ext(k, manifest.form.payload) for k in range(table.num_segments)]
                if list(members) != [*exts, FRAMES_EXT, FACTS_EXT]:
                    raise ShardError(f"members are {', '.join(members)}")
                if position in chosen:
                    for segment, ext in enumerate(exts):
                        _check_segment(manifest, table, segment, content(ext))
            except KeyError as error:
                yield f"{entry.name}: {row.key} has no member {error}"
            except (ShardError, OSError, ValueError, av.error.FFmpegError) as error:
                yield f"{entry.name}: {row.key}: {error}"
            except VideoFault as fault:
                yield f"{entry.name}: {row.key}: {fault.detail}"


def _check_foreign(row: SourceRow, content: bytes) -> None:
    """Decode a video of others in full."""
    found = measure_video(content, row.source).num_frames
    if found != row.num_frames:
        raise ShardError(f"{found} frames decode, the manifest says {row.num_frames}")


def _check_facts(manifest: Manifest, row: SourceRow, table: bytes, facts: bytes) -> FrameTable:
    """Hold the small members of a sample against its row."""
    frames = FrameTable.from_bytes(table)
    form = manifest.form
    found = (frames.num_frames, frames.label, frames.width, frames.height)
    if (*found, frames.frames_per_segment) != (
        row.num_frames,
        row.label,
        form.width,
        form.height,
        form.frames_per_segment,
    ):
        raise ShardError("the frame table is not what the manifest says")
    told = json.loads(facts)
    expected = {"key": row.key, "label": row.label, "num_frames": row.num_frames}
    wrong = [name for name, value in expected.items() if told.get(name) != value]
    if wrong:
        raise ShardError(f"the facts' {' and '.join(wrong)} are not what the manifest says")
    return frames


def _check_segment(manifest: Manifest, table: FrameTable, segment: int, content: bytes) -> None:
    """Decode one segment in full."""
    form = manifest.form
    first = segment * form.frames_per_segment
    here = slice(first, first + form.frames_per_segment)
    offsets, lengths = table.offsets[here], table.lengths[here]
    if form.payload == "jpeg":
        found = parse_strip(content)
        if not (np.array_equal(found[0], offsets) and np.array_equal(found[1], lengths)):
            raise ShardError(f"segment {segment}: the frames are not where the table says")
        picture = Image.open(io.BytesIO(content))
        picture.load()
        num_rows = len(offsets) * form.height
        if picture.size != (form.width, num_rows):
            raise ShardError(f"segment {segment}: {picture.size}, expected {form.width, num_rows}")
        return
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        sizes = {(f.width, f.height) for f in container.decode(stream)} or {(0, 0)}
        container.seek(0)
        packets = [(p.pos or 0, p.size) for p in container.demux(stream) if p.size]
    if packets != list(zip(offsets.tolist(), lengths.tolist(), strict=True)):
        raise ShardError(f"segment {segment}: the frames are not where the table says")
    if sizes != {(form.width, form.height)}:
        raise ShardError(f"segment {segment}: pictures of {sizes}")
