"""Graceful shutdown: after SIGTERM or SIGUSR1 the run saves and stops at the next step."""

import os
import signal
import sys
from types import FrameType

from strata import launch

__all__ = ["StopSignals"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context manager that records SIGTERM and SIGUSR1, which clusters send before a preemption.

    Outside of the context they end the process at once, the default: there is nothing to save.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            # Not by a logger or print: a signal may come while either holds its lock.
            rank = launch.rank_text() or "0"
            text = f"rank {rank}: {self.received.name}: saving at the end of this step\n"
            os.write(sys.stderr.fileno(), text.encode())

    def __enter__(self) -> "StopSignals":
        for each in _SIGNALS:
            self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.received is None:
            for each, handler in self._before.items():
                signal.signal(each, handler)  # pyright: ignore[reportArgumentType]
