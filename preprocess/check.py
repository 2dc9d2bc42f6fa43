"""Read a finished shard folder anew and name every fault in it."""

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import av.error
import numpy as np
from PIL import Image

from strata.errors import ShardError, VideoFault
from strata.foreign import measure_video, video_ext
from strata.preprocess.manifest import digest_of, manifest_json, rows_json
from strata.preprocess.shards import INDEX_VERSION
from strata.schema import (
    FACTS_EXT,
    FRAMES_EXT,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    SAMPLES_NAME,
    FrameTable,
    Manifest,
    SourceRow,
    read_manifest,
    segment_ext,
)
from strata.strip import parse_strip

__all__ = ["check_folder", "hash_file_of", "index_of", "samples_of"]


def hash_file_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key_of(name: str) -> tuple[str, str]:
    """Key and extension of a member: they part at the first dot of the last part of its path."""
    head, name = os.path.split(name)
    stem, _, ext = name.partition(".")
    return os.path.join(head, stem), ext


def index_of(tar_path: Path, keys: Container[str] | None = None) -> tuple[bytes, int]:
    """The index that belongs to a tar, as DALI's wds2idx makes it, and the samples in it.

    Args:
        tar_path: The tar.
        keys: The samples to list; without, all.

    Raises:
        OSError: The tar is not readable.
        tarfile.TarError: It is no tar.
    """
    lines: list[str] = []
    last = None
    with tarfile.open(tar_path) as tar:
        for info in tar:
            if not info.isfile():
                continue
            key, ext = _key_of(info.name)
            if keys is not None and key not in keys:
                last = key
                continue
            member = f"{ext} {info.offset_data} {info.size} {info.name}"
            if key == last:
                lines[-1] += " " + member
            else:
                lines.append(member)
            last = key
    head = f"{INDEX_VERSION} {len(lines)}\n"
    return (head + "".join(line + "\n" for line in lines)).encode(), len(lines)


def samples_of(index: bytes) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Keys of the samples in an index, with offset and size of each member by extension."""
    samples = []
    for line in index.decode().splitlines()[1:]:
        words = line.split(" ")
        members = {
            words[k]: (int(words[k + 1]), int(words[k + 2])) for k in range(0, len(words), 4)
        }
        samples.append((_key_of(words[3])[0], members))
    return samples


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

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(check, range(len(rows))):
            faults.extend(found)
    known = {MANIFEST_NAME, SAMPLES_NAME}
    for entry in manifest.shards:
        known |= {entry.name, Path(entry.name).with_suffix(INDEX_SUFFIX).name}
    if manifest.form.payload == "foreign":  # A tar of rejected samples alone is no shard.
        known |= {row.source.partition("/")[0] for row in manifest.rows}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            faults.append(f"{path.name}: the manifest does not know it; remove it")
    return faults


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
    if hash_file_of(path) != entry.sha256:
        yield f"{entry.name}: its SHA-256 is not what the manifest says"
    try:
        # Of foreign shards, those of others that cannot be used are not in the index.
        keys = {row.key for row in rows} if manifest.form.payload == "foreign" else None
        index, num_samples = index_of(path, keys)
    except (OSError, tarfile.TarError, UnicodeError) as error:
        yield f"{entry.name}: not readable as a tar ({error})"
        return
    if not index_path.is_file():
        yield f"{index_path.name}: missing"
    elif index_path.read_bytes() != index:
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
        for position, (row, (key, members)) in enumerate(zip(rows, samples_of(index), strict=True)):
            if key != row.key:
                yield f"{entry.name}: sample {position} is {key}, expected key {row.key}"
                continue

            def content(ext: str, members: dict[str, tuple[int, int]] = members) -> bytes:
                offset, size = members[ext]
                file.seek(offset)
                return file.read(size)

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
