"""One process's metrics from start to end: served, listed for Prometheus, taken off again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from strata.telemetry.catalogue import Role
from strata.telemetry.host import HostCollector, ProcessCollector
from strata.telemetry.metrics import ExporterConfig, Metrics, TargetFile

__all__ = ["export", "export_process"]


@contextmanager
def export(
    metrics: Metrics, config: ExporterConfig, *, role: Role, run: str, rank: int, local_rank: int
) -> Iterator[Metrics]:
    """Serve metrics at the port of a local rank; at the end close them.

    Args:
        metrics: Of this process.
        config: Where; port 0 serves nothing.
        role: What the process does.
        run: Name of the run, for the dashboards' variable.
        rank: This process's among all.
        local_rank: This process's on its node, added to the port.
    """
    port = metrics.serve(config, config.port + local_rank) if config.port else None
    target = TargetFile(config, port, run=run, rank=rank, role=role)
    try:
        yield metrics
        # After a fault it stays, so that `up` falls to 0 and an alert fires.
        target.remove()
    finally:
        metrics.close()


@contextmanager
def export_process(
    config: ExporterConfig,
    *,
    role: Role,
    run: str,
    rank: int,
    local_rank: int,
    places: Mapping[str, Path],
) -> Iterator[Metrics]:
    """Metrics of a process without a log: its own, and on local rank 0 the node's.

    Args:
        config: Where; port 0 serves nothing.
        role: What the process does.
        run: Name of the run.
        rank: This process's among all.
        local_rank: This process's on its node.
        places: Folders whose file systems are watched, by what they are for.
    """
    metrics = Metrics(role=role)
    metrics.add_collector(ProcessCollector())
    if local_rank == 0:
        metrics.add_collector(HostCollector(places))
    with export(metrics, config, role=role, run=run, rank=rank, local_rank=local_rank):
        yield metrics
