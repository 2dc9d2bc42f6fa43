"""The unit of work: a pure function from some videos of a shard to a part file and its rows.

A part is the finished tar members of a fixed range of a shard's places, at most a few videos. Parts
joined in order, with the end of an archive, are the shard. So the bytes are the same wherever and
in whatever order the parts are made.
"""

import dataclasses
import hashlib
import signal
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO

import av.logging
import msgspec
import xxhash
from PIL import features

from strata.decoding import Damaged
from strata.errors import FaultKind, ShardError, VideoFault
from strata.format.index import index_bytes
from strata.format.manifest import canonical_json
from strata.format.schema import (
    INDEX_SUFFIX,
    SHARD_SUFFIX,
    NormalForm,
    ShardEntry,
    SourceRow,
)
from strata.format.shard_tar import ARCHIVE_END, MemberPlace, append_members
from strata.preprocess.container import stamp_of
from strata.preprocess.executors import Died, Failed, WorkerError, run_alone
from strata.preprocess.places import Place, open_place
from strata.preprocess.sample import (
    Done,
    Task,
    is_media_fault,
    keep_freed_memory,
    make_sample,
)
from strata.preprocess.settings import ReadBack
from strata.transfer import as_url
from strata.untrusted import decode_json

__all__ = [
    "PROGRESS_FOLDER",
    "JoinTask",
    "PartRecord",
    "PartTask",
    "ShardRecord",
    "encoder_versions",
    "join_parts",
    "make_part",
    "make_video_alone",
    "part_name",
    "record_name",
    "shard_name",
]

PROGRESS_FOLDER = ".progress"
"""Folder of parts and records in that of a set, until its manifest is written."""
_COPY_BYTES = 1 << 20


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:06d}{SHARD_SUFFIX}"


def record_name(index: int) -> str:
    """The file of a finished shard's record, in the set's folder."""
    return f"{PROGRESS_FOLDER}/{shard_name(index)}.json"


def part_name(index: int, first: int, last: int) -> str:
    """The file of a part, in the set's folder; its record has `.json` behind it."""
    return f"{PROGRESS_FOLDER}/shard-{index:06d}.{first:06d}-{last:06d}.part"


@cache
def encoder_versions() -> dict[str, str]:
    """Versions of the libraries that decide the bytes, for the manifest."""
    return {
        "pyav": av.__version__,
        "ffmpeg": ".".join(map(str, av.library_versions["libavcodec"])),
        "libjpeg_turbo": features.version_feature("libjpeg_turbo") or "none",
    }


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """A range of places of a shard."""

    location: str
    """Folder of the set."""
    shard: int
    first: int
    """Place of the first video."""
    videos: tuple[Task, ...]
    plan: str
    """Digest of all names and settings, for the record."""
    encoder: dict[str, str]
    """Versions of libraries, the same for all parts of a set."""
    form: NormalForm
    read_back: ReadBack
    damaged: Damaged
    timeout_s: float

    @property
    def name(self) -> str:
        """Name of the part file."""
        return part_name(self.shard, self.first, self.first + len(self.videos))


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """Facts of a finished part; its presence marks the part as complete."""

    plan: str
    stamps: tuple[str, ...]
    """Size and time of change of each video when it was read."""
    rows: tuple[SourceRow, ...]
    """A row for each video; positions count from the part's first sample."""
    samples: tuple[tuple[MemberPlace, ...], ...]
    """Members of each sample, with their offsets in the part."""
    num_bytes: int
    checksum: str
    """XXH3-128 of the part file, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """Facts of a finished shard, stored until the manifest is written."""

    plan: str
    sizes: str
    """Digest of the sizes of the videos when they were listed."""
    stamps: tuple[str, ...]
    entry: ShardEntry | None
    """None if all its videos were rejected."""
    rows: tuple[SourceRow, ...]


def make_part(task: PartTask) -> PartRecord:
    """Make a part file and its record.

    While a video makes no progress an alarm of the kernel runs, which ends this process, even
    inside a hung codec.

    Raises:
        WorkerError: A bug of the program, with the name of the video.
        ShardError: This machine has other versions of FFmpeg or libjpeg.
        OSError: The part cannot be written.
    """
    if task.encoder != encoder_versions():
        raise ShardError(
            f"this machine has {encoder_versions()}, the run began with {task.encoder}; install "
            "the same versions of av and pillow on all machines"
        )
    keep_freed_memory()
    av.logging.set_level(av.logging.PANIC)  # Errors are raised as exceptions.
    place = open_place(task.location)
    made = _Made([], [], [])
    try:
        with place.writing(task.name) as file:
            for video in task.videos:
                _add_video(task, video, file, made)
            checksum, num_bytes = xxhash.xxh3_128(), file.tell()
            file.seek(0)
            for piece in _pieces(file):
                checksum.update(piece)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    record = PartRecord(
        plan=task.plan,
        stamps=tuple(made.stamps),
        rows=tuple(made.rows),
        samples=tuple(made.samples),
        num_bytes=num_bytes,
        checksum=checksum.hexdigest(),
    )
    with place.writing(f"{task.name}.json") as file:
        file.write(canonical_json(msgspec.to_builtins(record)))
    return record


@dataclass
class _Made:
    rows: list[SourceRow]
    samples: list[tuple[MemberPlace, ...]]
    stamps: list[str]


def _add_video(task: PartTask, video: Task, file: IO[bytes], made: _Made) -> None:
    """Append the members of a video, or nothing if it is rejected, and its row."""

    def pulse() -> None:
        signal.setitimer(signal.ITIMER_REAL, task.timeout_s)

    start, fault, row = file.tell(), video.fault, None
    done = Done(0)

    def members() -> Iterator[tuple[str, bytes]]:
        nonlocal done
        for message in make_sample(video, task.form, task.read_back, pulse, task.damaged):
            pulse()
            if isinstance(message, Done):
                done = message
            else:
                yield message.ext, message.content

    stamp = video.stamp
    if fault is None:
        try:
            pulse()
            stamp = stamp_of(video.path)
            places = append_members(file, video.key, members())  # pyright: ignore[reportArgumentType]
            # A store gives an object as it was at one time.
            if as_url(video.path) is None and stamp_of(video.path) != stamp:
                raise VideoFault(FaultKind.UNREADABLE, video.name, "it changed while it was read")
            row = SourceRow(
                source=video.name,
                status="written",
                key=video.key,
                label=video.label,
                num_frames=done.num_frames,
                position=len(made.samples),
                notes=list(done.notes) or None,
            )
            made.samples.append(tuple(places))
        except VideoFault as error:
            fault = error.kind, error.detail
        except Exception as error:
            if is_media_fault(error):
                fault = FaultKind.CRASH, f"{type(error).__name__}: {error}"
            elif isinstance(error, OSError):
                raise
            else:
                raise WorkerError(
                    f"{video.name}: a bug of the program, not a fault of the video; finished "
                    f"shards are kept\n{traceback.format_exc()}"
                ) from error
    if fault is not None:
        file.seek(start)
        file.truncate()
        row = SourceRow(
            source=video.name,
            status="rejected",
            label=video.label,
            reason=fault[0].value,
            detail=fault[1],
        )
    if row is None:
        raise AssertionError("neither a sample nor a fault")
    made.rows.append(row)
    made.stamps.append(stamp)


def make_video_alone(task: PartTask) -> PartRecord:
    """Make a part of one video in a process of its own; if that dies, the video is rejected.

    Raises:
        As `make_part`.
    """
    (video,) = task.videos
    outcome = run_alone(make_part, task)
    if isinstance(outcome, Failed):
        raise outcome.error
    if not isinstance(outcome, Died):
        return outcome
    if outcome.code == -signal.SIGALRM:
        detail = f"no packet, frame or segment in {task.timeout_s:.0f} s"
        fault = FaultKind.TIMEOUT, detail
    else:
        fault = FaultKind.CRASH, f"the codec ended its process ({outcome.code})"
    video = dataclasses.replace(video, fault=fault, stamp=stamp_of(video.path))
    return make_part(dataclasses.replace(task, videos=(video,)))


@dataclass(frozen=True, kw_only=True)
class JoinTask:
    """A shard of which all parts are finished."""

    location: str
    shard: int
    plan: str
    sizes: str
    parts: tuple[tuple[str, PartRecord], ...]
    """Names and records, in order."""


def join_parts(task: JoinTask) -> ShardRecord:
    """Join the parts of a shard to its tar, write its index and record, and remove the parts.

    Raises:
        ShardError: A part is missing or damaged.
        OSError: The shard cannot be written.
    """
    place = open_place(task.location)
    rows = _rows_of_shard(part for _, part in task.parts)
    entry, name = None, shard_name(task.shard)
    try:
        if any(part.samples for _, part in task.parts):
            with place.writing(name) as tar:
                lines, sha256, num_bytes = _copy_parts(place, task, tar)
            index = index_bytes(lines)
            with place.writing(name.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX) as file:
                file.write(index)
            entry = ShardEntry(
                name=name,
                num_samples=len(lines),
                num_frames=sum(row.num_frames for row in rows),
                num_bytes=num_bytes,
                sha256=sha256,
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
    except FileNotFoundError as error:
        # Another slice that overlaps with this one may have joined them.
        content = place.read(record_name(task.shard))
        if content is None:
            raise ShardError(
                f"{error.filename} is missing; run the same command again, it makes it again"
            ) from error
        return decode_json(content, ShardRecord, record_name(task.shard), ShardError)
    record = ShardRecord(
        plan=task.plan,
        sizes=task.sizes,
        stamps=tuple(stamp for _, part in task.parts for stamp in part.stamps),
        entry=entry,
        rows=rows,
    )
    with place.writing(record_name(task.shard)) as file:
        file.write(canonical_json(msgspec.to_builtins(record)))
    place.remove(name for part, _ in task.parts for name in (f"{part}.json", part))
    return record


def _rows_of_shard(parts: Iterable[PartRecord]) -> tuple[SourceRow, ...]:
    """The rows of all parts, with positions that count from the shard's first sample."""
    rows, before = list[SourceRow](), 0
    for part in parts:
        for row in part.rows:
            moved = None if row.position is None else before + row.position
            rows.append(dataclasses.replace(row, position=moved))
        before += len(part.samples)
    return tuple(rows)


def _copy_parts(place: Place, task: JoinTask, tar: IO[bytes]) -> tuple[list[str], str, int]:
    """Write a shard; returns the lines of its index, its SHA-256 and its size."""
    digest, lines = hashlib.sha256(), list[str]()
    for name, part in task.parts:
        start, checksum = tar.tell(), xxhash.xxh3_128()
        with place.reading(name) as file:
            for piece in _pieces(file):
                checksum.update(piece)
                digest.update(piece)
                tar.write(piece)
        if (tar.tell() - start, checksum.hexdigest()) != (part.num_bytes, part.checksum):
            place.remove([f"{name}.json"])
            raise ShardError(
                f"{task.location}/{name} was damaged after it was written; run the same command "
                "again, it makes the part again"
            )
        lines += [_index_line(members, start) for members in part.samples]
    tar.write(ARCHIVE_END)
    digest.update(ARCHIVE_END)
    return lines, digest.hexdigest(), tar.tell()


def _index_line(members: Sequence[MemberPlace], start: int) -> str:
    return " ".join(
        f"{name.partition('.')[2]} {start + offset} {size} {name}" for name, offset, size in members
    )


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_COPY_BYTES):
        yield piece
