"""Write index and manifest for WebDataset shards of other programs; no video is encoded."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from strata.errors import FaultKind, ShardError, VideoFault
from strata.files import sha256_of, write_atomic
from strata.format.index import escape_name
from strata.format.manifest import build_manifest, write_manifest
from strata.format.schema import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    NO_LABEL,
    SHARD_SUFFIX,
    Manifest,
    NormalForm,
    ShardEntry,
    SourceRow,
    checksum,
)
from strata.format.source_video import ForeignFacts, decode_frames, measure_video, video_ext
from strata.limits import usable_cpus
from strata.preprocess.datasets.listing import is_ignored, name_of, some_of
from strata.preprocess.existing_labels import Label, number_classes, read_label
from strata.preprocess.existing_tars import Member, TarSample, index_text, read_tar
from strata.untrusted import checked_name, checked_text

__all__ = ["index_folder"]

_TIMED_SAMPLES = 8
_CLIP_FRAMES = 32


@dataclass(frozen=True, kw_only=True)
class _Foreign:
    """A sample of a foreign shard."""

    sample: TarSample
    label: Label | None
    facts: ForeignFacts | None = None
    checksum: int | None = None
    """Of the video's bytes."""
    fault: VideoFault | None = None

    @property
    def key(self) -> str:
        return self.sample.key

    @property
    def video(self) -> Member | None:
        """The member that is the video."""
        ext = video_ext(self.sample.members)
        return self.sample.members[ext] if ext else None


def index_folder(
    folder: Path,
    form: NormalForm,
    classes: Sequence[str] = (),
    workers: int = 0,
    out: Path | None = None,
) -> tuple[Manifest, str]:
    """Write an index for every tar of a folder, and a manifest over them.

    Every video is decoded once, completely: so its number of frames is exact, and a video that
    does not decode is rejected by name and left out of the index.

    Args:
        folder: Holds WebDataset tars whose samples have one video member (`.mp4`, ...) and a label
            in a `.cls` member or in `.json` as `label` or `cls`: a number or a name.
        form: The form to which the loader converts the videos; its payload is `foreign`.
        classes: Class names by number; if empty, they are collected from the samples.
        workers: Threads; 0 for one on each CPU.
        out: Folder for index, manifest and a link to each tar; None for the folder of the tars.

    Returns:
        The manifest; and a report of the content and of the cost of reading it, as text.

    Raises:
        ShardError: There are no tars, one cannot be read, the folder has a manifest already or
            cannot be written, or labels contradict each other or `classes`.
    """
    tars = _tars(folder)
    out = _writable(folder, out or folder)
    # Tars and labels are checked before the long decoding.
    contents = [read_tar(path) for path in tars]
    found = [
        [_Foreign(sample=s, label=read_label(path, s)) for s in content.samples]
        for path, content in zip(tars, contents, strict=True)
    ]
    names, numbers = number_classes([s.label for samples in found for s in samples], classes)
    start_s = time.perf_counter()
    with ThreadPoolExecutor(workers or usable_cpus(), "foreign") as pool:
        found = [
            list(pool.map(partial(_measure, path, form), samples))
            for path, samples in zip(tars, found, strict=True)
        ]
    seconds = time.perf_counter() - start_s
    every = [s for samples in found for s in samples]
    good = [s for s in every if s.facts is not None]
    if not good:
        detail = f", first {every[0].fault}" if every else ""
        raise ShardError(f"{folder}: no sample has a video that can be used{detail}")
    rows, entries = [], []
    for path, samples in zip(tars, found, strict=True):
        rows += _rows(path.name, samples, numbers, len(entries))
        kept = [s.sample for s in samples if s.facts is not None]
        if not kept:
            continue
        if out != folder:
            _link(out / path.name, path.resolve())
        index = index_text(kept)
        write_atomic((out / path.name).with_suffix(INDEX_SUFFIX), index)
        entries.append(
            ShardEntry(
                name=path.name,
                num_samples=len(kept),
                num_frames=sum(s.facts.num_frames for s in samples if s.facts),
                num_bytes=path.stat().st_size,
                sha256=sha256_of(path),
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )
    sizes = Counter((s.facts.width, s.facts.height) for s in good if s.facts)
    manifest = build_manifest(
        dataset="foreign",
        split=name_of(folder.resolve().name),
        form=replace(form, payload="foreign"),
        classes=names,
        shards=entries,
        settings={"sizes": {f"{w}x{h}": count for (w, h), count in sorted(sizes.items())}},
        rows=rows,
    )
    for name in names:
        checked_text(name, "class", folder, ShardError)
    write_manifest(manifest, out)
    ignored = [
        f"{path.name}/{name}"
        for path, content in zip(tars, contents, strict=True)
        for name in content.ignored
    ]
    empty = [path.name for path, samples in zip(tars, found, strict=True) if not samples]
    return manifest, _report(
        out, every, manifest, sizes, _cost(tars, found, form), seconds, ignored, empty
    )


def _tars(folder: Path) -> list[Path]:
    """The tars of a folder, with checked names."""
    if not folder.is_dir():
        raise ShardError(f"shard folder {folder} does not exist; correct the path")
    files = sorted(p for p in folder.iterdir() if not is_ignored(p.name))
    tars = [p for p in files if p.suffix.lower() == SHARD_SUFFIX]
    if not tars:
        message = f"{folder} holds no *{SHARD_SUFFIX}; give the folder of the shards"
        compressed = [p.name for p in files if SHARD_SUFFIX in p.suffixes or p.suffix == ".tgz"]
        if compressed:
            message += f", decompressed (found {some_of(compressed)})"
        below = sorted({p.parent.name for p in folder.glob(f"*/*{SHARD_SUFFIX}")})
        if below:
            message += f": one of its folders {some_of(below)}"
        raise ShardError(message)
    for path in tars:
        if path.suffix != SHARD_SUFFIX:
            raise ShardError(f"{path} ends in {path.suffix}; rename it to *{SHARD_SUFFIX}")
        checked_name(path.name, "shard", folder, ShardError)
    return tars


def _writable(folder: Path, out: Path) -> Path:
    """The folder for index and manifest, which is made and checked."""
    if out != folder:
        out.mkdir(parents=True, exist_ok=True)
        if out.resolve() == folder.resolve():
            out = folder
    if (out / MANIFEST_NAME).exists():
        raise ShardError(f"{out} has a {MANIFEST_NAME} already; remove it to index again")
    if not os.access(out, os.W_OK | os.X_OK, effective_ids=True):
        raise ShardError(
            f"{out} cannot be written; give a folder for index and manifest with --index-out"
        )
    return out


def _link(link: Path, tar: Path) -> None:
    """Link a shard into another folder; readers follow links."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise ShardError(f"{link} exists and is no link; give another --index-out")
    link.symlink_to(tar)


def _measure(path: Path, form: NormalForm, foreign: _Foreign) -> _Foreign:
    source = f"{path.name}/{foreign.key}"
    try:
        if foreign.video is None:
            exts = ", ".join(sorted(foreign.sample.members))
            raise VideoFault(FaultKind.NO_VIDEO_STREAM, source, f"the members are {exts}")
        content = foreign.video.read(path)
        facts = measure_video(content, source)
        if facts.num_frames < form.min_frames:
            detail = f"{facts.num_frames} frames, {form.min_frames} asked for"
            raise VideoFault(FaultKind.TOO_SHORT, source, detail)
    except VideoFault as error:
        return replace(foreign, fault=error)
    return replace(foreign, facts=facts, checksum=checksum(content))


def _rows(
    tar: str, samples: Sequence[_Foreign], numbers: dict[str, int], shard: int
) -> list[SourceRow]:
    rows, position = [], 0
    for sample in samples:
        row = SourceRow(
            source=f"{tar}/{sample.key}",
            status="rejected",
            label=numbers[sample.label.text] if sample.label else NO_LABEL,
        )
        if sample.fault is not None:
            row = replace(row, reason=sample.fault.kind.value, detail=sample.fault.detail)
        elif sample.facts is not None:
            row = replace(
                row,
                status="written",
                key=escape_name(sample.key),
                num_frames=sample.facts.num_frames,
                shard=shard,
                position=position,
                checksum=sample.checksum,
                notes=list(sample.facts.notes) or None,
            )
            position += 1
        rows.append(row)
    return rows


def _cost(
    tars: Sequence[Path], found: Sequence[Sequence[_Foreign]], form: NormalForm
) -> tuple[float, float]:
    """Mean milliseconds of one core and mean frames decoded for a clip from a video's middle."""
    good = [(p, s) for p, samples in zip(tars, found, strict=True) for s in samples if s.facts]
    times, counts = [], []
    for path, sample in good[:: max(len(good) // _TIMED_SAMPLES, 1)][:_TIMED_SAMPLES]:
        content = sample.video.read(path) if sample.video else b""
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
    ignored: Sequence[str],
    empty: Sequence[str],
) -> str:
    written = manifest.written
    frames = sum(row.num_frames for row in written)
    per_frame = sum(s.video.size for s in samples if s.facts and s.video) / frames
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
    noted = [f"{row.source}: {'; '.join(row.notes)}" for row in written if row.notes]
    if noted:
        lines.append(f"  written with a note: {len(noted):,}")
        lines += [f"    {some_of([note])}" for note in noted[:10]]
        lines += ["    ..."] if len(noted) > 10 else []
    plain = [row.source for row in written if row.label == NO_LABEL and manifest.classes]
    for what, names in (
        ("samples have no label", plain),
        ("members are hidden, of an operating system, or without an extension: ignored", ignored),
        ("tars hold no sample", empty),
    ):
        if names:
            lines.append(f"  note: {len(names):,} {what}: {some_of(names)}")
    lines.append(
        f"  cost: a training sample takes {cost[0]:.1f} ms of one core to decode and scale, as "
        f"{cost[1]:.0f} frames are decoded for {_CLIP_FRAMES}; it is paid in every epoch. Unpacked "
        "and sharded by tools/shard.py folder, only frames that are used are decoded"
    )
    lines.append(f"  every video decoded once in {seconds:,.1f} s")
    return "\n".join(lines)
