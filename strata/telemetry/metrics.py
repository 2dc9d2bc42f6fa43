"""Named, unit-suffixed metrics to JSON lines and Prometheus.

Collectors belong to a `Metrics` object with a registry of its own, so importing this file registers
nothing. strata/telemetry/catalogue.toml lists all metrics.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.registry import Collector

import strata
from strata.errors import ConfigError
from strata.logs import JsonLines, get_logger, warn_once
from strata.ranges import check_range
from strata.telemetry.catalogue import CATALOGUE, Metric, Role

__all__ = ["CATALOGUE", "ExporterConfig", "Metric", "Metrics"]

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExporterConfig:
    """Where a process answers Prometheus."""

    port: int = 9480
    """Port of /metrics on local rank 0; local rank r has this + r. 0 serves nothing."""
    host: str = "127.0.0.1"
    """Address that /metrics is bound to; 0.0.0.0 for scrapes from other machines."""
    password_file: Path | None = None
    """A file with one line `user:password` that scrapes must then bring (HTTP basic auth)."""
    certificate: Path | None = None
    """PEM file of the server's certificate: /metrics is served over TLS."""
    key: Path | None = None
    """PEM file of the certificate's key."""
    client_authority: Path | None = None
    """PEM file of an authority; scrapes must then bring a certificate of its own (mutual TLS)."""
    file_sd: Path | None = None
    """Folder in which each process writes its address, for Prometheus's file_sd_configs; on a
    file system that all nodes and Prometheus share. Without one, Prometheus's http_sd_configs find
    all ranks at /targets of rank 0."""
    name: str = ""
    """Name of the run in metrics; by default its path below root, or the complete path outside."""
    root: Path = Path("runs")
    """Folder whose path is left out of the names of runs."""
    node: str = ""
    """Name of this machine in metrics; by default its host name. In a container: the name of its
    node, so that containers are not taken for machines."""

    def __post_init__(self) -> None:
        check_range(self, "port", prefix="monitor.", at_least=0, at_most=65_535)
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("monitor.certificate and monitor.key belong together; give both")
        if self.client_authority is not None and self.certificate is None:
            raise ConfigError(
                "monitor.client_authority checks clients of TLS; give monitor.certificate too"
            )
        for name in ("password_file", "certificate", "key", "client_authority"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"monitor.{name} {path} is not a file; correct the path")
        if self.password_file is not None:
            self.credentials()

    def credentials(self) -> str | None:
        """User and password from the password file.

        Raises:
            ConfigError: It is not `user:password`.
        """
        if self.password_file is None:
            return None
        try:
            line = self.password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"monitor.password_file {self.password_file} is not readable: {error}"
            ) from error
        user, colon, password = line.partition(":")
        if not (user and colon and password) or "\n" in line:
            raise ConfigError(
                f"monitor.password_file {self.password_file} must hold one line user:password"
            )
        return line


class Metrics:
    """The metrics of one process: set them by name; scrape them, or read them as JSON lines.

    Counters begin at 0; a gauge is absent until it is set.

    Args:
        jsonl: File to append records to, or None.
        role: What the process does; decides which entries of the catalogue it has.
    """

    def __init__(self, jsonl: Path | None = None, role: Role = "train") -> None:
        # A series of its own for the time at which each counter began would double the counters.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._role: Role = role
        self._entries = {entry.name: entry for entry in CATALOGUE if role in entry.roles}
        self._metrics: dict[str, Any] = {}
        self._series: dict[str, set[tuple[str, ...]]] = {}
        for entry in self._entries.values():
            # The GPU's and the host's come from collectors that read them when they are scraped.
            if entry.kind != "gauge" and entry.section in ("Training", "Data path"):
                self._make(entry)
        self._jsonl = None if jsonl is None else JsonLines(jsonl)
        self._listeners: list[Callable[[str, Mapping[str, Any]], None]] = []
        self.finished = False
        """Whether the work is complete."""
        self.set("strata_build_info", 1, version=strata.__version__)
        self.set("strata_finished", 0)

    def _make(self, entry: Metric) -> Any:
        match entry.kind:
            case "counter":
                made = Counter(entry.name, entry.help, entry.labels, registry=self.registry)
            case "gauge":
                made = Gauge(entry.name, entry.help, entry.labels, registry=self.registry)
            case "histogram":
                made = Histogram(
                    entry.name,
                    entry.help,
                    entry.labels,
                    registry=self.registry,
                    buckets=entry.buckets,
                )
        self._metrics[entry.name] = made
        return made

    def add_collector(self, collector: Collector) -> None:
        """Let `collector` answer scrapes too."""
        self.registry.register(collector)

    def _child(self, name: str, labels: Mapping[str, str]) -> Any:
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._make(self._entries[name])
        if not labels:
            return metric
        entry, values = self._entries[name], tuple(labels.values())
        series = self._series.setdefault(name, set())
        if values not in series:
            if len(series) == entry.max_series:
                raise ValueError(
                    f"{name} has {entry.max_series} series already, {dict(labels)} would be one "
                    "more; labels must not grow with the data"
                )
            series.add(values)
        return metric.labels(**labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Increase a counter."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._child(name, labels).observe(value)

    def add_listener(self, listener: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Call `listener(kind, fields)` with every record from now on."""
        self._listeners.append(listener)

    def record(self, kind: str, **fields: Any) -> None:
        """Append one JSON line, with the Unix time in seconds and `kind`.

        If the disk is full, the work continues and `strata_log_records_lost_total` counts.
        """
        for listener in self._listeners:
            try:
                listener(kind, fields)
            except OSError as error:
                warn_once(logger, f"figures cannot be written: {error}. The work continues")
        if self._jsonl is not None:
            lost = self._jsonl.num_lost
            self._jsonl.append({"time_s": round(time.time(), 3), "kind": kind, **fields})
            if self._jsonl.num_lost > lost:
                self.add("strata_log_records_lost_total", 1)

    def finish(self) -> None:
        """Report that all work is complete."""
        self.finished = True
        self.set("strata_finished", 1)

    def close(self) -> None:
        """Close the file."""
        if self._jsonl is not None:
            self._jsonl.close()
            self._jsonl = None
