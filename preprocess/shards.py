"""Write one tar with its index: equal members give equal bytes, and only a finished tar is kept."""

import errno
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from strata.files import sha256_of, sync_path, write_atomic
from strata.format.index import index_bytes
from strata.format.schema import INDEX_SUFFIX, SHARD_SUFFIX
from strata.format.shard_tar import ARCHIVE_END, MemberPlace

__all__ = ["ShardWriter", "shard_name"]

_TEMPORARY = ".tmp"


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:06d}{SHARD_SUFFIX}"


class ShardWriter:
    """An uncompressed ustar file and its `wds2idx` index, under temporary names until `finish`.

    Owner, time and mode of the members are fixed, so the bytes depend on the samples alone.

    Args:
        folder: Where the shard goes.
        index: Its number.
        tag: Part of the temporary name, different in every slice.
    """

    def __init__(self, folder: Path, index: int, tag: str = "0-of-1") -> None:
        self.path = folder / shard_name(index)
        self._temporary = self.path.with_name(f"{self.path.name}.{tag}{_TEMPORARY}")
        self._file = self._temporary.open("wb", buffering=0)
        self._offset = 0
        self._lines: list[str] = []
        self._members: list[str] = []
        self._sample_start = 0

    @property
    def num_samples(self) -> int:
        """Samples written and kept."""
        return len(self._lines)

    def begin_sample(self) -> None:
        """Start a sample; `drop_sample` removes what `add` writes from here."""
        self._members = []
        self._sample_start = self._offset

    def add(self, members: Sequence[MemberPlace], descriptor: int, num_bytes: int) -> None:
        """Append members of the current sample, already laid out as in a tar.

        Args:
            members: Name, offset of the content in these bytes and its size, for each.
            descriptor: Of a file that holds the bytes from its beginning.
            num_bytes: How many.
        """
        for name, offset, size in members:
            ext = name.partition(".")[2]
            self._members.append(f"{ext} {self._offset + offset} {size} {name}")
        done = 0
        while done < num_bytes:
            count = os.sendfile(self._file.fileno(), descriptor, done, num_bytes - done)
            if not count:
                raise AssertionError(f"{num_bytes} bytes were announced, {done} came")
            done += count
        self._offset += num_bytes

    def end_sample(self) -> None:
        """Keep the sample."""
        self._lines.append(" ".join(self._members))

    def drop_sample(self) -> None:
        """Remove all that was added since `begin_sample`."""
        self._offset = self._sample_start
        self._members = []
        self._file.seek(self._offset)
        self._file.truncate()

    def finish(self) -> tuple[int, str, str]:
        """End the tar, write the index, sync both and give them their final names.

        The tar is read again for its hash, so the hash is that of the file's content.

        Returns:
            Size in bytes and SHA-256 of the tar, and SHA-256 of the index.
        """
        end = ARCHIVE_END
        while end:  # A raw file may write less than it is given.
            end = end[self._file.write(end) :]
        self._offset += len(ARCHIVE_END)
        os.fsync(self._file.fileno())
        self._file.close()
        sha256, num_bytes = sha256_of(self._temporary), self._temporary.stat().st_size
        if num_bytes != self._offset:
            raise OSError(errno.EIO, f"{num_bytes} of {self._offset} bytes read back")
        index = index_bytes(self._lines)
        write_atomic(self.path.with_suffix(INDEX_SUFFIX), index)
        self._temporary.replace(self.path)
        sync_path(self.path.parent)
        return self._offset, sha256, hashlib.sha256(index).hexdigest()

    def discard(self) -> None:
        """Remove the unfinished shard."""
        with suppress(OSError):  # On a full disk closing may fail; the file is removed anyway.
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._file.closed:
            self.discard()
