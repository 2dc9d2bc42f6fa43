"""Values that a collector reads at a scrape, and their form for prometheus_client."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from strata.telemetry.catalogue import CATALOGUE

__all__ = ["Reading", "ReadingCollector", "families"]

_ENTRIES = {entry.name: entry for entry in CATALOGUE}


@dataclass(frozen=True)
class Reading:
    """One value of one series.

    Args:
        name: In the catalogue.
        value: In the catalogue's unit.
        labels: The series' labels.
    """

    name: str
    value: float
    labels: Mapping[str, str]


def families(readings: Iterator[Reading]) -> Iterator[Metric]:
    """Readings grouped by name, as prometheus_client takes them."""
    found: dict[str, Any] = {}
    for reading in readings:
        entry = _ENTRIES[reading.name]
        if reading.name not in found:
            family = CounterMetricFamily if entry.kind == "counter" else GaugeMetricFamily
            found[reading.name] = family(reading.name, entry.help, labels=entry.labels)
        values = [reading.labels[label] for label in entry.labels]
        found[reading.name].add_metric(values, reading.value)
    yield from found.values()


class ReadingCollector(Collector):
    """Answers scrapes with what `read` yields at that moment."""

    def __init__(self, read: Callable[[], Iterator[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Yield the current readings, grouped by metric."""
        yield from families(self._read())
