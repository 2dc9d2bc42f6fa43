"""A watchdog that ends a process without progress and prints the stacks of all threads."""

import faulthandler
import os
import sys
import threading
import time

from strata import launch
from strata.errors import EXIT_LOST_PEER

__all__ = ["Watchdog"]


class Watchdog:
    """Context manager that ends the process if `beat` is not called for `limit_s` seconds.

    It does not raise, because a thread that waits in a collective cannot be interrupted. The
    process exits with `EXIT_LOST_PEER` after printing the stacks of all threads and one line that
    says what it was doing.

    Args:
        limit_s: Seconds between beats.
        advice: What the user should do; the end of the line.
    """

    def __init__(self, limit_s: float, advice: str) -> None:
        self._limit_s, self._advice = limit_s, advice
        self._what, self._since = "starting", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="strata-watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """Report progress; `what` is the work that starts now."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            if time.monotonic() - self._since > self._limit_s:
                self._end()

    def _end(self) -> None:
        rank = launch.rank_text() or "0"
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(
            f"error (rank {rank}): no progress for {self._limit_s:g} s while {self._what} (the "
            f"stacks of all threads are above); {self._advice}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_LOST_PEER)

    def __enter__(self) -> "Watchdog":
        self.beat(self._what)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
