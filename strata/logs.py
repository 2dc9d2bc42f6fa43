"""Lines for people and JSON lines for programs; neither ends the work where a disk is full.

One logger, rank in every record, and warnings that are said once.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import launch

__all__ = [
    "JsonLines",
    "SteadyStream",
    "get_logger",
    "read_json_lines",
    "set_up_logging",
    "warn_once",
]

_said: set[str] = set()


class SteadyStream:
    """Standard error for lines that the work can do without: what cannot be written is dropped.

    It may be a file on a disk that is full. Whatever name of `sys.stderr` is asked for is its own.
    """

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        try:
            return sys.stderr.write(text)
        except OSError:
            return 0

    def flush(self) -> None:
        """Flush, if that is possible."""
        try:
            sys.stderr.flush()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class _RankFilter(logging.Filter):
    """Adds the rank, and lets only rank 0 speak below the level of a warning."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = int(launch.rank_text() or "0")
        record.rank = rank
        return rank == 0 or record.levelno >= logging.WARNING


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the records of the `strata` loggers to stderr, each with time, rank and level."""
    handler: logging.StreamHandler[Any] = logging.StreamHandler(SteadyStream())
    handler.setFormatter(
        logging.Formatter("%(asctime)s rank %(rank)d %(levelname)s %(message)s", "%H:%M:%S")
    )
    handler.addFilter(_RankFilter())
    logger = logging.getLogger("strata")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is the module's `__name__`."""
    return logging.getLogger(name if name.startswith("strata") else f"strata.{name}")


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log `message` as a warning the first time this process says it."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


class JsonLines:
    """A file to which records are appended, one a line; a full disk costs records, not the work.

    A record that cannot be written is counted, which the first time is said; the next one is
    tried again. Lines that a full disk cut off are ended, so that every later line can be read.

    Args:
        path: The file; made if it does not exist.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.num_lost = 0
        """Records that could not be written."""
        self._num_told = 0
        size = os.fstat(self._handle).st_size
        # A kill may have cut off the last line of the run before.
        self._cut = size > 0 and os.pread(self._handle, 1, size - 1) != b"\n"

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, if that is possible."""
        line = (b"\n" if self._cut else b"") + json.dumps(record).encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(self._handle, line[written:])
        except OSError as error:
            self._cut = self._cut or written > 0
            self.num_lost += 1
            if self.num_lost - self._num_told == 1:
                get_logger(__name__).warning(
                    "%s cannot be written: %s. The work continues; records are lost until it can",
                    self._path,
                    error,
                )
            return
        self._cut = False
        if self.num_lost > self._num_told:
            get_logger(__name__).warning(
                "%s can be written again; %d records were lost",
                self._path,
                self.num_lost - self._num_told,
            )
            self._num_told = self.num_lost

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file of JSON lines, and how many lines a kill or a full disk cut off.

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
