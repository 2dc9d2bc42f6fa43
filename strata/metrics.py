"""Named, unit-suffixed metrics to JSON lines and Prometheus; one exporter a process.

Prometheus naming: base units, `_total` for counters, ratios from 0 to 1. Collectors belong to a
`Metrics` object with a registry of its own, so importing this file registers nothing.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.registry import Collector

import strata
from strata.logs import get_logger

__all__ = ["CATALOGUE", "Metric", "Metrics"]

logger = get_logger(__name__)


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue.

    Args:
        name: Full Prometheus name, with unit.
        kind: Its Prometheus type.
        help: One sentence.
        labels: Label names; few values each.
        buckets: Upper bounds, for histograms.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_STEP_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)

CATALOGUE: tuple[Metric, ...] = (
    Metric("strata_samples_total", "counter", "Samples (videos) trained on by this rank."),
    Metric("strata_clips_total", "counter", "Clips put through the backbone by this rank."),
    Metric("strata_frames_decoded_total", "counter", "Frames decoded by this rank."),
    Metric("strata_bytes_read_total", "counter", "Coded bytes read from shards by this rank."),
    Metric("strata_decode_faults_total", "counter", "Samples that failed to decode."),
    Metric("strata_steps_total", "counter", "Optimizer steps taken."),
    Metric("strata_skipped_steps_total", "counter", "Steps left out for a loss not finite."),
    Metric(
        "strata_step_duration_seconds",
        "histogram",
        "Wall time of a training step, waiting for data included.",
        buckets=_STEP_BUCKETS,
    ),
    Metric("strata_data_wait_seconds_total", "counter", "Time spent waiting for the loader."),
    Metric("strata_data_wait_ratio", "gauge", "Share of the last interval spent waiting for data."),
    Metric("strata_samples_per_second", "gauge", "Samples a second on all ranks, last interval."),
    Metric(
        "strata_loss", "gauge", "A loss term, before its weight; `total` is weighted.", ("term",)
    ),
    Metric("strata_loss_chance", "gauge", "What a term is at chance.", ("term",)),
    Metric("strata_health", "gauge", "Label-free health of the representation.", ("measure",)),
    Metric("strata_learning_rate", "gauge", "Learning rate of the last step."),
    Metric("strata_grad_norm", "gauge", "Norm of the gradient before clipping."),
    Metric("strata_epoch", "gauge", "Epoch in progress, from 0."),
    Metric("strata_step", "gauge", "Steps done since the run's start."),
    Metric("strata_stage", "gauge", "Stage of the method, 1 or 2."),
    Metric("strata_checkpoint_duration_seconds", "gauge", "Time the last checkpoint took."),
    Metric(
        "strata_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "Unix time of the last complete checkpoint.",
    ),
    Metric("strata_build_info", "gauge", "Always 1; the labels tell the build.", ("version",)),
)


class Metrics:
    """The metrics of one process: set them by name; scrape them, or read them as JSON lines.

    Args:
        jsonl: File to append records to, or None.
        const_labels: Labels of the run that every JSON record carries.
    """

    def __init__(self, jsonl: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        for entry in CATALOGUE:
            match entry.kind:
                case "counter":
                    metric = Counter(entry.name, entry.help, entry.labels, registry=self.registry)
                case "gauge":
                    metric = Gauge(entry.name, entry.help, entry.labels, registry=self.registry)
                case "histogram":
                    metric = Histogram(
                        entry.name,
                        entry.help,
                        entry.labels,
                        registry=self.registry,
                        buckets=entry.buckets,
                    )
            self._metrics[entry.name] = metric
        self._jsonl: TextIO | None = None
        if jsonl is not None:
            self._jsonl = jsonl.open("a", encoding="utf-8")
        self._listeners: list[Callable[[str, Mapping[str, Any]], None]] = []
        self._server: Any = None
        self.set("strata_build_info", 1, version=strata.__version__)

    def add_collector(self, collector: Collector) -> None:
        """Let `collector` answer scrapes too."""
        self.registry.register(collector)

    def _child(self, name: str, labels: Mapping[str, str]) -> Any:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Increase a counter."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._child(name, labels).observe(value)

    def tell(self, listener: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Call `listener(kind, fields)` with every record from now on."""
        self._listeners.append(listener)

    def record(self, kind: str, **fields: Any) -> None:
        """Append one JSON line, with the Unix time in seconds and `kind`."""
        for listener in self._listeners:
            listener(kind, fields)
        if self._jsonl is not None:
            line = {"time_s": round(time.time(), 3), "kind": kind, **fields}
            self._jsonl.write(json.dumps(line) + "\n")
            self._jsonl.flush()

    def serve(self, host: str, port: int) -> int | None:
        """Answer `/metrics` in a thread.

        Args:
            host: Address to bind; loopback unless the user says otherwise.
            port: Port to bind; 0 takes a free one.

        Returns:
            The bound port, or None if the port was taken, which is said and is not fatal.
        """
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            logger.warning(
                "metrics are not served: %s:%d: %s. Training goes on; choose another "
                "--monitor.port to see them",
                host,
                port,
                error,
            )
            return None
        self._server = server
        return server.server_port

    def close(self) -> None:
        """Stop answering and close the file."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if self._jsonl is not None:
            self._jsonl.close()
            self._jsonl = None
