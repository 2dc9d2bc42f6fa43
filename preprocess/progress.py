"""What the driver tells as it goes: a moving bar for a person, JSON lines for a cluster's log."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

from tqdm import tqdm

from strata.telemetry.metrics import Metrics

__all__ = ["JsonLog", "LogKind", "Progress", "open_progress"]

LogKind = Literal["bar", "json", "none"]


class Progress:
    """Says nothing; what the others have in common."""

    def done(self, num_frames: int) -> None:
        """One more source is done: written with so many frames, or rejected with 0."""

    def rejected(self, source: str, reason: str, detail: str) -> None:
        """A source was rejected."""

    def tick(self) -> None:
        """Time passes, whether a source is done or not."""

    def close(self) -> None:
        """The last word."""


class _Bar(Progress):
    def __init__(self, name: str, total: int, initial: int) -> None:
        self._num_rejected = 0
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=name,
            unit="video",
            # A file gets a line now and then instead of a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )

    def done(self, num_frames: int) -> None:
        self._bar.update()

    def rejected(self, source: str, reason: str, detail: str) -> None:
        self._num_rejected += 1
        self._bar.set_postfix({"rejected": self._num_rejected})

    def tick(self) -> None:
        if sys.stderr.isatty():
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class JsonLog(Progress):
    """One JSON object a line: how far it is now and then, and every rejected video.

    Args:
        name: The set.
        total: Sources that this process has to do, those done before included.
        initial: Sources done before.
        every_s: Seconds between lines about the progress.
        file: Where to write; stderr by default.
    """

    def __init__(
        self,
        name: str,
        total: int,
        initial: int,
        *,
        every_s: float,
        file: IO[str] | None = None,
    ) -> None:
        self._name, self._total, self._done, self._initial = name, total, initial, initial
        self._every_s, self._file = every_s, file
        self._num_rejected = 0
        self._start_s = self._told_s = time.monotonic()
        self._tell_progress("start")

    def done(self, num_frames: int) -> None:
        """Count one, and tell if it is time."""
        self._done += 1
        self.tick()

    def tick(self) -> None:
        """Tell if it is time: a long video must not look like a run that hangs."""
        if time.monotonic() - self._told_s >= self._every_s:
            self._tell_progress("progress")

    def rejected(self, source: str, reason: str, detail: str) -> None:
        """Tell it at once."""
        self._num_rejected += 1
        self._tell(event="rejected", source=source, reason=reason, detail=detail)

    def close(self) -> None:
        """Tell where it ended."""
        self._tell_progress("end")

    def _tell_progress(self, event: str) -> None:
        self._told_s = time.monotonic()
        elapsed_s = self._told_s - self._start_s
        fresh = self._done - self._initial
        rate = fresh / elapsed_s if fresh and elapsed_s else 0.0
        left_s = round((self._total - self._done) / rate, 1) if rate else None
        self._tell(
            event=event,
            done=self._done,
            total=self._total,
            rejected=self._num_rejected,
            elapsed_s=round(elapsed_s, 3),
            videos_per_s=round(rate, 3),
            left_s=left_s,
        )

    def _tell(self, **fields: Any) -> None:
        line = {"time_s": round(time.time(), 3), "set": self._name, **fields}
        print(json.dumps(line), file=self._file or sys.stderr, flush=True)


class _Exported(Progress):
    """Tells Prometheus, and another."""

    def __init__(self, other: Progress, metrics: Metrics) -> None:
        self._other, self._metrics = other, metrics

    def done(self, num_frames: int) -> None:
        if num_frames:
            self._metrics.add("strata_videos_sharded_total", 1, outcome="written")
            self._metrics.add("strata_frames_sharded_total", num_frames)
        self._other.done(num_frames)

    def rejected(self, source: str, reason: str, detail: str) -> None:
        self._metrics.add("strata_videos_sharded_total", 1, outcome="rejected")
        self._other.rejected(source, reason, detail)

    def tick(self) -> None:
        self._other.tick()

    def close(self) -> None:
        self._other.close()


@contextmanager
def open_progress(
    kind: LogKind,
    name: str,
    total: int,
    initial: int,
    metrics: Metrics | None = None,
    every_s: float = 10.0,
) -> Iterator[Progress]:
    """The progress of one set, closed at the end however it comes; JSON every so many seconds."""
    match kind:
        case "bar":
            progress: Progress = _Bar(name, total, initial)
        case "json":
            progress = JsonLog(name, total, initial, every_s=every_s)
        case "none":
            progress = Progress()
    if metrics is not None:
        progress = _Exported(progress, metrics)
    try:
        yield progress
    finally:
        progress.close()
