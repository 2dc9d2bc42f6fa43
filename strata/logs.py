"""Logging to stderr and to files of JSON lines; a full disk loses records but never ends the run.

Every record has the rank, and a repeated warning is logged once.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from strata import launch

__all__ = [
    "JsonLines",
    "SteadyStream",
    "get_logger",
    "progress_bar",
    "read_json_lines",
    "set_up_logging",
    "warn_once",
]

_warned: set[str] = set()


class SteadyStream:
    """A wrapper of standard error that drops what cannot be written instead of raising.

    Standard error may be a file on a full disk. All other attributes are those of `sys.stderr`.
    """

    def write(self, text: str) -> int:
        """Write `text`; an error of the system is ignored."""
        try:
            return sys.stderr.write(text)
        except OSError:
            return 0

    def flush(self) -> None:
        """Flush; an error of the system is ignored."""
        try:
            sys.stderr.flush()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class _RankFilter(logging.Filter):
    """Adds the rank; on ranks other than 0 only warnings and errors pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = int(launch.rank_text() or "0")
        record.rank = rank
        return rank == 0 or record.levelno >= logging.WARNING


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        line = {
            "time_s": round(record.created, 3),
            "event": record.levelname.lower(),
            "message": message,
        }
        return json.dumps(line)


def set_up_logging(*, as_json: bool = False) -> None:
    """Send records of the `strata` loggers to stderr.

    Args:
        as_json: One JSON object a line (`time_s`, `event`: the level, `message`), for a command
            whose stderr is JSON lines; otherwise text with time, rank and level.
    """
    handler: logging.StreamHandler[Any] = logging.StreamHandler(SteadyStream())
    text = logging.Formatter("%(asctime)s rank %(rank)d %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(_JsonFormatter() if as_json else text)
    handler.addFilter(_RankFilter())
    logger = logging.getLogger("strata")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is the module's `__name__`."""
    return logging.getLogger(name if name.startswith("strata") else f"strata.{name}")


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log `message` as a warning, once in a process."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def progress_bar(*args: Any, **settings: Any) -> tqdm:
    """A bar of tqdm on stderr, which may be a full disk; in a file it is a line every 30 s."""
    every_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(*args, mininterval=every_s, file=SteadyStream(), **settings)


class JsonLines:
    """A file to which JSON records are appended, one a line; a full disk does not raise.

    A record that cannot be written is counted, and the first one is logged as a warning. The next
    record is tried again, after a newline that ends a truncated line, so that it can be read.

    Args:
        path: The file; created if it does not exist.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.num_lost = 0
        """Number of records that could not be written."""
        self._num_reported = 0
        size = os.fstat(self._handle).st_size
        # The last line may be truncated if the run before was killed.
        self._cut = size > 0 and os.pread(self._handle, 1, size - 1) != b"\n"

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; an error of the disk is counted and not raised."""
        line = (b"\n" if self._cut else b"") + json.dumps(record).encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(self._handle, line[written:])
        except OSError as error:
            self._cut = self._cut or written > 0
            self.num_lost += 1
            if self.num_lost - self._num_reported == 1:
                get_logger(__name__).warning(
                    "%s cannot be written: %s. The work continues; records are lost until it can",
                    self._path,
                    error,
                )
            return
        self._cut = False
        if self.num_lost > self._num_reported:
            get_logger(__name__).warning(
                "%s can be written again; %d records were lost",
                self._path,
                self.num_lost - self._num_reported,
            )
            self._num_reported = self.num_lost

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON lines: its records and the number of truncated lines.

    Raises:
        OSError: The file cannot be read.
    """
    records, cut = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
        else:
            cut += bool(line)
    return records, cut
