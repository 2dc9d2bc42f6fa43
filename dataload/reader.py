"""The bytes of a sample from tar and index: local files, memory-mapped."""

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from strata.dataload.faults import Fault, SampleFaultError
from strata.errors import ShardError
from strata.schema import (
    FRAMES_EXT,
    INDEX_SUFFIX,
    FrameTable,
    Manifest,
    ShardEntry,
    read_manifest,
    segment_ext,
)
from strata.strip import assemble_strip

__all__ = ["ShardReader"]

_HASH_CHUNK_BYTES = 1 << 24


class _Shard:
    """One tar: where the members of its samples are, and its bytes once they are asked for."""

    def __init__(self, folder: Path, entry: ShardEntry, check: Literal["size", "hash"]) -> None:
        self.path = folder / entry.name
        if not self.path.is_file():
            raise ShardError(f"shard {self.path} is missing; run the same tools/shard.py again")
        size = self.path.stat().st_size
        if size != entry.num_bytes:
            raise ShardError(
                f"shard {self.path} has {size} bytes, the manifest says {entry.num_bytes}; "
                "copy it again or run the same tools/shard.py again"
            )
        if check == "hash":
            self._check_hash(entry.sha256)
        self.members = _read_index(self.path.with_suffix(INDEX_SUFFIX), entry.num_samples)
        self._bytes: memoryview | None = None

    def _check_hash(self, expected: str) -> None:
        digest = hashlib.sha256()
        with self.path.open("rb") as content:
            while chunk := content.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise ShardError(
                f"shard {self.path} is not what the manifest says (SHA-256 differs); "
                "copy it again or run the same tools/shard.py again"
            )

    @property
    def bytes(self) -> memoryview:
        if self._bytes is None:
            with self.path.open("rb") as content:
                self._bytes = memoryview(mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ))
        return self._bytes


def _read_index(path: Path, num_samples: int) -> list[dict[str, tuple[int, int]]]:
    """Offsets and sizes in bytes by extension, for each sample; the form of DALI's wds2idx."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        version, count = header.split()
        samples = []
        for line in lines:
            words = line.split(" ")
            samples.append(
                {words[i]: (int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4)}
            )
    except (OSError, ValueError, IndexError) as error:
        raise ShardError(
            f"index {path} is missing or damaged ({error}); run the same tools/shard.py again"
        ) from error
    if version != "v1.2" or int(count) != len(samples) or len(samples) != num_samples:
        raise ShardError(
            f"index {path} lists {len(samples)} samples, the manifest says {num_samples}; "
            "run the same tools/shard.py again"
        )
    return samples


class ShardReader:
    """Random access to the coded frames of a data set.

    Samples are numbered through the shards in the manifest's order.

    Args:
        folder: A folder that tools/shard.py wrote.
        check: `size` compares every shard's size with the manifest at the start, `hash` its
            SHA-256 too, which reads the whole set once.

    Raises:
        ShardError: The manifest, a shard or an index is missing or disagrees.
    """

    def __init__(self, folder: Path, check: Literal["size", "hash"] = "size") -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        if self.manifest.form.payload != "jpeg":
            raise ShardError(
                f"{folder} has the payload {self.manifest.form.payload}; the loader reads jpeg: "
                "shard the videos again with --payload jpeg"
            )
        self._shards = [_Shard(folder, entry, check) for entry in self.manifest.shards]
        self._first = np.concatenate(
            [[0], np.cumsum([s.num_samples for s in self.manifest.shards])]
        ).astype(np.int64)
        rows = self.manifest.written
        if len(rows) != self.num_samples:
            raise ShardError(
                f"{folder}: the manifest lists {len(rows)} written samples, its shards hold "
                f"{self.num_samples}; run the same tools/shard.py again"
            )
        self.keys = tuple(row.key or "" for row in rows)
        self.labels = np.array([row.label for row in rows], np.int64)
        self.num_frames = np.array([row.num_frames for row in rows], np.int64)

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return int(self._first[-1])

    def fault(self, sample: int, reason: str) -> Fault:
        """Name a sample that cannot be used."""
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return Fault(
            sample=sample,
            key=self.keys[sample],
            shard=self.manifest.shards[shard].name,
            reason=" ".join(reason.split()),
        )

    def strips(
        self, samples: Sequence[int] | np.ndarray, frames: Sequence[np.ndarray] | np.ndarray
    ) -> list[np.ndarray]:
        """The chosen frames of several samples, see `strip`.

        Raises:
            SampleFaultError: Samples cannot be read; it names all of them.
        """
        found, faults = [], []
        for sample, chosen in zip(samples, frames, strict=True):
            try:
                found.append(self.strip(int(sample), chosen))
            except SampleFaultError as error:
                faults += error.faults
        if faults:
            raise SampleFaultError(faults)
        return found

    def strip(self, sample: int, frames: np.ndarray) -> np.ndarray:
        """The chosen frames of a sample as one tall JPEG.

        Args:
            sample: In [0, num_samples).
            frames: Shape `[T]`: frame indices, any order, repeats allowed.

        Returns:
            Shape `[n]`, uint8: a JPEG of T frames below each other.

        Raises:
            SampleFaultError: The sample's table and segments disagree.
        """
        number = int(np.searchsorted(self._first, sample, side="right")) - 1
        shard = self._shards[number]
        members = shard.members[sample - int(self._first[number])]
        try:
            table = FrameTable.from_bytes(self._member(shard, members, FRAMES_EXT))
            segments = [
                self._member(shard, members, segment_ext(s)) for s in range(table.num_segments)
            ]
            return assemble_strip(segments, table, frames)
        except (KeyError, ShardError) as error:
            raise SampleFaultError([self.fault(sample, str(error))]) from error

    @staticmethod
    def _member(shard: _Shard, members: dict[str, tuple[int, int]], ext: str) -> memoryview:
        offset, size = members[ext]
        return shard.bytes[offset : offset + size]
