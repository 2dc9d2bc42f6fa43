"""Index and manifest for shards that somebody else wrote, without encoding anything anew."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from strata.errors import FaultKind, ShardError, VideoFault
from strata.files import sha256_of, write_atomic
from strata.foreign import ForeignFacts, decode_frames, measure_video, video_ext
from strata.index import SampleMembers, parse_index
from strata.manifest import build_manifest, write_manifest
from strata.preprocess.check import index_of
from strata.schema import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    MAX_CLASSES,
    NO_LABEL,
    Manifest,
    NormalForm,
    ShardEntry,
    SourceRow,
    checksum,
)
from strata.untrusted import checked_name, checked_text

__all__ = ["index_folder"]

_LABEL_EXTS = ("cls", "json")
_MAX_LABEL_BYTES = 1 << 20
_MAX_LABEL_LENGTH = 255
_TIMED_SAMPLES = 8
_CLIP_FRAMES = 32


@dataclass(frozen=True, kw_only=True)
class _Foreign:
    """A sample of a foreign shard."""

    key: str
    label: str | None
    """As it is written: a number or a name."""
    class_name: str | None
    facts: ForeignFacts | None
    video_bytes: int
    checksum: int | None
    """Of the video's bytes."""
    fault: VideoFault | None


def index_folder(
    folder: Path, form: NormalForm, classes: Sequence[str] = (), workers: int = 0
) -> tuple[Manifest, str]:
    """Write an index beside every tar of a folder, and a manifest over them.

    Every video is decoded once, in full: so its number of frames is known to the one, and what
    does not decode is rejected, named, and left out of the index.

    Args:
        folder: Holds WebDataset tars whose samples have one video member (`.mp4`, ...) and a label
            in a `.cls` member or in `.json` as `label` or `cls`: a number or a name.
        form: What the loader is to make of the videos; its payload is `foreign`.
        classes: Class names by number; without, they are found in the samples.
        workers: Threads; 0 for one on each CPU.

    Returns:
        The manifest; and what was found and what it costs to read it, in lines for a person.

    Raises:
        ShardError: There are no tars, one cannot be read, the folder has a manifest already, or
            labels contradict each other or `classes`.
    """
    if not folder.is_dir():
        raise ShardError(f"shard folder {folder} does not exist; mend the path")
    if (folder / MANIFEST_NAME).exists():
        raise ShardError(f"{folder} has a {MANIFEST_NAME} already; remove it to index again")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder} holds no *.tar; give the folder of the shards")
    for path in tars:
        checked_name(path.name, "shard", folder, ShardError)
    found: list[list[_Foreign]] = []
    start_s = time.perf_counter()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "foreign") as pool:
        for path in tars:
            samples = _members(path)
            found.append(list(pool.map(partial(_measure, path, form), samples)))
    seconds = time.perf_counter() - start_s
    every = [s for samples in found for s in samples]
    good = [s for s in every if s.facts is not None]
    if not good:
        detail = f", first {every[0].fault}" if every else ""
        raise ShardError(f"{folder}: no sample has a video that can be used{detail}")
    names, numbers = _classes(folder, every, classes)
    rows, entries = [], []
    for path, samples in zip(tars, found, strict=True):
        rows += _rows(path.name, samples, numbers, len(entries))
        kept = [s for s in samples if s.facts is not None]
        if not kept:
            continue
        index, _ = index_of(path, {s.key for s in kept})
        write_atomic(path.with_suffix(INDEX_SUFFIX), index)
        entries.append(
            ShardEntry(
                name=path.name,
                num_samples=len(kept),
                num_frames=sum(s.facts.num_frames for s in kept if s.facts),
                num_bytes=path.stat().st_size,
                sha256=sha256_of(path),
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )
    sizes = Counter((s.facts.width, s.facts.height) for s in good if s.facts)
    manifest = build_manifest(
        dataset="foreign",
        split=folder.name,
        form=replace(form, payload="foreign"),
        classes=names,
        shards=entries,
        settings={"sizes": {f"{w}x{h}": count for (w, h), count in sorted(sizes.items())}},
        rows=rows,
    )
    write_manifest(manifest, folder)
    return manifest, _report(folder, every, manifest, sizes, _cost(tars, found, form), seconds)


def _members(path: Path) -> list[SampleMembers]:
    """Keys of a tar's samples with the place of each member.

    Raises:
        ShardError: It is no tar, or one key comes twice.
    """
    index, _ = index_of(path)
    samples = parse_index(index, path, path.stat().st_size)
    twice = [key for key, count in Counter(key for key, _ in samples).items() if count > 1]
    if twice:
        raise ShardError(
            f"{path}: the members of {twice[0]} do not stand together, or two samples have this "
            "name; write the tar again"
        )
    return samples


def _measure(path: Path, form: NormalForm, sample: SampleMembers) -> _Foreign:
    key, members = sample

    def content(ext: str) -> bytes:
        offset, size = members[ext]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    source, ext = f"{path.name}/{key}", video_ext(members)
    label, class_name, facts, fault, video_checksum = None, None, None, None, None
    try:
        told = {e.lower(): e for e in members if e.lower() in _LABEL_EXTS}
        large = [e for e in told.values() if members[e][1] > _MAX_LABEL_BYTES]
        if large:
            detail = f"member {large[0]} has more than {_MAX_LABEL_BYTES} bytes"
            raise VideoFault(FaultKind.UNREADABLE, source, detail)
        label, class_name = _label({lower: content(e) for lower, e in told.items()}, source)
        if ext is None:
            exts = ", ".join(sorted(members))
            raise VideoFault(FaultKind.NO_VIDEO_STREAM, source, f"the members are {exts}")
        video = content(ext)
        facts, video_checksum = measure_video(video, source), checksum(video)
        if facts.num_frames < form.min_frames:
            detail = f"{facts.num_frames} frames, {form.min_frames} asked for"
            raise VideoFault(FaultKind.TOO_SHORT, source, detail)
    except VideoFault as error:
        facts, fault = None, error
    return _Foreign(
        key=key,
        label=label,
        class_name=class_name,
        facts=facts,
        video_bytes=members[ext][1] if ext else 0,
        checksum=video_checksum,
        fault=fault,
    )


def _label(members: dict[str, bytes], source: str) -> tuple[str | None, str | None]:
    """The label as it is written, and the name of its class if that is told beside it.

    Raises:
        VideoFault: The JSON member is not valid, or the label is too long or too large.
    """
    facts: Any = {}
    if "json" in members:
        try:
            # Not msgspec: others write NaN, which is none of JSON, in fields that are not used.
            facts = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            detail = f"the json member is not valid: {error}"
            raise VideoFault(FaultKind.UNREADABLE, source, detail) from error
    if not isinstance(facts, dict):
        facts = {}
    name = facts.get("class_name")
    text = members.get("cls", b"").decode("utf-8", "replace")
    for value in (text, facts.get("label"), facts.get("cls")):
        if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip():
            label = str(value).strip()
            is_number = label.isdecimal()
            if len(label) > _MAX_LABEL_LENGTH or (is_number and int(label) >= MAX_CLASSES):
                detail = f"the label {label[:20]} is too {'large' if is_number else 'long'}; use "
                detail += f"numbers below {MAX_CLASSES} or names"
                raise VideoFault(FaultKind.UNREADABLE, source, detail)
            return label, name if isinstance(name, str) else None
    return None, None


def _classes(
    folder: Path, samples: Sequence[_Foreign], given: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """Class names by number, and the number of each label as it is written.

    Raises:
        ShardError: Numbers and names are mixed, or a label is none of the classes given.
    """
    labels = sorted({s.label for s in samples if s.label is not None} - {str(NO_LABEL)})
    numeric = [label for label in labels if label.isdecimal()]
    if numeric and len(numeric) != len(labels):
        other = next(label for label in labels if not label.isdecimal())
        raise ShardError(
            f"{folder}: labels are numbers ({numeric[0]}) and names ({other}); write one kind"
        )
    if not numeric:
        names = list(given) or labels
        numbers = {name: k for k, name in enumerate(names)}
    else:
        told = {int(s.label): s.class_name for s in samples if s.label in numeric and s.class_name}
        count = max(map(int, numeric)) + 1
        names = list(given) or [told.get(k) or str(k) for k in range(count)]
        numbers = {label: int(label) for label in numeric if int(label) < len(names)}
    unknown = [label for label in labels if label not in numbers]
    if unknown:
        raise ShardError(
            f"{folder}: label {unknown[0]} is none of the {len(names)} classes given; mend "
            "--classes"
        )
    if len(names) > MAX_CLASSES:
        raise ShardError(f"{folder}: {len(names)} classes; at most {MAX_CLASSES} are possible")
    for name in names:
        checked_text(name, "class", folder, ShardError)
    return names, numbers


def _rows(
    tar: str, samples: Sequence[_Foreign], numbers: dict[str, int], shard: int
) -> list[SourceRow]:
    rows, position = [], 0
    for sample in samples:
        row = SourceRow(
            source=f"{tar}/{sample.key}",
            status="rejected",
            label=numbers.get(sample.label or "", NO_LABEL),
        )
        if sample.fault is not None:
            row = replace(row, reason=sample.fault.kind.value, detail=sample.fault.detail)
        elif sample.facts is not None:
            row = replace(
                row,
                status="written",
                key=sample.key,
                num_frames=sample.facts.num_frames,
                shard=shard,
                position=position,
                checksum=sample.checksum,
            )
            position += 1
        rows.append(row)
    return rows


def _cost(
    tars: Sequence[Path], found: Sequence[Sequence[_Foreign]], form: NormalForm
) -> tuple[float, float]:
    """Milliseconds of one core and frames decoded for a clip from the middle of a video."""
    good = [(p, s) for p, samples in zip(tars, found, strict=True) for s in samples if s.facts]
    times, counts = [], []
    for path, sample in good[:: max(len(good) // _TIMED_SAMPLES, 1)][:_TIMED_SAMPLES]:
        members = dict(_members(path))[sample.key]
        offset, size = members[video_ext(members) or ""]
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        total = sample.facts.num_frames if sample.facts else 0
        first = max((total - _CLIP_FRAMES) // 2, 0)
        frames = np.arange(first, min(first + _CLIP_FRAMES, total))
        start_s = time.thread_time()
        _, count = decode_frames(content, sample.key, total, frames, form)
        times.append(time.thread_time() - start_s)
        counts.append(count)
    return 1000 * float(np.mean(times)), float(np.mean(counts))


def _report(
    folder: Path,
    samples: Sequence[_Foreign],
    manifest: Manifest,
    sizes: Counter[tuple[int, int]],
    cost: tuple[float, float],
    seconds: float,
) -> str:
    written = manifest.written
    frames = sum(row.num_frames for row in written)
    per_frame = sum(s.video_bytes for s in samples if s.facts) / frames
    labelled = sum(row.label != NO_LABEL for row in written)
    faults = [s.fault for s in samples if s.fault]
    lines = [
        f"foreign shards -> {folder}",
        f"  {len(written):,} samples in {len(manifest.shards):,} tars, {labelled:,} with a label "
        f"of {len(manifest.classes):,} classes, {frames:,} frames, {per_frame:,.0f} bytes each",
        "  sizes: " + ", ".join(f"{w}x{h} ({n:,})" for (w, h), n in sizes.most_common(4)),
        f"  rejected: {len(faults):,}, left out of the index",
    ]
    lines += [f"    {fault}" for fault in faults[:10]]
    if len(faults) > 10:
        lines.append("    ...")
    lines.append(
        f"  cost: a training sample takes {cost[0]:.1f} ms of one core to decode and scale, as "
        f"{cost[1]:.0f} frames are decoded for {_CLIP_FRAMES}; it is paid in every epoch. Unpacked "
        "and sharded by tools/shard.py folder, only frames that are used are decoded"
    )
    lines.append(f"  every video decoded once in {seconds:,.1f} s")
    return "\n".join(lines)
