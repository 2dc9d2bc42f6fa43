"""Where a set's shards and parts are kept; a file appears only when it is complete."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from strata.errors import ShardError
from strata.files import open_atomic

__all__ = ["LocalPlace", "open_place"]


class LocalPlace:
    """A folder on a local or network file system.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.location = str(folder)
        """The folder, for `open_place` in another process."""

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

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None if it is missing."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file.

        Raises:
            FileNotFoundError: It is missing.
        """
        with (self._folder / name).open("rb") as file:
            yield file

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
        """Remove files, also those that are gone already."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with its files."""
        shutil.rmtree(self._folder / folder, ignore_errors=True)

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


def open_place(location: str) -> LocalPlace:
    """The place of a set, by its folder."""
    return LocalPlace(Path(location))
