"""Storage of a set's shards and parts; a file appears only when it is complete."""

import errno
import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import msgspec

from strata.errors import ShardError
from strata.files import FolderLock, LockRecord, open_atomic
from strata.format.manifest import read_manifest
from strata.format.schema import MANIFEST_NAME, SAMPLES_NAME, Manifest
from strata.logs import get_logger
from strata.transfer import Store, as_url
from strata.untrusted import decode_json

__all__ = ["Place", "open_place"]

logger = get_logger(__name__)

_RENEW_S = 10.0
"""Seconds between renewals of a lease."""
_STALE_S = 60.0
"""Seconds without a renewal after which its holder is taken for dead."""
_ENDED = b"ended"
"""Content of a lease whose holder has ended."""


class Place:
    """A folder on a local or network file system. Names are relative to it.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.location = str(folder)
        """The folder or URL, for `open_place` in another process and for messages."""

    def names(self, folder: str, *, folders: bool = False) -> dict[str, int]:
        """Names and sizes of the files directly in a folder; empty if there is none.

        Args:
            folder: Relative to this place; empty for the place itself.
            folders: Whether folders count too.
        """
        try:
            with os.scandir(self._folder / folder) as scan:
                return {e.name: e.stat().st_size for e in scan if folders or e.is_file()}
        except FileNotFoundError:
            return {}
        except NotADirectoryError as error:
            raise ShardError(f"{self._folder} is a file; choose another --out") from error

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None if it is missing."""
        try:
            with self.reading(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def reading(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file.

        Raises:
            FileNotFoundError: It is missing.
        """
        return (self._folder / name).open("rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file, also for reading, that appears when the block ends without an error."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path) as file:
            yield file

    def write(self, name: str, content: bytes) -> None:
        """Write a file that appears when it is complete."""
        with self.writing(name) as file:
            file.write(content)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders, also those that are gone already."""
        for path in (self._folder / name for name in names):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def locked(self, name: str) -> AbstractContextManager[object]:
        """Hold a lock, so that one process does this work; one that is dead loses it.

        Raises:
            ShardError: Another process has it.
        """
        path = self._folder / name
        return FolderLock(path.parent, "sharding", ShardError, "wait for it", path.name)

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            ShardError: It is missing or damaged.
        """
        return read_manifest(self._folder)


class RemotePlace(Place):
    """A folder of an object store. A file is uploaded completely from an unnamed local one.

    Args:
        url: Its URL.
    """

    def __init__(self, url: str) -> None:
        self.location = url
        self._store = Store(url)

    def names(self, folder: str, *, folders: bool = False) -> dict[str, int]:
        """List a folder."""
        found = self._store.listed(folder)
        return {f.name: f.num_bytes for f in found if folders or not f.is_folder}

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """Download a file and open it."""
        with tempfile.TemporaryFile() as file:
            if not self._store.fetch(name, file):
                raise FileNotFoundError(errno.ENOENT, "no such file", f"{self.location}/{name}")
            yield file

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Open a local file that is uploaded when it is complete."""
        with tempfile.TemporaryFile() as file:
            yield file
            self._store.upload(file, name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders."""
        self._store.remove(list(names))

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lease: an object that its holder renews and that is taken over if it does not.

        Leases are numbered and the highest one counts. The next is written only if it is absent,
        which a store decides for one of several writers.
        """
        number = max(self._leases(name), default=0)
        if number:
            self._wait_for_end(f"{name}.{number}")
        own, record = f"{name}.{number + 1}", msgspec.json.encode(LockRecord.own())
        is_own = self._store.create(own, record)
        leases = self._leases(name)
        if not is_own or max(leases) > number + 1:
            raise self._in_use(None)
        self.remove(f"{name}.{k}" for k in leases if k <= number)
        over = threading.Event()

        def renew() -> None:
            for count in itertools.count(1):
                ended = over.wait(_RENEW_S)
                try:
                    if max(self._leases(name), default=0) > number + 1:
                        logger.warning("%s was taken over: this process was too slow", own)
                        return
                    # Not removed at the end: the numbers must not begin again while others look.
                    self.write(own, _ENDED if ended else record + b" " * count)
                except ShardError as error:
                    logger.warning("the lease cannot be renewed: %s", error)
                if ended:
                    return

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _leases(self, name: str) -> list[int]:
        folder, _, file = name.rpartition("/")
        matches = (re.fullmatch(rf"{re.escape(file)}\.(\d+)", n) for n in self.names(folder))
        return [int(match[1]) for match in matches if match]

    def _wait_for_end(self, lease: str) -> None:
        """Return at once if the lease's holder has ended, or when it seems to be dead."""
        first = self.read(lease)
        deadline = time.monotonic() + _STALE_S
        while (content := self.read(lease)) not in (None, _ENDED):
            holder = decode_json(content, LockRecord, f"{self.location}/{lease}", ShardError)
            is_here = holder.machine == LockRecord.own().machine
            if content != first or (is_here and holder.runs()):
                raise self._in_use(holder)
            if is_here or time.monotonic() > deadline:
                logger.warning("%s is taken over: %s is dead", lease, holder)
                return
            time.sleep(_RENEW_S / 10)

    def _in_use(self, holder: LockRecord | None) -> ShardError:
        who = holder or "another process"
        return ShardError(f"{who} is sharding into {self.location}; wait for it")

    def manifest(self) -> Manifest:
        """Download the manifest and read it."""
        with tempfile.TemporaryDirectory(prefix="strata-") as folder:
            for name in (SAMPLES_NAME, MANIFEST_NAME):
                content = self.read(name)
                if content is not None:
                    (Path(folder) / name).write_bytes(content)
            return read_manifest(Path(folder))


def open_place(location: str | Path) -> Place:
    """The place of a set, by its folder or URL.

    Raises:
        ConfigError: fsspec does not know the URL's protocol, or needs a package for it.
    """
    url = as_url(location)
    return Place(Path(location)) if url is None else RemotePlace(url)
