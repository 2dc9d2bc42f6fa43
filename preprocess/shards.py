"""Write one tar with its index: same members, same bytes; whole or not at all."""

import hashlib
import os
import tarfile
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from strata.schema import INDEX_SUFFIX, SHARD_SUFFIX

__all__ = ["INDEX_VERSION", "ShardWriter", "replace_file", "shard_name", "sync_folder"]

_BLOCK = 512
INDEX_VERSION = "v1.2"
"""Of DALI's `wds2idx`."""
_TEMPORARY = ".tmp"


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:06d}{SHARD_SUFFIX}"


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file durably so that a reader sees the old one or the new one, never a part.

    Several processes may do it at once, each under a temporary name of its own.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


class ShardWriter:
    """An uncompressed ustar file and its `wds2idx` index, under temporary names until `finish`.

    Owner, time and mode of the members are fixed, so the bytes depend on the samples alone.

    Args:
        folder: Where the shard goes.
        index: Its number.
        tag: Part of the temporary name, so that nobody else writes to the same file.
    """

    def __init__(self, folder: Path, index: int, tag: str = "0-of-1") -> None:
        self.path = folder / shard_name(index)
        self._temporary = self.path.with_name(f"{self.path.name}.{tag}{_TEMPORARY}")
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._offset = 0
        self._lines: list[str] = []
        self._members: list[str] = []
        self._sample_start = (0, self._hash.copy())

    @property
    def num_samples(self) -> int:
        """Samples written and kept."""
        return len(self._lines)

    def begin_sample(self) -> None:
        """Start a sample; what `add` writes from now on can be taken back by `drop_sample`."""
        self._members = []
        self._sample_start = (self._offset, self._hash.copy())

    def add(self, key: str, ext: str, content: bytes) -> None:
        """Append one member of the sample that was begun."""
        name = f"{key}.{ext}"
        header = tarfile.TarInfo(name)
        header.size = len(content)
        header.mode = 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        self._members.append(f"{ext} {self._offset} {len(content)} {name}")
        self._write(content)
        self._write(b"\0" * (-len(content) % _BLOCK))

    def end_sample(self) -> None:
        """Keep the sample."""
        self._lines.append(" ".join(self._members))

    def drop_sample(self) -> None:
        """Take back all that was added since `begin_sample`."""
        self._offset, self._hash = self._sample_start[0], self._sample_start[1].copy()
        self._members = []
        self._file.seek(self._offset)
        self._file.truncate()

    def finish(self) -> tuple[int, str]:
        """End the tar, write the index, make both durable and give them their names.

        Returns:
            Size in bytes and SHA-256 of the tar.
        """
        self._write(b"\0" * (2 * _BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        head = f"{INDEX_VERSION} {len(self._lines)}\n"
        index = head + "".join(line + "\n" for line in self._lines)
        replace_file(self.path.with_suffix(INDEX_SUFFIX), index.encode())
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)
        return self._offset, self._hash.hexdigest()

    def discard(self) -> None:
        """Remove the unfinished shard."""
        with suppress(OSError):  # On a full disk closing fails to write, and need not.
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._offset += len(content)

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
