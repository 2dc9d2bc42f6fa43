"""One video to the members of its sample."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
from av.error import FFmpegError

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
from strata.preprocess.settings import ReadBack, ShardSettings
from strata.preprocess.transcode import FrameSource, encode_strip

__all__ = ["Sample", "is_media_fault", "keep_freed_memory", "make_segment"]


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


class Sample:
    """Transcodes and verifies one video.

    Memory holds the frames of at most one segment, however long the video is.

    Args:
        source: The video, which is on the disk.
        classes: Class names by label.
        settings: The form, which frames are read back, and what becomes of damaged videos.
        pulse: Called at each progress: a piece of the file was read, a packet read, a frame
            decoded, a segment finished.
    """

    def __init__(
        self,
        source: Source,
        classes: Sequence[str],
        settings: ShardSettings,
        pulse: Callable[[], None] = no_pulse,
    ) -> None:
        self._source, self._classes, self._settings = source, classes, settings
        self._pulse = pulse
        self.num_frames = 0
        """Known after the last member."""
        self.notes: list[str] = []
        """Remarks about the video, for the manifest; known after the last member."""

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Yield the extension and the content of each member as soon as it is finished.

        Raises:
            VideoFault: The video cannot be used.
        """
        source, settings = self._source, self._settings
        if source.path is None:
            raise AssertionError(f"{source.name} is not on disk")
        with open_source(source.path, source.name, self._pulse) as content:
            frames = FrameSource(
                content.where,
                source.name,
                settings.form,
                damaged=settings.damaged,
                pulse=self._pulse,
            )
            yield from self._members(frames, content)

    def _members(self, frames: FrameSource, content: SourceContent) -> Iterator[tuple[str, bytes]]:
        source, form, read_back = self._source, self._settings.form, self._settings.read_back
        offsets, lengths, checksums = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        heads: list[int] = []
        for number, planes in enumerate(frames.segments()):
            segment, places = make_segment(planes, form, frames.rate, source.name, read_back)
            offsets.append(places[0])
            lengths.append(places[1])
            of_frames, of_head = segment_checksums(segment, *places, form.payload)
            checksums.append(of_frames)
            heads.append(of_head)
            self._pulse()
            yield segment_ext(number, form.payload), segment
        found = frames.facts
        if found is None:
            raise AssertionError("frames without facts")
        facts = SampleFacts(
            key=sample_key(source.name),
            source=source.file or source.name,
            source_sha256=content.sha256,
            source_bytes=content.num_bytes,
            label=source.label,
            class_name=self._classes[source.label] if source.label != NO_LABEL else None,
            num_frames=frames.num_frames,
            fps=round(float(frames.rate), 6),
            resampled=frames.resampled,
            deinterlaced=frames.deinterlaced,
            source_width=found.width,
            source_height=found.height,
            source_codec=found.codec,
            source_pixel_format=found.pixel_format,
            rotation_degrees=frames.rotation_degrees,
            mirrored=frames.orientation.mirrored,
        ).to_json()
        table = FrameTable(
            label=source.label,
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
        yield FRAMES_EXT, table.to_bytes()
        yield FACTS_EXT, facts
        self.num_frames, self.notes = frames.num_frames, frames.notes


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
