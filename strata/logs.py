"""Structured lines: one logger, rank in every record, and warnings that are said once."""

import logging
import os
import sys

__all__ = ["get_logger", "set_up_logging", "warn_once"]

_said: set[str] = set()


class _RankFilter(logging.Filter):
    """Adds the rank, and lets only rank 0 speak below the level of a warning."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = int(os.environ.get("RANK", "0"))
        record.rank = rank
        return rank == 0 or record.levelno >= logging.WARNING


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the records of the `strata` loggers to stderr, each with time, rank and level."""
    handler = logging.StreamHandler(sys.stderr)
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
