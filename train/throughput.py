"""Clocks of an interval of steps: whole time, wait for data, samples a second."""

import time
from dataclasses import dataclass

__all__ = ["Clock", "IntervalTimes"]


@dataclass(frozen=True, kw_only=True)
class IntervalTimes:
    """What an interval of steps took."""

    wall_s: float
    data_wait_s: float
    num_steps: int

    @property
    def data_wait_ratio(self) -> float:
        """Share of the interval spent waiting for the loader."""
        return self.data_wait_s / self.wall_s if self.wall_s > 0 else 0.0

    def rate(self, items_per_step: int) -> float:
        """Items a second."""
        return items_per_step * self.num_steps / self.wall_s if self.wall_s > 0 else 0.0


class Clock:
    """Measures steps on the host, without waiting for the device."""

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._wait_s = 0.0
        self._num_steps = 0
        self.last_step_s = 0.0
        self.last_wait_s = 0.0

    def data_arrived(self) -> None:
        """The batch is here; what came before was waiting."""
        self.last_wait_s = time.perf_counter() - self._mark
        self._wait_s += self.last_wait_s

    def step_done(self) -> None:
        """The step is issued."""
        now = time.perf_counter()
        self.last_step_s = now - self._mark
        self._mark = now
        self._num_steps += 1

    def interval(self) -> IntervalTimes:
        """Times since the last call; starts the next interval."""
        now = time.perf_counter()
        times = IntervalTimes(
            wall_s=now - self._start, data_wait_s=self._wait_s, num_steps=self._num_steps
        )
        self._start, self._wait_s, self._num_steps = now, 0.0, 0
        return times
