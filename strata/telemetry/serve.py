"""A process's metrics from start to end: served, and listed for Prometheus meanwhile."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from strata.telemetry.catalogue import Role
from strata.telemetry.host import HostCollector, ProcessCollector
from strata.telemetry.metrics import ExporterConfig, Metrics
from strata.telemetry.scrape import open_server
from strata.telemetry.targets import Target, TargetFile, only_run
from strata.world import World

__all__ = ["export", "export_process"]


def _every(target: Target | None, world: World) -> list[Target | None]:
    """The targets of all ranks."""
    if world.size == 1:
        return [target]
    # Here, so that a process without peers does not import torch.
    from strata.distributed import gather_objects

    return gather_objects(target)


@contextmanager
def export(
    metrics: Metrics, config: ExporterConfig, *, role: Role, run: str, world: World
) -> Iterator[Metrics]:
    """Serve metrics at the port of a local rank; at the end close them. All ranks call it.

    Args:
        metrics: Of this process.
        config: Where; port 0 serves nothing.
        role: What the process does.
        run: Name of the run, for the dashboards' variable.
        world: This rank, whose local rank is added to the port, and its peers.

    Raises:
        ConfigError: Another live run of the same name is in the folder of targets.
    """
    with only_run(config, run, role, world):
        server = target = None
        if config.port:
            server = open_server(metrics.registry, config, config.port + world.local_rank)
            if server is not None:
                port = server.server_port
                target = Target.of(config, port, run=run, rank=world.rank, role=role)
            every = [each for each in _every(target, world) if each is not None]
            if server is not None:
                server.targets = Target.listed(every).encode()
        listed = TargetFile(config, target)
        try:
            yield metrics
            if metrics.finished and server is not None:
                server.wait_for_scrape()
            listed.remove()
        except KeyboardInterrupt:
            listed.remove()
            raise
        except Exception as error:
            # It stays, so that `up` falls to 0 and an alert fires, with this reason.
            listed.add_reason(error)
            raise
        finally:
            if server is not None:
                server.close()
            metrics.close()


@contextmanager
def export_process(
    config: ExporterConfig,
    *,
    role: Role,
    run: str,
    world: World,
    places: Mapping[str, Path],
) -> Iterator[Metrics]:
    """Metrics of a process without a log: its own, and on local rank 0 the node's.

    Args:
        config: Where; port 0 serves nothing.
        role: What the process does.
        run: Name of the run.
        world: This process among its peers.
        places: Folders whose file systems are watched, by what they are for.

    Raises:
        ConfigError: Another live run of the same name is in the folder of targets.
    """
    metrics = Metrics(role=role)
    metrics.add_collector(ProcessCollector())
    if world.local_rank == 0:
        metrics.add_collector(HostCollector(places, config.node))
    with export(metrics, config, role=role, run=run, world=world):
        yield metrics
        metrics.finish()
