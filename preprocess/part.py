"""The unit of work: a pure function from some videos of a shard to a part file and its rows.

A part is the finished tar members of a fixed range of a shard's places, at most a few videos. Parts
joined in order, with the end of an archive, are the shard. So the bytes are the same wherever and
in whatever order the parts are made.
"""

import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import IO, NamedTuple

import av.logging
import msgspec
import xxhash
from PIL import features

from strata.errors import FaultKind, ShardError, VideoFault
from strata.format.manifest import canonical_json
from strata.format.schema import SourceRow
from strata.format.shard_tar import MemberPlace, append_members
from strata.preprocess.container import stamp_of
from strata.preprocess.datasets.folder import Source, sample_key
from strata.preprocess.executors import OUT_OF_MEMORY, WorkerError
from strata.preprocess.places import open_place
from strata.preprocess.sample import Sample, is_media_fault, keep_freed_memory
from strata.preprocess.settings import ShardSettings
from strata.transfer import as_url

__all__ = [
    "PROGRESS_FOLDER",
    "PartRecord",
    "PartTask",
    "Range",
    "encoder_versions",
    "fault_of_death",
    "make_part",
    "pieces",
]

PROGRESS_FOLDER = ".progress"
"""Folder of parts and records in that of a set, until its manifest is written."""


class Range(NamedTuple):
    """The places of a shard that a part has."""

    shard: int
    first: int
    last: int
    """Exclusive."""

    @property
    def name(self) -> str:
        """The file of the part, in the set's folder; its record has `.json` behind it."""
        return f"{PROGRESS_FOLDER}/shard-{self.shard:06d}.{self.first:06d}-{self.last:06d}.part"


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
    range: Range
    sources: tuple[Source, ...]
    """One for each place."""
    classes: tuple[str, ...]
    """Class names by label."""
    plan: str
    """Digest of all names and settings, for the record."""
    encoder: dict[str, str]
    """Versions of libraries, the same for all parts of a set."""
    settings: ShardSettings


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


def make_part(task: PartTask) -> PartRecord:
    """Make a part file and its record.

    While a video makes no progress an alarm of the kernel runs, which ends this process, even
    inside a hung codec.

    Raises:
        WorkerError: A bug of the program, with the name of the video.
        ShardError: This machine has other versions of FFmpeg or libjpeg.
        OSError: The part cannot be written.
        MemoryError: A video needs more than `settings.worker_memory`.
    """
    if task.encoder != encoder_versions():
        raise ShardError(
            f"this machine has {encoder_versions()}, the run began with {task.encoder}; install "
            "the same versions of av and pillow on all machines"
        )
    keep_freed_memory()
    av.logging.set_level(av.logging.PANIC)  # Errors are raised as exceptions.
    place, name = open_place(task.location), task.range.name
    rows, samples, stamps = list[SourceRow](), list[tuple[MemberPlace, ...]](), list[str]()
    try:
        with place.writing(name) as file:
            for source in task.sources:
                row, stamp, members = _add_video(task, source, file, len(samples))
                rows.append(row)
                stamps.append(stamp)
                samples += [members] if members else []
            checksum, num_bytes = xxhash.xxh3_128(), file.tell()
            file.seek(0)
            for piece in pieces(file):
                checksum.update(piece)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    record = PartRecord(
        plan=task.plan,
        stamps=tuple(stamps),
        rows=tuple(rows),
        samples=tuple(samples),
        num_bytes=num_bytes,
        checksum=checksum.hexdigest(),
    )
    place.write(f"{name}.json", canonical_json(msgspec.to_builtins(record)))
    return record


def _add_video(
    task: PartTask, source: Source, file: IO[bytes], position: int
) -> tuple[SourceRow, str, tuple[MemberPlace, ...]]:
    """Append the members of a video, or nothing if it is rejected.

    Returns:
        Its row, its stamp and its members' places.
    """
    path, settings = source.path, task.settings
    if path is None:
        raise AssertionError(f"{source.name} is not on disk")

    slack_s, due_s = settings.timeout_s / 64, 0.0

    def pulse() -> None:
        # Called several times a frame, so the kernel is called only now and then.
        nonlocal due_s
        if (now_s := time.monotonic()) >= due_s:
            signal.setitimer(signal.ITIMER_REAL, settings.timeout_s + slack_s)
            due_s = now_s + slack_s

    start, stamp, fault = file.tell(), source.stamp, source.fault
    if fault is None:
        try:
            pulse()
            stamp, key = stamp_of(path), sample_key(source.name)
            sample = Sample(source, task.classes, settings, pulse)
            places = append_members(file, key, sample.members())  # pyright: ignore[reportArgumentType]
            # A store gives an object as it was at one time.
            if as_url(path) is None and stamp_of(path) != stamp:
                raise VideoFault(FaultKind.UNREADABLE, source.name, "it changed while it was read")
            row = SourceRow(
                source=source.name,
                status="written",
                key=key,
                label=source.label,
                num_frames=sample.num_frames,
                position=position,
                notes=sample.notes or None,
            )
            return row, stamp, tuple(places)
        except Exception as error:
            if settings.worker_memory and any(isinstance(e, MemoryError) for e in _chain(error)):
                raise MemoryError(source.name) from error
            fault = _fault_of(error, source.name)
    file.seek(start)
    file.truncate()
    row = SourceRow(
        source=source.name,
        status="rejected",
        label=source.label,
        reason=fault[0].value,
        detail=fault[1],
    )
    return row, stamp, ()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fault_of(error: Exception, name: str) -> tuple[FaultKind, str]:
    """Reason and detail of a rejection after an error; other errors are raised."""
    if isinstance(error, VideoFault):
        return error.kind, error.detail
    if is_media_fault(error):
        return FaultKind.CRASH, f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        raise error
    raise WorkerError(
        f"{name}: a bug of the program, not a fault of the video; finished shards are kept\n"
        f"{traceback.format_exc()}"
    ) from error


def fault_of_death(code: int, settings: ShardSettings) -> tuple[FaultKind, str]:
    """Reason and detail of the rejection of a video whose process ended.

    Args:
        code: That of `WorkerDied`.
        settings: Those of the run.
    """
    if code == OUT_OF_MEMORY:
        return FaultKind.MEMORY, f"it needs more than --worker_memory {settings.worker_memory:g} GB"
    if code == -signal.SIGALRM:
        return FaultKind.TIMEOUT, f"no packet, frame or segment in {settings.timeout_s:.0f} s"
    return FaultKind.CRASH, f"the codec ended its process ({code})"


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    """The content of a file from its position on, 1 MiB at a time."""
    while piece := file.read(1 << 20):
        yield piece
