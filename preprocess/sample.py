"""One video to the members of its sample."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.error import FFmpegError

from strata.decoding import Damaged
from strata.errors import FaultKind
from strata.format.open_video import no_pulse
from strata.format.schema import (
    FACTS_EXT,
    FRAMES_EXT,
    NO_LABEL,
    Checksums,
    FrameTable,
    NormalForm,
    SampleFacts,
    checksum,
    segment_checksums,
    segment_ext,
)
from strata.preprocess.container import SourceContent, open_source
from strata.preprocess.datasets.folder import Source, sample_key
from strata.preprocess.encode_mp4 import encode_mp4, verify_mp4
from strata.preprocess.read_back import verify_strip
from strata.preprocess.settings import ReadBack
from strata.preprocess.transcode import FrameSource, encode_strip

__all__ = [
    "Done",
    "Member",
    "Task",
    "is_media_fault",
    "keep_freed_memory",
    "make_sample",
    "make_segment",
    "task_of",
]


@dataclass(frozen=True)
class Task:
    """One video to transcode."""

    path: Path
    name: str
    """Its name in the manifest."""
    file_name: str
    """Relative to the videos' folder, as found on disk."""
    key: str
    label: int
    class_name: str | None
    stamp: str = ""
    """Size and time of change when it was listed."""
    fault: tuple[FaultKind, str] | None = None
    """Reason and detail of a rejection that is known already."""


def task_of(source: Source, classes: Sequence[str]) -> Task:
    """The task for a source that is on the disk."""
    if source.path is None:
        raise AssertionError(f"{source.name} is not on disk")
    return Task(
        path=source.path,
        name=source.name,
        file_name=source.file or source.name,
        key=sample_key(source.name),
        label=source.label,
        class_name=classes[source.label] if source.label != NO_LABEL else None,
        stamp=source.stamp,
        fault=source.fault,
    )


@dataclass(frozen=True)
class Member:
    """One finished member of a sample."""

    ext: str
    content: bytes


@dataclass(frozen=True)
class Done:
    """The sample is complete."""

    num_frames: int
    notes: tuple[str, ...] = ()
    """Remarks about the video, for the manifest."""


_SAMPLED_EVERY = 8
"""`sampled` decodes every 8th frame."""


def make_segment(
    planes: np.ndarray,
    form: NormalForm,
    rate: Fraction,
    source: str,
    read_back: ReadBack,
) -> tuple[bytes, tuple[np.ndarray, np.ndarray]]:
    """Encode frames in the form's payload and read them back.

    Args:
        planes: Shape `[F, height * 3 / 2, width]`, uint8, as `FrameSource.segments` gives them.
        form: The normal form.
        rate: Frames per second; 25 is taken where it is 0.
        source: The video as the user would name it.
        read_back: Which frames are decoded again; of mp4 always all.

    Returns:
        The member, and the offset in it and the length of each frame's coded bytes, both `[F]`.

    Raises:
        VideoFault: The encoded frames differ from the source when they are decoded.
    """
    match form.payload:
        case "jpeg":
            content = encode_strip(planes, form)
            every = 1 if read_back == "all" else _SAMPLED_EVERY
            return content, verify_strip(content, planes, form, source, every=every)
        case "mp4":
            content = encode_mp4(planes, form, rate or Fraction(25))
            return content, verify_mp4(content, planes, form, source)
        case "foreign":
            raise AssertionError("foreign samples are indexed, not made")


def make_sample(
    task: Task,
    form: NormalForm,
    read_back: ReadBack,
    pulse: Callable[[], None] = no_pulse,
    damaged: Damaged = "reject",
) -> Iterator[Member | Done]:
    """Transcode and verify one video; yield each member as soon as it is finished.

    Memory holds the frames of at most one segment, however long the video is.

    Args:
        task: The video.
        form: The normal form.
        read_back: Which frames are decoded back and compared.
        pulse: Called at each progress: a piece of the file was read, a packet read, a frame
            decoded.
        damaged: What to do with a video of which some frames are damaged or missing.

    Raises:
        VideoFault: The video cannot be used.
    """
    with open_source(task.path, task.name, pulse) as content:
        frames = FrameSource(content.where, task.name, form, damaged=damaged, pulse=pulse)
        yield from _members(task, form, read_back, frames, content)


def _members(
    task: Task, form: NormalForm, read_back: ReadBack, frames: FrameSource, content: SourceContent
) -> Iterator[Member | Done]:
    offsets: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    checksums: list[np.ndarray] = []
    heads: list[int] = []
    for number, planes in enumerate(frames.segments()):
        segment, places = make_segment(planes, form, frames.rate, task.name, read_back)
        offsets.append(places[0])
        lengths.append(places[1])
        of_frames, of_head = segment_checksums(segment, *places, form.payload)
        checksums.append(of_frames)
        heads.append(of_head)
        yield Member(segment_ext(number, form.payload), segment)
    source = frames.facts
    if source is None:
        raise AssertionError("frames without facts")
    facts = SampleFacts(
        key=task.key,
        source=task.file_name,
        source_sha256=content.sha256,
        source_bytes=content.num_bytes,
        label=task.label,
        class_name=task.class_name,
        num_frames=frames.num_frames,
        fps=round(float(frames.rate), 6),
        resampled=frames.resampled,
        deinterlaced=frames.deinterlaced,
        source_width=source.width,
        source_height=source.height,
        source_codec=source.codec,
        source_pixel_format=source.pixel_format,
        rotation_degrees=frames.rotation_degrees,
        mirrored=frames.orientation.mirrored,
    ).to_json()
    table = FrameTable(
        label=task.label,
        height=form.height,
        width=form.width,
        frames_per_segment=form.frames_per_segment,
        offsets=np.concatenate(offsets),
        lengths=np.concatenate(lengths),
        checksums=Checksums(
            frames=np.concatenate(checksums),
            heads=np.array(heads, np.uint32),
            facts=checksum(facts),
        ),
    )
    yield Member(FRAMES_EXT, table.to_bytes())
    yield Member(FACTS_EXT, facts)
    yield Done(frames.num_frames, tuple(frames.notes))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next segment instead of returning it to the kernel.

    The buffers of a segment are large; mapping their pages again for each video took 90 us a frame.
    A process keeps at most the memory of its largest segment.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # Another C library: only slower.
    trim_threshold, mmap_threshold, most_bytes = -1, -3, 1 << 30
    mallopt(mmap_threshold, most_bytes)
    mallopt(trim_threshold, most_bytes)


_MEDIA_LIBRARIES = frozenset({"av", "PIL"})
_ALWAYS_BUGS = (TypeError, AttributeError, NameError, AssertionError, ImportError)


def is_media_fault(error: Exception) -> bool:
    """Whether an error is a fault of the video and not a bug of the program.

    Faults of the video are FFmpeg's own errors, memory that a header demanded and the system lacks,
    and other errors raised inside PyAV or Pillow, except those of a wrong call.
    """
    if isinstance(error, FFmpegError | MemoryError):
        return True
    if isinstance(error, _ALWAYS_BUGS):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    # PyAV is compiled: its frames know their file, like av/video/frame.py, and no module.
    frame = trace.tb_frame
    where = frame.f_globals.get("__name__") or frame.f_code.co_filename.replace("/", ".")
    return where.partition(".")[0] in _MEDIA_LIBRARIES
