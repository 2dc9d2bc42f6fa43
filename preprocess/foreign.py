"""Index and manifest for shards that somebody else wrote, without encoding anything anew."""

import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import av.error

from strata.errors import ShardError
from strata.preprocess.check import hash_file_of, index_of
from strata.preprocess.manifest import build_manifest, write_manifest
from strata.preprocess.shards import replace_file
from strata.schema import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    NO_LABEL,
    NormalForm,
    ShardEntry,
    SourceRow,
)

__all__ = ["index_folder"]

_VIDEO_EXTS = ("mp4", "webm", "mkv", "avi", "mov")
_TIMED_SAMPLES = 8
_CLIP_FRAMES = 16


@dataclass(frozen=True, kw_only=True)
class _Foreign:
    """A sample of a foreign shard."""

    key: str
    label: int
    class_name: str | None
    num_frames: int
    size: tuple[int, int]
    video_bytes: int
    fault: str | None


def index_folder(folder: Path) -> str:
    """Write an index beside every tar of a folder, and a manifest over them.

    Args:
        folder: Holds WebDataset tars whose samples have one video member (`.mp4`, ...) and a label
            in a `.cls` member or in `.json` as `label` or `cls`.

    Returns:
        What was found and what it costs to read it, in lines for a person.

    Raises:
        ShardError: There are no tars, one cannot be read, or the folder has a manifest already.
    """
    if not folder.is_dir():
        raise ShardError(f"shard folder {folder} does not exist; mend the path")
    if (folder / MANIFEST_NAME).exists():
        raise ShardError(f"{folder} has a {MANIFEST_NAME} already; remove it to index again")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder} holds no *.tar; give the folder of the shards")
    found: list[list[_Foreign]] = []
    entries: list[ShardEntry] = []
    clip_s: list[float] = []
    for path in tars:
        try:
            index, lines = index_of(path)
            samples = list(_samples(path, clip_s))
        except (tarfile.TarError, OSError, UnicodeError) as error:
            raise ShardError(f"{path} is not readable as a tar ({error}); copy it again") from error
        if len(samples) != lines:
            raise ShardError(f"{path}: members of one sample do not stand together; write it again")
        replace_file(path.with_suffix(INDEX_SUFFIX), index)
        entries.append(
            ShardEntry(
                name=path.name,
                num_samples=len(samples),
                num_frames=sum(s.num_frames for s in samples),
                num_bytes=path.stat().st_size,
                sha256=hash_file_of(path),
            )
        )
        found.append(samples)
    every = [s for samples in found for s in samples]
    classes = _classes(every)
    rows = [
        SourceRow(
            source=f"{entries[shard].name}/{sample.key}",
            status="written",
            key=sample.key,
            label=sample.label,
            num_frames=sample.num_frames,
            shard=shard,
            position=position,
            detail=sample.fault,
        )
        for shard, samples in enumerate(found)
        for position, sample in enumerate(samples)
    ]
    sizes = Counter(s.size for s in every if s.fault is None)
    if not sizes:
        raise ShardError(
            f"{folder}: no sample has a video that opens; members are not {_VIDEO_EXTS}"
        )
    width, height = sizes.most_common(1)[0][0]
    form = NormalForm(payload="foreign", width=width, height=height, min_frames=1)
    manifest = build_manifest(
        dataset="foreign",
        split=folder.name,
        form=form,
        classes=classes,
        shards=entries,
        settings={"sizes": {f"{w}x{h}": count for (w, h), count in sorted(sizes.items())}},
        rows=rows,
    )
    write_manifest(manifest, folder)
    return _report(folder, every, sizes, clip_s, len(tars))


def _samples(path: Path, clip_s: list[float]) -> Iterator[_Foreign]:
    key, members = "", dict[str, bytes]()
    with tarfile.open(path) as tar:
        for info in tar:
            file = tar.extractfile(info)
            if file is None:
                continue
            head, name = os.path.split(info.name)
            stem, _, ext = name.partition(".")
            this = os.path.join(head, stem)
            if members and this != key:
                yield _sample(key, members, clip_s)
                members = {}
            key = this
            members[ext.lower()] = file.read()
    if members:
        yield _sample(key, members, clip_s)


def _sample(key: str, members: dict[str, bytes], clip_s: list[float]) -> _Foreign:
    label, class_name = _label(members)
    ext = next((e for e in _VIDEO_EXTS if e in members), None)
    num_frames, size, fault = 0, (0, 0), None
    if ext is None:
        fault = f"no video member; members are {', '.join(sorted(members))}"
    else:
        try:
            num_frames, size = _measure(members[ext])
            if len(clip_s) < _TIMED_SAMPLES:
                clip_s.append(_time_clip(members[ext], num_frames))
        except (av.error.FFmpegError, OSError, IndexError) as error:
            fault = f"the video does not open: {error}"
    return _Foreign(
        key=key,
        label=label,
        class_name=class_name,
        num_frames=num_frames,
        size=size,
        video_bytes=len(members[ext]) if ext else 0,
        fault=fault,
    )


def _label(members: dict[str, bytes]) -> tuple[int, str | None]:
    facts = {}
    if "json" in members:
        try:
            facts = json.loads(members["json"])
        except ValueError:
            facts = {}
    if not isinstance(facts, dict):
        facts = {}
    name = facts.get("class_name")
    text = members["cls"].decode("utf-8", "replace") if "cls" in members else ""
    for value in (text.strip(), facts.get("label"), facts.get("cls")):
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value), name if isinstance(name, str) else None
    return NO_LABEL, None


def _measure(content: bytes) -> tuple[int, tuple[int, int]]:
    """Frames and size, without decoding."""
    with av.open(io.BytesIO(content), "r", metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        size = (stream.codec_context.width, stream.codec_context.height)
        return sum(1 for packet in container.demux(stream) if packet.size), size


def _time_clip(content: bytes, num_frames: int) -> float:
    """Seconds to decode a clip from the middle, from its key frame on."""
    start_s = time.perf_counter()
    with av.open(io.BytesIO(content), "r", metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        middle = (stream.start_time or 0) + (stream.duration or 0) // 2
        container.seek(middle, stream=stream)
        left = _CLIP_FRAMES
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts >= middle:
                frame.to_ndarray(format="rgb24")
                left -= 1
            if not left:
                break
    return time.perf_counter() - start_s


def _classes(samples: Sequence[_Foreign]) -> list[str]:
    """Names by label; a label that nothing names is called by its number."""
    labels = {s.label for s in samples} - {NO_LABEL}
    if not labels:
        return []
    names = {s.label: s.class_name for s in samples if s.class_name}
    return [names.get(label) or str(label) for label in range(max(labels) + 1)]


def _report(
    folder: Path,
    samples: Sequence[_Foreign],
    sizes: Counter[tuple[int, int]],
    clip_s: Sequence[float],
    num_tars: int,
) -> str:
    faults = [s for s in samples if s.fault]
    frames = sum(s.num_frames for s in samples)
    per_frame = sum(s.video_bytes for s in samples) / max(frames, 1)
    labelled = sum(s.label != NO_LABEL for s in samples)
    lines = [
        f"foreign shards -> {folder}",
        f"  {len(samples):,} samples in {num_tars:,} tars, {labelled:,} with a label, "
        f"{frames:,} frames, {per_frame:,.0f} bytes each",
        "  sizes: " + ", ".join(f"{w}x{h} ({n:,})" for (w, h), n in sizes.most_common(4)),
    ]
    lines += [f"  {s.key}: {s.fault}" for s in faults[:10]]
    if len(faults) > 10:
        lines.append(f"  ... {len(faults):,} samples without a usable video in all")
    if clip_s:
        lines.append(
            f"  cost: {1000 * sum(clip_s) / len(clip_s):.1f} ms of one core to decode "
            f"{_CLIP_FRAMES} frames from the middle of a video, before any scaling"
        )
    lines.append(
        "  webdataset and DALI's own readers can use the index. Strata's loader reads its own "
        "shards alone: to train on these, unpack them and run tools/shard.py folder"
    )
    return "\n".join(lines)
