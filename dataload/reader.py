"""Random access to the coded frames of samples, by positioned reads from tar files.

A batch is read in two passes: advise the kernel of all frame tables and read them; advise it of all
coded frames and read them. So a cold disk or a network file system gets the requests of a batch at
once instead of one after the other, without threads. The shards are not memory-mapped: a file that
shrinks or a server that fails would end the process with a signal instead of an error, a mapping
keeps a descriptor open for each of some thousand shards, and pages would be read one at a time.

All data that is read of a sample is compared with its checksum, in data sets that have checksums:
the frame table here, the header and the frames when they are joined, a foreign video as a unit.
"""

import errno
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from strata.dataload.faults import Fault, SampleFaultError
from strata.dataload.storage import (
    DownloadConfig,
    LocalFolder,
    ShardFolder,
    open_folder,
)
from strata.errors import ShardError
from strata.files import sha256_of
from strata.format.index import Place, read_index
from strata.format.manifest import read_manifest
from strata.format.schema import (
    FRAMES_EXT,
    INDEX_SUFFIX,
    FrameTable,
    Manifest,
    ShardEntry,
    checksum,
    segment_ext,
)
from strata.format.strip_jpeg import assemble_strip

__all__ = ["ShardReader"]

_OPEN_SHARDS = 256
"""Open descriptors to keep; a pool of 16,384 samples is in 130 shards of 128."""

_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class _OpenShards:
    """Reads from shards and keeps the descriptors of the most recently used ones.

    Args:
        folder: Location of the shards.
        entries: All shards of the set.
        limit: Maximum number of open descriptors.
    """

    def __init__(self, folder: ShardFolder, entries: Sequence[ShardEntry], limit: int) -> None:
        self._folder, self._entries, self._limit = folder, entries, limit
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()
        # A reader that was not closed closes its descriptors when it is collected.
        weakref.finalize(self, _close_all, self._open)

    def read(self, shard: int, place: Place) -> bytes:
        """Read bytes of a shard.

        Raises:
            ShardError: The shard is too short or cannot be read.
        """
        offset, size = place
        try:
            # The lock is held so that no other thread closes the descriptor during the read.
            with self._lock:
                content = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise self._error(shard, f"cannot be read at {offset}: {error.strerror}") from error
        if len(content) != size:
            end = offset + len(content)
            raise self._error(shard, f"ends at {end}, it was cut off while in use")
        return content

    def advise(self, shard: int, place: Place) -> None:
        """Advise the kernel of the bytes that will be read."""
        try:
            with self._lock:
                os.posix_fadvise(self._descriptor(shard), *place, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            # Some file systems do not support advice; the read reports other errors.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise self._error(shard, f"cannot be read: {error.strerror}") from error

    def _error(self, shard: int, what: str) -> ShardError:
        return ShardError(f"shard {self._folder.location}/{self._entries[shard].name} {what}")

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        try:
            descriptor = os.open(self._folder.fetch(self._entries[shard]), _FLAGS)
        except FileNotFoundError:
            # Another process may have removed the shard between fetch and open.
            descriptor = os.open(self._folder.fetch(self._entries[shard]), _FLAGS)
        self._open[shard] = descriptor
        return descriptor

    def close(self) -> None:
        """Close all."""
        with self._lock:
            _close_all(self._open)


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class ShardReader:
    """Random access to the coded frames of a data set.

    Samples are numbered consecutively over the shards in the manifest's order.

    Args:
        folder: A folder that tools/shard.py wrote, or a URL of one.
        check: `size` compares every shard's size with the manifest at the start, `hash` its
            SHA-256 too, which reads the complete set once. Shards from a URL are always hashed when
            they are downloaded.
        download: The local cache of shards from a URL.

    Raises:
        ConfigError: The URL's protocol is not supported.
        ShardError: The manifest, a shard or an index is missing or inconsistent.
    """

    def __init__(
        self,
        folder: str | Path,
        check: Literal["size", "hash"] = "size",
        download: DownloadConfig | None = None,
    ) -> None:
        self._place = open_folder(folder, download)
        self.manifest: Manifest = read_manifest(self._place.manifest_folder)
        entries = self.manifest.shards
        self._place.check(entries, self.manifest.digest)
        self._files = _OpenShards(self._place, entries, _OPEN_SHARDS)
        self._indices: dict[int, list[dict[str, Place]]] = {}
        self._first = np.concatenate([[0], np.cumsum([s.num_samples for s in entries])]).astype(
            np.int64
        )
        self._rows = self.manifest.written
        self.keys = tuple(row.key or "" for row in self._rows)
        self.labels = np.array([row.label for row in self._rows], np.int64)
        self.num_frames = np.array([row.num_frames for row in self._rows], np.int64)
        if isinstance(self._place, LocalFolder):
            for number, entry in enumerate(entries):
                if check == "hash":
                    _check_hash(self._place.fetch(entry), entry.sha256)
                self._index(number)

    @property
    def location(self) -> str:
        """The folder or URL of the shards."""
        return self._place.location

    @property
    def name(self) -> str:
        """The last part of the folder or URL."""
        return self.location.rstrip("/").rpartition("/")[2]

    @property
    def limit_bytes(self) -> int | None:
        """Bytes of the set that the local cache can hold; None for all of it."""
        return self._place.limit_bytes

    @property
    def num_samples(self) -> int:
        """Number of samples in the set."""
        return int(self._first[-1])

    @property
    def num_listed(self) -> int:
        """Number of source videos: samples, and those that were rejected or absent."""
        return len(self.manifest.rows)

    def _index(self, shard: int) -> list[dict[str, Place]]:
        if shard not in self._indices:
            entry = self.manifest.shards[shard]
            path = self._place.fetch(entry).with_suffix(INDEX_SUFFIX)
            keys = self.keys[self._first[shard] : self._first[shard + 1]]
            self._indices[shard] = read_index(path, entry, keys)
        return self._indices[shard]

    def _shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self._first, sample, side="right")) - 1

    def samples_of(self, shard: int) -> range:
        """The samples of a shard, in the order in which it stores them."""
        return range(int(self._first[shard]), int(self._first[shard + 1]))

    def members(self, sample: int) -> tuple[int, dict[str, Place]]:
        """A sample's shard, and the offset and size of each of its members by extension."""
        shard = self._shard_of(sample)
        return shard, self._index(shard)[sample - int(self._first[shard])]

    def fault(self, sample: int, reason: str) -> Fault:
        """Make the description of a faulty sample."""
        return Fault(
            sample=sample,
            key=self.keys[sample],
            shard=self.manifest.shards[self._shard_of(sample)].name,
            reason=" ".join(reason.split()),
        )

    def member(self, sample: int, ext: str) -> bytes:
        """Read one complete member of a sample.

        Raises:
            SampleFaultError: The sample has no such member.
            ShardError: The shard cannot be read.
        """
        shard, members = self.members(sample)
        if ext not in members:
            raise SampleFaultError([self.fault(sample, f"no member {ext}")])
        return self._files.read(shard, members[ext])

    def table(self, sample: int) -> FrameTable:
        """Read a sample's frame table and compare it with the manifest.

        Raises:
            SampleFaultError: The sample has none, or it is damaged.
            ShardError: The shard cannot be read.
        """
        content = self.member(sample, FRAMES_EXT)
        try:
            table = FrameTable.from_bytes(content)
            table.check(self.manifest.form, self._rows[sample])
        except ShardError as error:
            raise SampleFaultError([self.fault(sample, str(error))]) from error
        return table

    def foreign_video(self, sample: int, ext: str) -> bytes:
        """Read the video of a foreign sample.

        Raises:
            SampleFaultError: The sample has none, or its checksum differs.
            ShardError: The shard cannot be read.
        """
        content = self.member(sample, ext)
        expected = self._rows[sample].checksum
        if expected is not None and checksum(content) != expected:
            reason = "the video is damaged, its checksum differs"
            raise SampleFaultError([self.fault(sample, reason)])
        return content

    def fetch_ahead(self, samples: np.ndarray) -> None:
        """Announce the next samples in order, so that shards of a URL are downloaded early."""
        if self.limit_bytes is None:
            return
        shards = np.searchsorted(self._first, samples, side="right") - 1
        order = dict.fromkeys(shards.tolist())
        self._place.fetch_ahead([self.manifest.shards[shard] for shard in order])

    def strips(
        self, samples: Sequence[int] | np.ndarray, frames: Sequence[np.ndarray] | np.ndarray
    ) -> list[np.ndarray]:
        """Read the chosen frames of each sample as one tall JPEG.

        Args:
            samples: N sample indices, each in [0, num_samples).
            frames: For each sample `[T]`: frame indices, any order, repeats allowed.

        Returns:
            N arrays uint8 `[n]`, each a JPEG of T frames stacked vertically.

        Raises:
            SampleFaultError: Samples are damaged; the message names all of them.
            ShardError: A shard cannot be read, or the set's payload is not jpeg.
        """
        if self.manifest.form.payload != "jpeg":
            raise ShardError(
                f"{self.location} has the payload {self.manifest.form.payload}, strips are cut of "
                "jpeg only; shard the videos again with --payload jpeg"
            )
        chosen = np.asarray(samples, np.int64)
        self.fetch_ahead(chosen)
        found: list[np.ndarray] = []
        faults: list[Fault] = []
        cuts: list[_Cut | None] = []
        places = [self.members(sample) for sample in chosen.tolist()]
        for shard, members in places:
            if FRAMES_EXT in members:
                self._files.advise(shard, members[FRAMES_EXT])
        for sample, (shard, members), wanted in zip(chosen.tolist(), places, frames, strict=True):
            try:
                table = self.table(sample)
                cut = _Cut.of(shard, members, table, np.asarray(wanted, np.int64))
                for place in cut.places:
                    self._files.advise(shard, place)
                cuts.append(cut)
            except SampleFaultError as error:
                faults += error.faults
                cuts.append(None)
            except _SampleError as error:
                faults.append(self.fault(sample, str(error)))
                cuts.append(None)
        for sample, cut in zip(chosen.tolist(), cuts, strict=True):
            if cut is None:
                continue
            try:
                segments = [self._files.read(cut.shard, place) for place in cut.places]
                found.append(cut.join(segments))
            except _SampleError as error:
                faults.append(self.fault(sample, str(error)))
        if faults:
            raise SampleFaultError(faults)
        return found

    def strip(self, sample: int, frames: np.ndarray) -> np.ndarray:
        """Read the chosen frames of one sample, see `strips`."""
        return self.strips([sample], [frames])[0]

    def close(self) -> None:
        """Close the shards."""
        self._files.close()
        self._place.close()


class _SampleError(ShardError):
    """A fault in one sample's bytes, not in the storage of the shard."""


@dataclass(frozen=True)
class _Cut:
    """Byte ranges to read for frames of a sample: the shared header and a span per segment."""

    shard: int
    places: list[Place]
    homes: list[int]
    """The segment of each place except the first."""
    table: FrameTable
    """The frame table with offsets into the bytes read instead of the segments."""
    frames: np.ndarray

    @classmethod
    def of(
        cls, shard: int, members: dict[str, Place], table: FrameTable, frames: np.ndarray
    ) -> "_Cut":
        """Plan the reads.

        Raises:
            _SampleError: A frame or segment does not exist, or the table is out of range.
        """
        low, high = int(frames.min()), int(frames.max())
        if low < 0 or high >= table.num_frames:
            raise _SampleError(
                f"frame {low if low < 0 else high} asked for, the sample has {table.num_frames}"
            )
        header = int(table.offsets[0])
        offsets = table.offsets.copy()
        homes = np.unique(frames // table.frames_per_segment).tolist()
        places: list[Place] = []
        for home in [0, *homes]:
            ext = segment_ext(home)
            if ext not in members:
                raise _SampleError(f"no member {ext}")
            start, size = members[ext]
            if not places:
                if not 0 < header <= size:
                    raise _SampleError("the frame table points outside its segment")
                places.append((start, header))
                continue
            inside = frames[frames // table.frames_per_segment == home]
            starts = table.offsets[inside].astype(np.int64)
            first, last = int(starts.min()), int((starts + table.lengths[inside]).max())
            if not 0 <= first <= last <= size:
                raise _SampleError("the frame table points outside its segment")
            places.append((start + first, last - first))
            offsets[table.segment(home)] += (header if home == 0 else 0) - first
        # assemble_strip gets the header's length from here; frame 0 has this offset anyway.
        offsets[0] = header
        return cls(shard, places, homes, replace(table, offsets=offsets), frames)

    def join(self, read: Sequence[bytes]) -> np.ndarray:
        """Assemble the strip from the bytes that were read at `places`."""
        header, *spans = read
        segments = [b""] * (max(self.homes) + 1)
        for home, span in zip(self.homes, spans, strict=True):
            segments[home] = span
        segments[0] = header + segments[0]
        try:
            return assemble_strip(segments, self.table, self.frames)
        except ShardError as error:
            raise _SampleError(str(error)) from error


def _check_hash(path: Path, expected: str) -> None:
    if sha256_of(path) != expected:
        raise ShardError(
            f"shard {path} is not what the manifest says (SHA-256 differs); "
            "copy it again or run the same tools/shard.py again"
        )
