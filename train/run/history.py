"""The history of a run's checkpoints: which to resume and which to remove.

`checkpoints/history.json` lists what the run wrote, in the order of writing, each with the
checkpoint that it continued. So if a user moves `latest` back to an older checkpoint, those written
after that one are known to be an abandoned branch: they are never resumed automatically and do not
count among the newest. Folders that the run did not write are never touched.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from shutil import rmtree
from typing import Annotated

import msgspec

from strata.errors import CheckpointError
from strata.files import write_atomic
from strata.logs import get_logger, warn_once
from strata.untrusted import checked_name, decode_json

__all__ = ["COMPLETE", "History", "find_checkpoint", "name_of", "require_checkpoint"]

logger = get_logger(__name__)

COMPLETE = "complete.json"
"""The completeness marker: the file that is written last into a checkpoint."""
FOLDER = "checkpoints"
_LATEST = "latest"
_HISTORY = "history.json"
_PATTERN = r"\Astep-[0-9]{9,18}\Z"
_MAX_BYTES = 1 << 24

_Name = Annotated[str, msgspec.Meta(pattern=_PATTERN)]


def name_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:09d}"


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    continues: _Name | None


class History:
    """The list of a run's checkpoints and the pointer `latest`.

    A run of an older version has no list: its checkpoints are assumed to continue each other in
    the order of their steps.

    Args:
        root: The folder of the checkpoints; it may be absent.

    Raises:
        CheckpointError: The list or the pointer is damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / _HISTORY
        self._recorded = path.is_file()
        self._continues: dict[str, str | None] = {}
        if self._recorded:
            content = _read(path, _MAX_BYTES)
            entries = decode_json(content, list[_Entry], path, CheckpointError)
            self._continues = {entry.name: entry.continues for entry in entries}
        else:
            names = sorted(p.name for p in root.glob("step-*") if re.match(_PATTERN, p.name))
            complete = [name for name in names if self.is_complete(name)]
            self._continues = dict(zip(complete, [None, *complete], strict=False))
        self.latest = self._read_latest()

    def _read_latest(self) -> str | None:
        path = self.root / _LATEST
        if not path.is_file():
            return None
        text = _read(path, 4096).decode("utf-8", "replace").strip()
        return checked_name(text, "checkpoint", path, CheckpointError)

    def is_complete(self, name: str) -> bool:
        """Whether a checkpoint has its completeness marker."""
        return (self.root / name / COMPLETE).is_file()

    def lineage(self, name: str) -> list[str]:
        """A checkpoint and its ancestors, the newest first."""
        found = []
        following: str | None = name
        while following is not None and following not in found:
            found.append(following)
            following = self._continues.get(following)
        return found

    def find(self) -> str | None:
        """The checkpoint to resume: `latest`, or its newest complete ancestor.

        Raises:
            CheckpointError: `latest` names an unknown checkpoint, or none is complete.
        """
        if self.latest is None:
            # The run was killed between its first checkpoint and writing the pointer.
            return next(filter(self.is_complete, reversed(self._continues)), None)
        if self.is_complete(self.latest):
            return self.latest
        if self._recorded and self.latest not in self._continues:
            raise CheckpointError(
                f"{self.root / _LATEST} names {self.latest}, which the run did not write; write "
                "the name of an existing folder"
            )
        lineage = self.lineage(self.latest) if self._recorded else list(reversed(self._continues))
        found = next(filter(self.is_complete, lineage), None)
        if found is None:
            raise CheckpointError(
                f"{self.root / _LATEST} names {self.latest}, and neither it nor an older one is "
                f"complete; remove {self.root} to start from the beginning"
            )
        warn_once(logger, f"checkpoint {self.root / self.latest} is not complete; using {found}")
        return found

    def add(self, name: str) -> None:
        """Record a checkpoint before its folder is renamed; its parent is what `find` returns.

        Raises:
            OSError: The list cannot be written.
        """
        before = self.find()
        if before == name:
            before = self._continues.get(name)
        self._continues.pop(name, None)
        self._continues[name] = before
        self._write()

    def point_to(self, name: str) -> None:
        """Point `latest` to a checkpoint.

        Raises:
            OSError: It cannot be written.
        """
        write_atomic(self.root / _LATEST, f"{name}\n")
        self.latest = name

    def drop(self, keep: int, keep_every: int) -> None:
        """Remove old checkpoints; the one that `latest` names is always kept.

        Args:
            keep: How many to keep of `latest` and its ancestors, the newest.
            keep_every: Checkpoints whose step is a multiple are kept on any branch; 0 for none.

        Raises:
            OSError: A folder cannot be removed.
        """
        if self.latest is None:
            raise AssertionError("the pointer is moved before anything is removed")
        kept = {self.latest, *self.lineage(self.latest)[:keep]}
        if keep_every:
            kept |= {n for n in self._continues if int(n.removeprefix("step-")) % keep_every == 0}
        gone = [name for name in self._continues if name not in kept]
        for name in gone:
            if (self.root / name).exists():
                # If the run is killed while removing files, the folder must not look complete.
                (self.root / name / COMPLETE).unlink(missing_ok=True)
                rmtree(self.root / name)
        if gone:
            self._forget(gone)

    def _forget(self, gone: Iterable[str]) -> None:
        gone = set(gone)
        left = {}
        for name in self._continues:
            if name not in gone:
                left[name] = next((n for n in self.lineage(name)[1:] if n not in gone), None)
        self._continues = left
        self._write()

    def _write(self) -> None:
        entries = [_Entry(name, before) for name, before in self._continues.items()]
        self._recorded = True
        write_atomic(self.root / _HISTORY, msgspec.json.format(msgspec.json.encode(entries)))


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} is not readable: {error}") from error


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint to resume from a run's folder, or the given checkpoint itself.

    Args:
        path: The folder of a run or of a checkpoint.

    Returns:
        A folder with a completeness marker; None where the run has none yet.

    Raises:
        CheckpointError: The run's pointer or list of checkpoints is damaged.
    """
    if (path / COMPLETE).is_file():
        return path
    root = path / FOLDER
    found = History(root).find()
    return None if found is None else root / found


def require_checkpoint(path: Path) -> Path:
    """As `find_checkpoint`, for what cannot begin without one.

    Raises:
        CheckpointError: There is none.
    """
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no complete checkpoint; pretrain with train/main.py first, or correct "
            "the path"
        )
    return found
