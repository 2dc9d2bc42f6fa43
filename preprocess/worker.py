"""The worker process: it turns one video after another into the members of a sample."""

import ctypes
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

import av.logging
import numpy as np
from av.error import FFmpegError

from strata.decoding import Damaged
from strata.errors import FaultKind, VideoFault
from strata.format.open_video import no_pulse
from strata.format.schema import (
    FACTS_EXT,
    FRAMES_EXT,
    Checksums,
    FrameTable,
    NormalForm,
    SampleFacts,
    checksum,
    segment_checksums,
    segment_ext,
)
from strata.preprocess.container import hash_file
from strata.preprocess.encode_mp4 import encode_mp4, verify_mp4
from strata.preprocess.parts import PartPacker, Refused, RefusedError, Rejected, WorkerFailure
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
    "send_sample",
    "serve",
]

_SEGMENT_SUFFIXES = (".jpg", ".mp4")


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
        pulse: Called at each progress: a piece of the file was hashed, a packet read, a frame
            decoded.
        damaged: What to do with a video of which some frames are damaged or missing.

    Raises:
        VideoFault: The video cannot be used.
    """
    sha256, num_bytes = hash_file(task.path, task.name, pulse)
    frames = FrameSource(task.path, task.name, form, damaged=damaged, pulse=pulse)
    offsets: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    checksums: list[np.ndarray] = []
    heads: list[int] = []
    for number, planes in enumerate(frames.segments()):
        content, places = make_segment(planes, form, frames.rate, task.name, read_back)
        offsets.append(places[0])
        lengths.append(places[1])
        of_frames, of_head = segment_checksums(content, *places, form.payload)
        checksums.append(of_frames)
        heads.append(of_head)
        yield Member(segment_ext(number, form.payload), content)
    source = frames.facts
    if source is None:
        raise AssertionError("frames without facts")
    facts = SampleFacts(
        key=task.key,
        source=task.file_name,
        source_sha256=sha256,
        source_bytes=num_bytes,
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


def _die_with_parent() -> None:
    """End this process as soon as its parent is gone, even inside a hung codec."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


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


def send_sample(
    connection: Connection,
    task: Task,
    form: NormalForm,
    read_back: ReadBack,
    damaged: Damaged,
    pulse: Callable[[], None],
) -> None:
    """Make a sample and send it: one segment in each part, the last with the other members."""
    packer = PartPacker(connection, task.key)
    for message in make_sample(task, form, read_back, pulse, damaged):
        pulse()
        match message:
            case Member(ext, content):
                if ext.endswith(_SEGMENT_SUFFIXES) and not packer.is_empty:
                    packer.send()
                packer.add(ext, content)
            case Done(num_frames, notes):
                packer.send(num_frames, notes)


def serve(
    connection: Connection,
    form: NormalForm,
    read_back: ReadBack,
    damaged: Damaged,
    heartbeat: "ctypes.c_double",
) -> None:
    """Answer tasks with messages until the connection closes; the body of a worker process.

    Args:
        connection: To the driver.
        form: The normal form.
        read_back: Which frames are decoded back and compared.
        damaged: What to do with a video of which some frames are damaged or missing.
        heartbeat: Time of the last progress, by `time.monotonic`; shared with the driver.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    keep_freed_memory()
    av.logging.set_level(av.logging.PANIC)  # Errors are raised as exceptions.
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def pulse() -> None:
        heartbeat.value = time.monotonic()

    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        if task is None:
            continue  # A confirmation for the sample before, which failed without waiting for it.
        try:
            pulse()
            send_sample(connection, task, form, read_back, damaged, pulse)
        except VideoFault as fault:
            connection.send(Rejected(fault.kind, fault.detail))
        except RefusedError as error:
            connection.send(Refused(*error.args))
        except (BrokenPipeError, ConnectionResetError, EOFError):
            return
        except Exception as error:  # The boundary: one video must not end a long run.
            if is_media_fault(error):
                detail = f"{type(error).__name__}: {error}"
                connection.send(Rejected(FaultKind.CRASH, detail))
            else:
                connection.send(WorkerFailure(traceback.format_exc()))
