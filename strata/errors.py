"""The exception family: what a user can cause, each with what, where and what to do."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

__all__ = [
    "EXIT_USER_ERROR",
    "CheckpointError",
    "ConfigError",
    "FaultKind",
    "ShardError",
    "StrataError",
    "VideoFault",
    "WorldError",
    "exit_with_one_line",
]

EXIT_USER_ERROR = 2
"""Exit status of every command when the input, not the program, is at fault."""


class StrataError(Exception):
    """Base of all errors that a user can cause and mend; shown as one line, without traceback."""


class ConfigError(StrataError):
    """A setting is unknown, out of range, or contradicts another."""


class ShardError(StrataError):
    """A shard folder is missing, incomplete, or disagrees with its manifest."""


class CheckpointError(StrataError):
    """A checkpoint is missing, incomplete, or belongs to another architecture or recipe."""


class WorldError(StrataError):
    """The requested group of processes did not form, or its members disagree."""


class FaultKind(StrEnum):
    """Why a source video was rejected. The value is what the manifest stores."""

    UNREADABLE = "unreadable"
    """Missing, empty, not a video container, or no permission."""
    NO_VIDEO_STREAM = "no-video-stream"
    """The container opens but carries no picture stream."""
    TRUNCATED = "truncated"
    """Decoding ended in an error before the end of the stream."""
    TOO_SHORT = "too-short"
    """Fewer frames than the normal form asks for."""
    WRONG_COUNT = "wrong-count"
    """The written sample does not decode back to the frames put in."""
    UNLIKE = "unlike"
    """The written sample decodes, but its pictures differ too much from the source."""
    TIMEOUT = "timeout"
    """The codec did not finish in the time allowed."""
    CRASH = "crash"
    """The codec ended its process."""
    DUPLICATE = "duplicate"
    """The same video, byte for byte, was listed before under another name."""
    CONFLICT = "conflict"
    """Lists, folders and files disagree about which video this is, or of which class."""


class VideoFault(StrataError):
    """One source video cannot be used. The run goes on; the manifest names it.

    Args:
        kind: The typed reason.
        source: The file, as the user would name it.
        detail: What exactly was seen.
    """

    def __init__(self, kind: FaultKind, source: str, detail: str) -> None:
        super().__init__(f"{source}: {kind.value}: {detail}")
        self.kind = kind
        self.source = source
        self.detail = detail

    def __reduce__(self) -> tuple[type["VideoFault"], tuple[FaultKind, str, str]]:
        """Pickle by the constructor's arguments, so that a worker process can raise it."""
        return type(self), (self.kind, self.source, self.detail)


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Turn a `StrataError` into one line on stderr and exit status 2, at a process's boundary.

    Every other exception keeps its traceback: it is a fault of the program. In a distributed run
    the line bears the rank, since several ranks may report.
    """
    try:
        yield
    except StrataError as error:
        rank = os.environ.get("RANK")
        prefix = "error" if rank is None else f"error (rank {rank})"
        print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
