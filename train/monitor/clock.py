"""A clock for training steps: time of each part of an interval, and the peak of the device.

The time of a part is measured on the GPU (CUDA events, read once per interval) or, without a GPU,
on the host. Measuring does not make the host wait for the device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from strata.train.monitor.bottleneck import RankTimes
from strata.train.monitor.progress import Progress

__all__ = ["PEAK_FLOPS", "Clock", "peak_flops"]

PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
}
"""Dense bf16 operations per second, from NVIDIA's data sheets; the first match counts."""

_HOST_PARTS = ("inside", "outside", "optimizer", "checkpoint", "wait", "step")
"""Parts timed on the host; `inside` and `outside` are collectives in and between steps."""
_Span = tuple[torch.cuda.Event, torch.cuda.Event]


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 operations per second of a GPU by its name; None if it is not in the table."""
    words = f" {device_name} ".replace("-", " ")
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


class Clock:
    """Measures steps: `data_arrived`, the step, `step_done`, and so on; `interval` reads it.

    Args:
        device: The device on which steps are computed.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._start = self._mark = self._arrived = time.perf_counter()
        self._host_s = dict.fromkeys(_HOST_PARTS, 0.0)
        self._in_step = False
        self._depth = 0
        self._num_steps = 0
        self._steps: list[_Span] = []
        self._waits_s: list[float] = []
        self._communication: list[_Span] = []
        self._optimizer: list[_Span] = []
        self._last_end: torch.cuda.Event | None = None
        self.last_step_s = 0.0
        self.last_wait_s = 0.0
        self.progress = Progress()
        """What this rank does now; scrapes read it."""

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def data_arrived(self) -> None:
        """Mark the arrival of the batch; the time before it was waiting."""
        self._arrived = time.perf_counter()
        self.progress.enter("compute")
        self.last_wait_s = self._arrived - self._mark
        self._host_s["wait"] += self.last_wait_s
        self._in_step = True
        if self._on_gpu:
            self._waits_s.append(self.last_wait_s)
            # step_done records the end.
            event = self._event()
            self._steps.append((event, event))

    def step_done(self) -> None:
        """Mark the end of issuing a step."""
        now = time.perf_counter()
        self.last_step_s = self.last_wait_s + now - self._arrived
        self._host_s["step"] += now - self._arrived
        self._mark = now
        self._num_steps += 1
        self._in_step = False
        self.progress.step_done()
        if self._on_gpu:
            self._steps[-1] = (self._steps[-1][0], self._event())

    def waiting(self) -> None:
        """Mark the start of waiting for a batch; the time since the step was the host's."""
        self._mark = time.perf_counter()
        self.progress.enter("data")

    @contextmanager
    def communication(self) -> Iterator[None]:
        """Time a collective; nested collectives count once."""
        self._depth += 1
        start = time.perf_counter()
        # Collectives between steps are only on the host, not on the device.
        on_device = self._on_gpu and self._in_step
        begun = self._event() if on_device and self._depth == 1 else None
        try:
            with self.progress.doing("communication"):
                yield
        finally:
            self._depth -= 1
            if begun is not None:
                self._communication.append((begun, self._event()))
            elif self._depth == 0:
                where = "inside" if self._in_step else "outside"
                self._host_s[where] += time.perf_counter() - start

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        """Time the update of the weights."""
        start = time.perf_counter()
        begun = self._event() if self._on_gpu else None
        try:
            yield
        finally:
            if begun is not None:
                self._optimizer.append((begun, self._event()))
            else:
                self._host_s["optimizer"] += time.perf_counter() - start

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Time the part of saving a checkpoint for which training waits."""
        start = time.perf_counter()
        try:
            with self.progress.doing("checkpoint"):
                yield
        finally:
            self._host_s["checkpoint"] += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude work that is not training from the interval, with its collectives.

        It first waits for the device, whose work so far belongs to the interval.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        before = dict(self._host_s)
        try:
            with self.progress.doing("probe"):
                yield
        finally:
            self._host_s = before
            self._start += time.perf_counter() - start

    def interval(self) -> RankTimes:
        """Return the times since the last call, without the loader's, and start the next interval.

        Call it after the host waited for the device: all events must be complete.
        """
        now = time.perf_counter()
        host = self._host_s
        wait_s, step_s, inside_s = host["wait"], host["step"], host["inside"]
        outside_s, optimizer_s = host["outside"], host["optimizer"]
        if self._on_gpu and self._steps:
            with self.progress.doing("compute"):
                wait_s, step_s, inside_s, idle_s = self._read_events()
            optimizer_s = sum(begin.elapsed_time(end) for begin, end in self._optimizer) / 1000
            self._optimizer = []
            # The host waits for other ranks while the device still has work.
            outside_s = min(outside_s, idle_s)
        parts = {
            "data_s": wait_s,
            "compute_s": max(step_s - inside_s, 0.0),
            "communication_s": inside_s + outside_s,
            "checkpoint_s": host["checkpoint"],
        }
        host_s = max(now - self._start - sum(parts.values()), 0.0)
        times = RankTimes(
            **parts, host_s=host_s, optimizer_s=optimizer_s, num_steps=self._num_steps
        )
        self._start, self._num_steps = now, 0
        self._host_s = dict.fromkeys(host, 0.0)
        return times

    def _read_events(self) -> tuple[float, float, float, float]:
        """Seconds measured by the device's events.

        Returns:
            Waiting for data, steps, communication in steps, and idle for other reasons.
        """
        steps, waits = self._steps, self._waits_s
        steps[-1][1].synchronize()
        wait_s = idle_s = 0.0
        before = self._last_end
        for (begin, end), waited in zip(steps, waits, strict=True):
            # The device may have had work while the host waited; count only if both were idle.
            idle = waited if before is None else before.elapsed_time(begin) / 1000
            wait_s += min(idle, waited)
            idle_s += max(idle - waited, 0.0)
            before = end
        step_s = sum(begin.elapsed_time(end) for begin, end in steps) / 1000
        communication_s = sum(b.elapsed_time(e) for b, e in self._communication) / 1000
        self._last_end = before
        self._steps, self._waits_s, self._communication = [], [], []
        return wait_s, step_s, communication_s, idle_s
