"""What a sample in a shard is: members, fields, units, version. docs/data-format.md tells it whole.

A shard is an uncompressed tar in WebDataset convention with an index file of DALI's `wds2idx` form
beside it. A sample is a run of members whose names share the part before the first dot, its key:

    <key>.000.jpg      the first segment: its frames stacked into one tall baseline JPEG
    <key>.001.jpg      the next segment, if the video is longer than one JPEG can be tall
    <key>.frames.i32   what the loader needs, little-endian int32, see `FrameTable`
    <key>.json         facts for people and other programs, see `SampleFacts`

With the `mp4` payload the segments are `<key>.000.mp4` and so on, short videos of their own.

Every JPEG has a restart marker exactly at each frame's end and standard Huffman tables, and all
segments of a data set share their quantisation tables. So the coded bytes of any selection of
frames, in any order, are a valid JPEG behind the common header: the loader cuts out the frames it
needs and decodes those alone.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from strata.errors import ShardError

__all__ = [
    "FACTS_EXT",
    "FRAMES_EXT",
    "INDEX_SUFFIX",
    "MANIFEST_NAME",
    "MAX_JPEG_ROWS",
    "NO_LABEL",
    "SAMPLES_NAME",
    "SCHEMA_VERSION",
    "SHARD_SUFFIX",
    "FrameTable",
    "Manifest",
    "NormalForm",
    "Payload",
    "SampleFacts",
    "ShardEntry",
    "SourceRow",
    "read_manifest",
    "segment_ext",
]

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SAMPLES_NAME = "samples.jsonl"
SHARD_SUFFIX = ".tar"
INDEX_SUFFIX = ".idx"
FRAMES_EXT = "frames.i32"
FACTS_EXT = "json"
NO_LABEL = -1
MAX_JPEG_ROWS = 65_500
"""The tallest picture that libjpeg writes and reads."""


Payload = Literal["jpeg", "mp4", "foreign"]


def segment_ext(segment: int, payload: Payload = "jpeg") -> str:
    """The member extension of a segment, `000.jpg` for the first, `1000.jpg` for the 1001st."""
    return f"{segment:03d}.{'jpg' if payload == 'jpeg' else 'mp4'}"


@dataclass(frozen=True, kw_only=True)
class NormalForm:
    """The one form that every sample of a data set has; part of the manifest."""

    width: int = 176
    """Pixels, a multiple of 16."""
    height: int = 128
    """Pixels, a multiple of 16."""
    fit: Literal["stretch", "crop"] = "stretch"
    """How another aspect ratio becomes this one: stretched, or the centre cut out."""
    payload: Payload = "jpeg"
    """How pictures are stored. `foreign` is what `tools/shard.py index` found: videos of any size,
    which become this form when they are decoded."""
    quality: int = 90
    """JPEG quality, 1 to 95."""
    codec: Literal["h264", "vp9", "mjpeg"] = "h264"
    """Of the mp4 payload."""
    quantizer: int = 20
    """Of the mp4 payload, lower is better: CRF of h264 (0 to 51) and vp9 (0 to 63), qscale of mjpeg
    (1 to 31)."""
    gop: int = 16
    """Of the mp4 payload: frames from one key frame to the next. Every group is closed."""
    segment_frames: int = 0
    """Most frames in a segment; 0 for as many as one JPEG holds, or 64 for mp4, as DALI decodes
    from a segment's beginning."""
    min_frames: int = 1
    """Videos with fewer frames are rejected. Those too short for a pretraining's window belong in
    the set too: the evaluations use them, and the pretraining leaves them out by itself."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ShardError: A field is out of its range.
        """
        for name in ("width", "height"):
            value = getattr(self, name)
            if value <= 0 or value % 16:
                raise ShardError(f"normal form: {name} is {value}; use a positive multiple of 16")
        if not 1 <= self.quality <= 95:
            raise ShardError(f"normal form: quality is {self.quality}; use 1 to 95")
        if self.min_frames < 1:
            raise ShardError(f"normal form: min_frames is {self.min_frames}; use 1 or more")

        coarsest = {"h264": 51, "vp9": 63, "mjpeg": 31}[self.codec]
        finest = 1 if self.codec == "mjpeg" else 0
        if self.payload == "mp4" and not finest <= self.quantizer <= coarsest:
            raise ShardError(
                f"normal form: quantizer is {self.quantizer}; "
                f"{self.codec} has {finest} to {coarsest}"
            )
        if self.gop < 1:
            raise ShardError(f"normal form: gop is {self.gop}; use 1 or more")
        most = MAX_JPEG_ROWS // self.height if self.payload == "jpeg" else 1 << 20
        if not 0 <= self.segment_frames <= most:
            raise ShardError(
                f"normal form: segment_frames is {self.segment_frames}; use 0 to {most}"
            )

    @property
    def frames_per_segment(self) -> int:
        """Frames in every segment of a sample but the last."""
        whole = MAX_JPEG_ROWS // self.height if self.payload == "jpeg" else 64
        return self.segment_frames or whole


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """The JSON member of a sample."""

    key: str
    source: str
    """The source file, relative to the videos' folder, with forward slashes."""
    source_sha256: str
    source_bytes: int
    label: int
    """Index into the manifest's classes, or -1."""
    class_name: str | None
    num_frames: int
    """Frames stored."""
    fps: float
    """Frames per second of the source, kept."""
    resampled: bool = False
    """Whether the source's rate varied and frames were repeated or dropped to make it constant."""
    deinterlaced: bool = False
    """Whether the source had interlaced frames, which were made whole."""
    source_width: int
    source_height: int
    source_codec: str
    source_pixel_format: str
    rotation_degrees: int
    """Rotation that the container asked for and that was applied."""

    def to_json(self) -> bytes:
        """Canonical UTF-8 JSON."""
        return json.dumps(
            dataclasses.asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":")
        ).encode()


@dataclass(frozen=True)
class FrameTable:
    """The `frames.i32` member: where each frame's coded bytes are.

    As int32, little-endian: `[schema version, label, F, height, width, S, frames per segment, 0]`,
    then F offsets and F lengths, both in bytes, each offset relative to the start of the JPEG of
    the frame's segment. The header that all selections share is the bytes of segment 0 before its
    first frame.

    Args:
        label: Index into the manifest's classes, or -1.
        height: Rows of a frame.
        width: Columns of a frame.
        frames_per_segment: Frames in every segment but the last.
        offsets: Shape `[F]`, int32.
        lengths: Shape `[F]`, int32; without the restart marker.
    """

    label: int
    height: int
    width: int
    frames_per_segment: int
    offsets: np.ndarray
    lengths: np.ndarray

    _NUM_FIXED = 8

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.offsets)

    @property
    def num_segments(self) -> int:
        """S."""
        return -(-self.num_frames // self.frames_per_segment)

    def to_bytes(self) -> bytes:
        """The member's content."""
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
        return np.concatenate([np.array(fixed), self.offsets, self.lengths]).astype("<i4").tobytes()

    @classmethod
    def from_bytes(cls, content: bytes | memoryview | np.ndarray) -> "FrameTable":
        """Parse the member.

        Raises:
            ShardError: The content is not such a table, or of another version.
        """
        table = np.frombuffer(content, "<i4")
        if len(table) < cls._NUM_FIXED or table[0] != SCHEMA_VERSION:
            found = table[0] if len(table) else "nothing"
            raise ShardError(
                f"frame table: version {found}, expected {SCHEMA_VERSION}; shard the videos again"
            )
        _, label, num_frames, height, width, _, frames_per_segment, _ = table[: cls._NUM_FIXED]
        rest = table[cls._NUM_FIXED :]
        if len(rest) != 2 * num_frames:
            raise ShardError(
                f"frame table: {len(rest)} numbers for {num_frames} frames; "
                "the shard is damaged, shard the videos again"
            )
        return cls(
            label=int(label),
            height=int(height),
            width=int(width),
            frames_per_segment=int(frames_per_segment),
            offsets=rest[:num_frames],
            lengths=rest[num_frames:],
        )


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of a data set."""

    name: str
    num_samples: int
    num_frames: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """What became of one source video; a line of `samples.jsonl`."""

    source: str
    status: Literal["written", "rejected", "absent"]
    key: str | None = None
    label: int = NO_LABEL
    num_frames: int = 0
    shard: int | None = None
    """Index into the manifest's shards."""
    position: int | None = None
    """Place in the shard, from 0."""
    reason: str | None = None
    """A `FaultKind` value, for rejected ones."""
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set's table: what it holds, in which form, and what became of every source."""

    dataset: str
    split: str
    form: NormalForm
    classes: tuple[str, ...]
    """Class names by label index; empty for videos without labels."""
    shards: tuple[ShardEntry, ...]
    settings: dict[str, Any]
    """What else decided the bytes: seed, samples per shard."""
    digest: str
    """SHA-256 over everything above and all rows: the identity of the data set."""
    rows: tuple[SourceRow, ...]
    """Every source, in the order of its source name."""

    @property
    def written(self) -> tuple[SourceRow, ...]:
        """The samples in the order in which they stand in the shards."""
        rows = [r for r in self.rows if r.status == "written"]
        return tuple(sorted(rows, key=lambda r: (r.shard or 0, r.position or 0)))

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(s.num_samples for s in self.shards)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a shard folder.

    Raises:
        ShardError: The folder or its manifest is missing, damaged, or of another version.
    """
    if not folder.is_dir():
        raise ShardError(
            f"shard folder {folder} does not exist; make it with tools/shard.py, or mend the path"
        )
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ShardError(
            f"shard folder {folder} has no {MANIFEST_NAME}; sharding did not finish or this is "
            "another kind of folder: run the same tools/shard.py command again"
        )
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        version = head.pop("schema")
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{path}: schema {version}, expected {SCHEMA_VERSION}; shard the videos again"
            )
        with (folder / SAMPLES_NAME).open(encoding="utf-8") as lines:
            rows = tuple(SourceRow(**json.loads(line)) for line in lines)
        return Manifest(
            dataset=head["dataset"],
            split=head["split"],
            form=NormalForm(**head["form"]),
            classes=tuple(head["classes"]),
            shards=tuple(ShardEntry(**s) for s in head["shards"]),
            settings=head["settings"],
            digest=head["digest"],
            rows=rows,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"{path}: not readable as a manifest ({error}); run the same tools/shard.py again"
        ) from error
