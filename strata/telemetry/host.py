"""Readings of the host and of this process by psutil, as Prometheus collectors.

The values are read in the exporter's thread when Prometheus scrapes them, not by the training loop.
A reading that the machine does not offer is absent, never zero.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from strata.telemetry.readings import Reading, families

__all__ = ["HostCollector", "ProcessCollector"]


class HostCollector(Collector):
    """Cores, memory, shared memory, disks and network of the node; one process of each node has it.

    Args:
        places: Folders by purpose (`run`, `shards`) whose file systems are reported.
        node: Name of the machine; its host name if empty.
    """

    def __init__(self, places: Mapping[str, Path], node: str = "") -> None:
        self._places = dict(places)
        self._node = node or socket.gethostname()

    def read(self) -> Iterator[Reading]:
        """Current readings of the node."""
        times = psutil.cpu_times()
        idle, wait = times.idle, getattr(times, "iowait", 0.0)
        steal = getattr(times, "steal", 0.0)
        # Linux counts a guest's time in `user` and `nice` too.
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        modes = {
            "busy": sum(times) - guest - idle - wait - steal,
            "idle": idle,
            "iowait": wait,
            "steal": steal,
        }
        for mode, seconds in modes.items():
            yield Reading("strata_host_cpu_seconds_total", seconds, {"mode": mode})
        yield Reading("strata_host_cpus", len(os.sched_getaffinity(0)), {})
        memory = psutil.virtual_memory()
        yield Reading("strata_host_memory_total_bytes", memory.total, {})
        yield Reading("strata_host_memory_available_bytes", memory.available, {})
        yield from self._disks()
        yield from self._traffic()

    def _disks(self) -> Iterator[Reading]:
        shm = Path("/dev/shm")
        if shm.is_dir():
            usage = psutil.disk_usage(str(shm))
            yield Reading("strata_host_shm_size_bytes", usage.total, {})
            yield Reading("strata_host_shm_free_bytes", usage.free, {})
        for place, folder in self._places.items():
            try:
                usage = psutil.disk_usage(str(folder))
            except OSError:
                # Removed or not mounted: the reading is absent for this place.
                continue
            labels = {"place": place, "disk": self._disk(folder)}
            yield Reading("strata_disk_size_bytes", usage.total, labels)
            yield Reading("strata_disk_free_bytes", usage.free, labels)

    def _disk(self, folder: Path) -> str:
        """The file system of a folder: the same for all runs, and for all nodes that share it."""
        at = folder.resolve()
        while not at.is_mount():
            at = at.parent
        mounted = {part.mountpoint: part.device for part in psutil.disk_partitions(all=True)}
        device = mounted.get(str(at), "")
        # Of a server (`server:/export`, `//server/share`); any other is this machine's.
        return device if ":" in device or device.startswith("//") else f"{self._node}:{at}"

    @staticmethod
    def _traffic() -> Iterator[Reading]:
        disks = psutil.disk_io_counters()
        if disks is not None:
            for direction, moved in (("read", disks.read_bytes), ("write", disks.write_bytes)):
                yield Reading("strata_host_disk_bytes_total", moved, {"direction": direction})
        links = [io for name, io in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        if links:
            for direction, moved in (
                ("receive", sum(io.bytes_recv for io in links)),
                ("transmit", sum(io.bytes_sent for io in links)),
            ):
                yield Reading("strata_host_network_bytes_total", moved, {"direction": direction})

    def collect(self) -> Iterator[Metric]:
        """Yield the current readings of the node, grouped by metric."""
        yield from families(self.read())


class ProcessCollector(Collector):
    """CPU time and memory of this process."""

    def read(self) -> Iterator[Reading]:
        """Current readings of the process."""
        yield Reading("strata_process_cpu_seconds_total", time.process_time(), {})
        resident = psutil.Process().memory_info().rss
        yield Reading("strata_process_resident_memory_bytes", resident, {})

    def collect(self) -> Iterator[Metric]:
        """Yield the current readings of the process, grouped by metric."""
        yield from families(self.read())
