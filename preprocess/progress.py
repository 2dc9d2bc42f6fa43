"""Progress of sharding on stderr: a bar for a terminal, or JSON lines for a cluster's log."""

import json
import sys
import time
from typing import Any, Literal

from strata.format.schema import SourceRow
from strata.logs import progress_bar
from strata.telemetry.metrics import Metrics

__all__ = ["JsonLog", "LogKind", "Progress", "open_progress"]

LogKind = Literal["bar", "json", "none"]


class Progress:
    """Counts finished sources for Prometheus; the classes below also report them.

    Args:
        metrics: The counters, if there are any.
    """

    def __init__(self, metrics: Metrics | None = None) -> None:
        self._metrics = metrics

    def done(self, row: SourceRow) -> None:
        """Count a source that is written or rejected."""
        if self._metrics is not None:
            self._metrics.add("strata_videos_sharded_total", 1, outcome=row.status)
            if row.num_frames:
                self._metrics.add("strata_frames_sharded_total", row.num_frames)

    def tick(self) -> None:
        """Called about once a second, whether a source is done or not."""

    def close(self) -> None:
        """Report the end."""


class _Bar(Progress):
    def __init__(self, name: str, total: int, initial: int, metrics: Metrics | None) -> None:
        super().__init__(metrics)
        self._num_rejected = 0
        self._bar = progress_bar(total=total, initial=initial, desc=name, unit="video")

    def done(self, row: SourceRow) -> None:
        super().done(row)
        if row.status == "rejected":
            self._num_rejected += 1
            self._bar.set_postfix({"rejected": self._num_rejected}, refresh=False)
        self._bar.update()

    def tick(self) -> None:
        if sys.stderr.isatty():
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class JsonLog(Progress):
    """One JSON object a line: the progress at intervals, and every rejected video.

    Args:
        name: The set.
        total: Sources of this process, including those done before.
        initial: Sources done before.
        every_s: Seconds between lines of progress.
        metrics: The counters, if there are any.
    """

    def __init__(
        self, name: str, total: int, initial: int, every_s: float, metrics: Metrics | None = None
    ) -> None:
        super().__init__(metrics)
        self._name, self._total, self._done, self._initial = name, total, initial, initial
        self._every_s, self._num_rejected = every_s, 0
        self._start_s = time.monotonic()
        self._report("start")

    def done(self, row: SourceRow) -> None:
        """Count a source, and report it immediately if it is rejected."""
        super().done(row)
        self._done += 1
        if row.status == "rejected":
            self._num_rejected += 1
            self._write(event="rejected", source=row.source, reason=row.reason, detail=row.detail)
        self.tick()

    def tick(self) -> None:
        """Report if an interval has passed: a long video must not look like a hung run."""
        if time.monotonic() - self._reported_s >= self._every_s:
            self._report("progress")

    def close(self) -> None:
        """Report the final counts."""
        self._report("end")

    def _report(self, event: str) -> None:
        self._reported_s = time.monotonic()
        elapsed_s = self._reported_s - self._start_s
        rate = (self._done - self._initial) / elapsed_s if elapsed_s else 0.0
        self._write(
            event=event,
            done=self._done,
            total=self._total,
            rejected=self._num_rejected,
            elapsed_s=round(elapsed_s, 3),
            videos_per_s=round(rate, 3),
            left_s=round((self._total - self._done) / rate, 1) if rate else None,
        )

    def _write(self, **fields: Any) -> None:
        line = {"time_s": round(time.time(), 3), "set": self._name, **fields}
        print(json.dumps(line), file=sys.stderr, flush=True)


def open_progress(
    kind: LogKind,
    name: str,
    total: int,
    initial: int,
    metrics: Metrics | None = None,
    every_s: float = 10.0,
) -> Progress:
    """A reporter for one set, to be closed; JSON every `every_s` seconds."""
    match kind:
        case "bar":
            return _Bar(name, total, initial, metrics)
        case "json":
            return JsonLog(name, total, initial, every_s, metrics)
        case "none":
            return Progress(metrics)
