"""The shard format: members, fields, units and version. See docs/data-format.md for all of it.

A shard is an uncompressed tar in WebDataset convention with an index file of DALI's `wds2idx` form
beside it. A sample is a sequence of members whose names share the part before the first dot, its
key:

    <key>.000.jpg      the first segment: its frames stacked into one tall baseline JPEG
    <key>.001.jpg      the next segment, if the video is longer than one JPEG can be tall
    <key>.frames.i32   what the loader needs, little-endian int32, see `FrameTable`
    <key>.json         facts for people and other programs, see `SampleFacts`

With the `mp4` payload the segments are `<key>.000.mp4` and so on, each a short video.

Every frame has a checksum in `frames.i32`, and so have the bytes around the frames, the facts and
the table itself: the loader checks all data that it reads.

Every JPEG has a restart marker exactly at each frame's end and standard Huffman tables, and all
segments of a data set share their quantisation tables. So the common header followed by the coded
bytes of any selection of frames, in any order, is a valid JPEG: the loader cuts out the frames that
it needs and decodes only those.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from msgspec import Meta

from strata.errors import ShardError
from strata.files import encode_text
from strata.untrusted import Digest

__all__ = [
    "FACTS_EXT",
    "FRAMES_EXT",
    "INDEX_SUFFIX",
    "MANIFEST_NAME",
    "MAX_CLASSES",
    "MAX_FRAMES",
    "MAX_FRAME_SIDE",
    "MAX_JPEG_ROWS",
    "NO_LABEL",
    "READABLE_VERSIONS",
    "SAMPLES_NAME",
    "SCHEMA_VERSION",
    "SHARD_SUFFIX",
    "Buffer",
    "Checksums",
    "FrameTable",
    "Manifest",
    "NormalForm",
    "Payload",
    "SampleFacts",
    "ShardEntry",
    "SourceRow",
    "checksum",
    "segment_checksums",
    "segment_ext",
]

SCHEMA_VERSION = 2
"""The version that is written."""
READABLE_VERSIONS = (1, 2)
"""Version 1 has no checksums in frame tables and no hashes of index files."""
MANIFEST_NAME = "manifest.json"
SAMPLES_NAME = "samples.jsonl"
SHARD_SUFFIX = ".tar"
INDEX_SUFFIX = ".idx"
FRAMES_EXT = "frames.i32"
FACTS_EXT = "json"
NO_LABEL = -1
MAX_JPEG_ROWS = 65_500
"""Most rows of an image that libjpeg writes and reads."""
MAX_FRAME_SIDE = 2048
"""Largest width and height of a stored frame, in pixels. So no strip decodes to more than 65,500 x
2,048 pixels, 402 MB, regardless of what a file declares."""
MAX_FRAMES = 10_000_000
"""Most frames of a sample: 92 hours at 30 frames per second."""
MAX_CLASSES = 100_000

Buffer = bytes | bytearray | memoryview | np.ndarray
_Count = Annotated[int, Meta(ge=0, le=1 << 50)]
_Label = Annotated[int, Meta(ge=NO_LABEL, lt=MAX_CLASSES)]
_NumFrames = Annotated[int, Meta(ge=0, le=MAX_FRAMES)]
_Checksum = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Text = Annotated[str, Meta(max_length=1 << 16)]

Payload = Literal["jpeg", "mp4", "foreign"]


def segment_ext(segment: int, payload: Payload = "jpeg") -> str:
    """The member extension of a segment, `000.jpg` for the first, `1000.jpg` for the 1001st."""
    return f"{segment:03d}.{'jpg' if payload == 'jpeg' else 'mp4'}"


@dataclass(frozen=True, kw_only=True)
class NormalForm:
    """The frame size and coding that all samples of a data set share; part of the manifest."""

    width: int = 176
    """Pixels, a multiple of 16."""
    height: int = 128
    """Pixels, a multiple of 16."""
    fit: Literal["stretch", "crop"] = "stretch"
    """How another aspect ratio is converted: stretch, or crop the centre."""
    payload: Payload = "jpeg"
    """How frames are stored. `foreign` means shards indexed by `tools/shard.py index`: videos of
    any size, which are converted to this form when they are decoded."""
    quality: int = 90
    """JPEG quality, 1 to 95."""
    codec: Literal["h264", "vp9", "mjpeg"] = "h264"
    """Codec of the mp4 payload."""
    quantizer: int = 20
    """Quality of the mp4 payload, lower is better: CRF of h264 (0 to 51) and vp9 (0 to 63), qscale
    of mjpeg (1 to 31)."""
    gop: int = 16
    """Frames from one key frame to the next in the mp4 payload. Every group is closed."""
    segment_frames: int = 0
    """Most frames in a segment; 0 for as many as fit one JPEG, or for mp4 64, because DALI decodes
    from a segment's beginning."""
    min_frames: int = 1
    """Videos with fewer frames are rejected. Videos too short for the pretraining window should be
    in the set too: evaluation uses them, and pretraining skips them automatically."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ShardError: A field is out of its range.
        """
        for name in ("width", "height"):
            value = getattr(self, name)
            if not 0 < value <= MAX_FRAME_SIDE or value % 16:
                raise ShardError(
                    f"normal form: {name} is {value}; use a multiple of 16 from 16 to "
                    f"{MAX_FRAME_SIDE}"
                )
        if not 1 <= self.quality <= 95:
            raise ShardError(f"normal form: quality is {self.quality}; use 1 to 95")
        if not 1 <= self.min_frames <= MAX_FRAMES:
            raise ShardError(f"normal form: min_frames is {self.min_frames}; use 1 to {MAX_FRAMES}")

        coarsest = {"h264": 51, "vp9": 63, "mjpeg": 31}[self.codec]
        finest = 1 if self.codec == "mjpeg" else 0
        if self.payload == "mp4" and not finest <= self.quantizer <= coarsest:
            raise ShardError(
                f"normal form: quantizer is {self.quantizer}; "
                f"{self.codec} has {finest} to {coarsest}"
            )
        if not 1 <= self.gop <= MAX_FRAMES:
            raise ShardError(f"normal form: gop is {self.gop}; use 1 to {MAX_FRAMES}")
        most = MAX_JPEG_ROWS // self.height if self.payload == "jpeg" else 1 << 20
        if not 0 <= self.segment_frames <= most:
            raise ShardError(
                f"normal form: segment_frames is {self.segment_frames}; use 0 to {most}"
            )

    @property
    def frames_per_segment(self) -> int:
        """Frames in every segment of a sample but the last."""
        most = MAX_JPEG_ROWS // self.height if self.payload == "jpeg" else 64
        return self.segment_frames or most


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """Facts about a sample; its JSON member."""

    key: _Text
    source: _Text
    """The source file, relative to the videos' folder, with forward slashes."""
    source_sha256: Annotated[str, Digest]
    source_bytes: _Count
    label: _Label
    """Index into the manifest's classes, or -1."""
    class_name: _Text | None
    num_frames: _NumFrames
    """Frames stored."""
    fps: float
    """Frames per second of the source, unchanged."""
    resampled: bool = False
    """Whether the source's rate varied and frames were repeated or dropped to make it constant."""
    deinterlaced: bool = False
    """Whether the source had interlaced frames, which were deinterlaced."""
    source_width: _Count
    source_height: _Count
    source_codec: _Text
    source_pixel_format: _Text
    rotation_degrees: int
    """Counter-clockwise rotation that the container asked for and that was applied."""
    mirrored: bool = False
    """Whether the frame was mirrored horizontally before that; written only if true."""

    def to_json(self) -> bytes:
        """Encode as canonical UTF-8 JSON."""
        facts = dataclasses.asdict(self)
        if not self.mirrored:
            del facts["mirrored"]
        return encode_text(
            json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        )


def checksum(content: Buffer) -> int:
    """Checksum of a byte string: the lower 32 bits of XXH3-64 with seed 0.

    It misses a random change with probability 2^-32, and costs a sixth of zlib's CRC-32, whose cost
    would be noticeable beside decoding. Against deliberate changes only SHA-256 protects.
    """
    return xxhash.xxh3_64_intdigest(content) & 0xFFFF_FFFF  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Checksums:
    """Checksums of all parts of a sample."""

    frames: np.ndarray
    """Shape `[F]`, uint32: checksum of each frame's coded bytes."""
    heads: np.ndarray
    """Shape `[S]`, uint32: checksum of each segment's head, see `segment_checksums`."""
    facts: int
    """Checksum of the JSON member."""


def segment_checksums(
    content: Buffer,
    offsets: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    payload: Payload,
) -> tuple[np.ndarray, int]:
    """Compute the checksums of one segment.

    Args:
        content: The bytes of the segment.
        offsets: Shape `[F]`: start of each frame in bytes.
        lengths: Shape `[F]`: length of each frame in bytes.
        payload: Format of the segment.

    Returns:
        The checksums of its frames, `[F]`, uint32; and that of its head: the bytes before the first
        frame and, in mp4, those after the last. A JPEG also has restart markers between frames and
        an end marker: they are the same in all JPEGs, and the loader does not read them.
    """
    view = memoryview(content)  # pyright: ignore[reportArgumentType]
    places = [(int(o), int(o) + int(n)) for o, n in zip(offsets, lengths, strict=True)]
    frames = np.array([checksum(view[low:high]) for low, high in places], np.uint32)
    before, after = view[: places[0][0]], view[places[-1][1] :]
    return frames, checksum(b"".join([before, after]) if payload == "mp4" else before)


@dataclass(frozen=True)
class FrameTable:
    """The `frames.i32` member: where each frame's coded bytes are.

    As int32, little-endian: `[schema version, label, F, height, width, S, frames per segment, 0]`,
    then F offsets and F lengths, both in bytes, each offset relative to the start of the frame's
    segment; then as uint32 F checksums of frames, S of segments' heads, one of the facts, and one
    of all bytes of this member before it. Version 1 has no checksums. The header that all
    selections share is the bytes of segment 0 before its first frame.

    Args:
        label: Index into the manifest's classes, or -1.
        height: Rows of a frame.
        width: Columns of a frame.
        frames_per_segment: Frames in every segment but the last.
        offsets: Shape `[F]`, int32.
        lengths: Shape `[F]`, int32; without the restart marker.
        checksums: None in tables of version 1.
    """

    label: int
    height: int
    width: int
    frames_per_segment: int
    offsets: np.ndarray
    lengths: np.ndarray
    checksums: Checksums | None = None

    _NUM_FIXED = 8

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.offsets)

    @property
    def num_segments(self) -> int:
        """S."""
        return -(-self.num_frames // self.frames_per_segment)

    def segment(self, number: int) -> slice:
        """The range of frame numbers of a segment."""
        first = number * self.frames_per_segment
        return slice(first, min(first + self.frames_per_segment, self.num_frames))

    def check(self, form: NormalForm, row: "SourceRow") -> None:
        """Compare the table with the sample's entry in the manifest.

        Raises:
            ShardError: They disagree.
        """
        found = (self.num_frames, self.label, self.width, self.height, self.frames_per_segment)
        expected = (row.num_frames, row.label, form.width, form.height, form.frames_per_segment)
        if found != expected:
            raise ShardError("the frame table does not agree with the manifest; shard again")

    def to_bytes(self) -> bytes:
        """Encode the table as the member's bytes."""
        sums = self.checksums
        if sums is None:
            raise AssertionError("a frame table without checksums is of an old version")
        fixed = [
            SCHEMA_VERSION,
            self.label,
            self.num_frames,
            self.height,
            self.width,
            self.num_segments,
            self.frames_per_segment,
            0,
        ]
        signed = np.concatenate([np.array(fixed), self.offsets, self.lengths]).astype("<i4")
        unsigned = np.concatenate([sums.frames, sums.heads, [sums.facts]]).astype("<u4")
        content = signed.tobytes() + unsigned.tobytes()
        return content + checksum(content).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, content: bytes) -> "FrameTable":
        """Parse the member and check that it is consistent.

        Raises:
            ShardError: The content is no frame table, is damaged, or has another version.
        """
        if len(content) % 4 or len(content) < 4 * cls._NUM_FIXED:
            raise ShardError(f"frame table: {len(content)} bytes are not a table; shard again")
        table = np.frombuffer(content, "<i4")
        version, label, count, height, width, segments, per_segment, zero = table[
            : cls._NUM_FIXED
        ].tolist()
        if version not in READABLE_VERSIONS:
            raise ShardError(
                f"frame table: version {version}, expected 1 to {SCHEMA_VERSION}; the shard is "
                "damaged or newer than this program"
            )
        places = table[cls._NUM_FIXED :]
        if not 0 < count <= MAX_FRAMES or per_segment < 1 or label < NO_LABEL or zero:
            raise ShardError("frame table: a number is out of its range; the shard is damaged")
        if segments != -(-count // per_segment):
            raise ShardError(
                f"frame table: {segments} segments for {count} frames; the shard is damaged"
            )
        sums = None
        num_sums = count + segments + 2 if version > 1 else 0
        if len(places) != 2 * count + num_sums:
            raise ShardError(
                f"frame table: {len(places)} numbers for {count} frames; the shard is damaged"
            )
        if version > 1:
            found = places[2 * count :].view("<u4")
            if checksum(memoryview(content)[:-4]) != int(found[-1]):
                raise ShardError("frame table: its checksum differs; the shard is damaged")
            sums = Checksums(found[:count], found[count:-2], int(found[-2]))
        return cls(
            label=label,
            height=height,
            width=width,
            frames_per_segment=per_segment,
            offsets=places[:count],
            lengths=places[count : 2 * count],
            checksums=sums,
        )


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """The manifest's entry of one tar file."""

    name: str
    num_samples: Annotated[int, Meta(ge=1, le=1 << 32)]
    num_frames: _Count
    num_bytes: _Count
    sha256: Annotated[str, Digest]
    index_sha256: Annotated[str, Digest] | None = None
    """SHA-256 of the index file; None in manifests of version 1."""


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """The result of sharding one source video; a line of `samples.jsonl`."""

    source: _Text
    status: Literal["written", "rejected", "absent"]
    key: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    label: _Label = NO_LABEL
    num_frames: _NumFrames = 0
    shard: Annotated[int, Meta(ge=0, lt=1 << 32)] | None = None
    """Index into the manifest's shards."""
    position: Annotated[int, Meta(ge=0, lt=1 << 32)] | None = None
    """Position in the shard, from 0."""
    checksum: _Checksum | None = None
    """Checksum of the video's bytes, for foreign samples, which have no frame table."""
    reason: _Text | None = None
    """A `FaultKind` value, for rejected videos."""
    detail: _Text | None = None
    notes: Annotated[list[_Text], Meta(max_length=100)] | None = None
    """Notes on a written video, for example that its header declares more frames."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a data set: its format, shards and the result of every source video."""

    schema: int = SCHEMA_VERSION
    """Version of the format."""
    dataset: str
    split: str
    form: NormalForm
    classes: tuple[str, ...]
    """Class names by label index; empty for videos without labels."""
    shards: tuple[ShardEntry, ...]
    settings: dict[str, Any]
    """Other settings that determine the bytes: seed, samples per shard."""
    digest: str
    """SHA-256 over all fields above and all rows; identifies the data set."""
    rows: tuple[SourceRow, ...]
    """All source videos, ordered by source name."""

    @cached_property
    def written(self) -> tuple[SourceRow, ...]:
        """The written samples in the order in which the shards store them."""
        rows = [r for r in self.rows if r.status == "written"]
        return tuple(sorted(rows, key=lambda r: (r.shard or 0, r.position or 0)))

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(s.num_samples for s in self.shards)
