"""Storage of a set's shards and parts; a file appears only when it is complete."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from strata.errors import ShardError
from strata.files import open_atomic
from strata.format.manifest import read_manifest
from strata.format.schema import MANIFEST_NAME, SAMPLES_NAME, Manifest
from strata.transfer import Store, as_url

__all__ = ["Place", "open_place"]


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

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock, so that one process of a machine does this work.

        Raises:
            ShardError: Another process has it.
        """
        with (self._folder / name).open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ShardError(
                    f"another process is sharding into {self.location}; wait for it"
                ) from error
            yield

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            ShardError: It is missing or damaged.
        """
        return read_manifest(self._folder)


class RemotePlace(Place):
    """A folder of an object store. A file is uploaded completely from an unnamed local one.

    There is no lock: two runs of one command write the same bytes.

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
        """Hold no lock."""
        yield

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
