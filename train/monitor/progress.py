"""The current activity of a rank, its duration, and the time since its last step.

The training thread writes it and scrapes read it, so that work that has not ended yet counts too: a
rank that waits for a read that never returns would otherwise look as it did before.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

__all__ = ["ACTIVITIES", "Progress"]

ACTIVITIES = ("start", "data", "compute", "communication", "host", "checkpoint", "probe", "end")
"""What the training thread can do; `start` is before the first batch, `end` after the last."""
_UNTIMED = ("probe", "end")
"""Activities that are no part of steps and may take long; the watchdog bounds them."""
_STEPS = 64
"""Steps of which the median is taken."""
_MANY = 5.0
"""Median steps without a step from which a rank is stalled."""
_FIRST_S = 600.0
"""Seconds that the first step may take, in which kernels are chosen and compiled."""


class Progress:
    """The activity of the training thread, with the seconds spent on each so far.

    Args:
        stalled_s: Shortest time without a step that counts as a stall, in seconds.
    """

    def __init__(self, stalled_s: float = 60.0) -> None:
        self.stalled_s = stalled_s
        self.last_step_time: float | None = None
        """Unix time of the last step's end, in seconds."""
        self._lock = threading.Lock()
        self._activity, self._since = "start", time.perf_counter()
        self._spent_s: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)
        self._moved = self._since
        self._last: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_STEPS)

    @property
    def activity(self) -> str:
        """The current activity, one of `ACTIVITIES`."""
        return self._activity

    def enter(self, activity: str) -> None:
        """Begin an activity; the time until now was spent on the one before."""
        now = time.perf_counter()
        with self._lock:
            self._spent_s[self._activity] += now - self._since
            self._activity, self._since = activity, now
            if activity in _UNTIMED:
                self._last = None

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """An activity within another one, which it resumes; parts of a probe are the probe's."""
        before = self._activity
        if before in _UNTIMED:
            yield
            return
        self.enter(activity)
        try:
            yield
        finally:
            self.enter(before)
            if activity in _UNTIMED:
                self._moved = self._since

    def step_done(self) -> None:
        """A step has ended; what follows is the host's."""
        self.enter("host")
        now = self._moved = self._since
        if self._last is not None:
            self._steps_s.append(now - self._last)
        self._last, self.last_step_time = now, time.time()

    def spent_s(self) -> dict[str, float]:
        """Seconds spent on each activity until now; their sum is the time since the start."""
        with self._lock:
            spent = dict(self._spent_s)
            spent[self._activity] += time.perf_counter() - self._since
        return spent

    @property
    def limit_s(self) -> float:
        """Seconds without a step from which the rank is stalled."""
        steps_s = list(self._steps_s)
        if not steps_s:
            return max(self.stalled_s, _FIRST_S)
        return max(self.stalled_s, _MANY * median(steps_s))

    @property
    def stalled(self) -> bool:
        """Whether the rank has gone without a step for too long."""
        if self._activity in _UNTIMED:
            return False
        return time.perf_counter() - self._moved > self.limit_s
