"""Errors that a user can cause and fix; each message says what, where and what to do."""

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
    "StoppedError",
    "StrataError",
    "VideoFault",
    "WorldError",
    "exit_with_one_line",
    "run_rank",
]

EXIT_USER_ERROR = 2
"""Exit status of every command when the input, not the program, is at fault."""
EXIT_NOT_FINITE = 3
"""Exit status when more steps are not finite than allowed; needs a person's decision."""
EXIT_NOT_SAVED = 4
"""Exit status when a checkpoint could not be written; the last complete one is kept."""
EXIT_LOST_PEER = 5
"""Exit status when a rank was lost or progress stopped: start again with --resume auto."""
EXIT_PREEMPTED = 75
"""Exit status after a stop by SIGTERM or SIGUSR1 with a checkpoint: use --resume auto.

EX_TEMPFAIL of sysexits.h: a temporary failure; try again.
"""


class StrataError(Exception):
    """Base class of errors that a user can cause and fix; shown as one line, no traceback."""

    exit_code = EXIT_USER_ERROR
    """Exit status of a process that this error ends."""


class ConfigError(StrataError):
    """A setting is unknown, out of range, or contradicts another."""


class ShardError(StrataError):
    """A shard folder is missing, incomplete, or disagrees with its manifest."""


class StallError(ShardError):
    """A batch did not arrive in time: the storage or a decoder hangs."""

    exit_code = EXIT_LOST_PEER


class CheckpointError(StrataError):
    """A checkpoint is missing, incomplete, or belongs to another architecture or recipe."""


class WorldError(StrataError):
    """The requested process group did not form, or its ranks disagree."""


class LostPeerError(WorldError):
    """A rank of the process group died or made no progress for too long."""

    exit_code = EXIT_LOST_PEER


class NotFiniteError(StrataError):
    """Losses or gradients are NaN or infinite in more steps than may be skipped."""

    exit_code = EXIT_NOT_FINITE


class NotSavedError(CheckpointError):
    """A checkpoint could not be written."""

    exit_code = EXIT_NOT_SAVED


class StoppedError(StrataError):
    """A signal stopped the work; a checkpoint has its position."""

    exit_code = EXIT_PREEMPTED


class FaultKind(StrEnum):
    """Why a source video was rejected. The value is what the manifest stores."""

    UNREADABLE = "unreadable"
    """Missing, empty, not a video container, or no permission."""
    NO_VIDEO_STREAM = "no-video-stream"
    """The container opens but has no video stream."""
    TRUNCATED = "truncated"
    """The end of the file is missing."""
    DAMAGED = "damaged"
    """Packets in the middle of the file do not decode."""
    UNSUPPORTED = "unsupported"
    """Its colours or frame sizes are not supported."""
    TOO_SHORT = "too-short"
    """Fewer frames than a sample needs."""
    WRONG_COUNT = "wrong-count"
    """The written sample does not decode to the frames that were encoded."""
    UNLIKE = "unlike"
    """The written sample decodes, but its frames differ too much from the source."""
    TIMEOUT = "timeout"
    """Decoding or encoding exceeded its time limit."""
    CRASH = "crash"
    """Decoding or encoding crashed its process."""
    MEMORY = "memory"
    """Decoding or encoding needed more memory than a worker may use."""
    DUPLICATE = "duplicate"
    """A video with the same bytes was already listed under another name."""
    CONFLICT = "conflict"
    """Lists, folders and files disagree about the identity or class of this video."""


class VideoFault(StrataError):
    """One source video cannot be used; the run continues and the manifest names it.

    Args:
        kind: The reason.
        source: The file's name.
        detail: What exactly is wrong.
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
    """Turn a `StrataError` into one line on stderr and its exit status; used around `main`.

    Every other exception keeps its traceback: it is a bug. In a distributed run the line has the
    rank, because several ranks may report. Characters that the terminal's encoding does not have
    are escaped with backslashes, so that printing a name cannot fail.
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
    """Run `main` in one process of a group and exit; after an error, exit at once.

    After an error the process ends without the interpreter's usual shutdown, which waits for
    threads: those of a group that has lost a rank may never end, and the launcher would hang.

    Args:
        main: A function that returns the exit status.
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
