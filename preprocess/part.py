"""The unit of work: a pure function from some videos of a shard to a part file and its rows.

A part is the finished tar members of a fixed range of a shard's places, at most a few videos. Parts
joined in order, with the end of an archive, are the shard. So the bytes are the same wherever and
in whatever order the parts are made.
"""

import dataclasses
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import IO

import av.logging
import msgspec
import xxhash
from PIL import features

from strata.decoding import Damaged
from strata.errors import FaultKind, ShardError, VideoFault
from strata.format.manifest import canonical_json
from strata.format.schema import (
    NormalForm,
    SourceRow,
)
from strata.format.shard_tar import MemberPlace, append_members
from strata.preprocess.container import stamp_of
from strata.preprocess.executors import Died, Failed, WorkerError, run_alone
from strata.preprocess.places import open_place
from strata.preprocess.sample import (
    Done,
    Task,
    is_media_fault,
    keep_freed_memory,
    make_sample,
)
from strata.preprocess.settings import ReadBack
from strata.transfer import as_url

__all__ = [
    "PROGRESS_FOLDER",
    "PartRecord",
    "PartTask",
    "encoder_versions",
    "make_part",
    "make_video_alone",
    "part_name",
    "pieces",
]

PROGRESS_FOLDER = ".progress"
"""Folder of parts and records in that of a set, until its manifest is written."""


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
            for piece in pieces(file):
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


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    """The content of a file from its position on, 1 MiB at a time."""
    while piece := file.read(1 << 20):
        yield piece
