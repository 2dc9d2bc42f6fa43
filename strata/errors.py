"""The exception family: what a user can cause, each with what, where and what to do."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import NoReturn

from strata import launch

__all__ = [
    "EXIT_LOST_PEER",
    "EXIT_NOT_FINITE",
    "EXIT_NOT_SAVED",
    "EXIT_PREEMPTED",
    "EXIT_USER_ERROR",
    "CheckpointError",
    "ConfigError",
    "FaultKind",
    "LostPeerError",
    "NotFiniteError",
    "NotSavedError",
    "ShardError",
    "StallError",
    "StrataError",
    "VideoFault",
    "WorldError",
    "exit_with_one_line",
    "run_rank",
]

EXIT_USER_ERROR = 2
"""Exit status of every command when the input, not the program, is at fault."""
EXIT_NOT_FINITE = 3
"""Losses or gradients are not finite beyond the budget: a person must look."""
EXIT_NOT_SAVED = 4
"""A checkpoint could not be written; the last good one stays."""
EXIT_LOST_PEER = 5
"""A rank was lost or nothing moved in time: start again with --resume auto."""
EXIT_PREEMPTED = 75
"""Stopped by SIGTERM or SIGUSR1 with a checkpoint: start again with --resume auto.

EX_TEMPFAIL of sysexits.h: a failure that is none if tried again.
"""


class StrataError(Exception):
    """Base of all errors that a user can cause and mend; shown as one line, without traceback."""

    exit_code = EXIT_USER_ERROR
    """The process's exit status where this error ends it."""


class ConfigError(StrataError):
    """A setting is unknown, out of range, or contradicts another."""


class ShardError(StrataError):
    """A shard folder is missing, incomplete, or disagrees with its manifest."""


class StallError(ShardError):
    """A batch did not come in time: the storage or a decoder hangs."""

    exit_code = EXIT_LOST_PEER


class CheckpointError(StrataError):
    """A checkpoint is missing, incomplete, or belongs to another architecture or recipe."""


class WorldError(StrataError):
    """The requested group of processes did not form, or its members disagree."""


class LostPeerError(WorldError):
    """A rank of the formed group died, or nothing moved for too long."""

    exit_code = EXIT_LOST_PEER


class NotFiniteError(StrataError):
    """Losses or gradients are NaN or infinite in more steps than may be skipped."""

    exit_code = EXIT_NOT_FINITE


class NotSavedError(CheckpointError):
    """A checkpoint could not be written."""

    exit_code = EXIT_NOT_SAVED


class FaultKind(StrEnum):
    """Why a source video was rejected. The value is what the manifest stores."""

    UNREADABLE = "unreadable"
    """Missing, empty, not a video container, or no permission."""
    NO_VIDEO_STREAM = "no-video-stream"
    """The container opens but carries no picture stream."""
    TRUNCATED = "truncated"
    """The end of the file is missing."""
    DAMAGED = "damaged"
    """Packets in the middle of the file do not decode."""
    UNSUPPORTED = "unsupported"
    """It decodes, or could, but its colours or sizes are outside of what is taken."""
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
    """Turn a `StrataError` into one line on stderr and its exit status, at a process's boundary.

    Every other exception keeps its traceback: it is a fault of the program. In a distributed run
    the line bears the rank, since several ranks may report. Characters of names that the terminal's
    encoding does not have are written with backslashes, so that printing them is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except StrataError as error:
        rank = launch.rank_text()
        prefix = "error" if rank is None else f"error (rank {rank})"
        print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def run_rank(main: Callable[[], int]) -> NoReturn:
    """Run one process of a group to its end, and let no fault of a dead group keep it alive.

    After a fault the interpreter is left without its usual farewell, which waits for threads: those
    of a group that has lost a rank may never end, and the launcher would wait with them.

    Args:
        main: Returns the exit status.
    """
    try:
        with exit_with_one_line():
            status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if status == 0:
            raise
    except BaseException:
        traceback.print_exc()
        status = 1
    if status == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
