"""A process as a target of Prometheus: its labels, and where it is scraped.

A run is called by its path below `monitor.root`, so two runs have one name only if it is set, or if
paths of two machines are alike; where targets share a folder, a second run of a name is refused.
"""

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.errors import ConfigError
from strata.files import FolderLock, write_atomic
from strata.logs import get_logger
from strata.telemetry.catalogue import Role
from strata.telemetry.metrics import ExporterConfig
from strata.world import World

__all__ = ["Target", "TargetFile", "only_run", "run_name"]

logger = get_logger(__name__)


def run_name(config: ExporterConfig, folder: Path) -> str:
    """The label `run` of a process that writes to a folder.

    Args:
        config: May set the name; its `root` is left out of the path.
        folder: Of the run.

    Returns:
        The name that is set, the path below the root, or the complete path outside of it.
    """
    if config.name:
        return config.name
    folder, root = folder.resolve(), config.root.resolve()
    below = folder != root and folder.is_relative_to(root)
    path = folder.relative_to(root) if below else folder
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _file_name(run: str, role: Role) -> str:
    """A file name of its own for each run: readable, and different where names are."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.")[-60:]
    return f"{readable}-{hashlib.sha256(run.encode()).hexdigest()[:8]}-{role}"


@contextmanager
def only_run(config: ExporterConfig, run: str, role: Role, world: World) -> Iterator[None]:
    """Refuse a second live run of the same name among those of a target folder. All ranks call it.

    Raises:
        ConfigError: There is one.
    """
    with ExitStack() as stack:
        wrong = ""
        if config.file_sd is not None and config.port and world.is_first:
            work, advice = f"called {run!r} ({role})", "set another --monitor.name"
            name = f".{_file_name(run, role)}.lock"
            try:
                config.file_sd.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FolderLock(config.file_sd, work, ConfigError, advice, name))
            except ConfigError as error:
                wrong = str(error)
            except OSError as error:
                # Monitoring must not end the run. `TargetFile` logs that there is no target file.
                logger.debug("%s cannot be locked: %s", config.file_sd, error)
        if world.size > 1:
            # Here, so that a process without peers does not import torch.
            from strata.distributed import broadcast_object

            wrong = broadcast_object(wrong)
        if wrong:
            raise ConfigError(wrong)
        yield


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where one process is to be scraped, with its labels.

    Args:
        address: Host and port.
        labels: `run`, `node`, `rank`, `role`, and `__scheme__` for Prometheus itself.
    """

    address: str
    labels: dict[str, str]

    @classmethod
    def of(cls, config: ExporterConfig, port: int, *, run: str, rank: int, role: Role) -> "Target":
        """The target of this process.

        Args:
            config: Address and node.
            port: The bound port.
            run: Name of the run.
            rank: This process's rank.
            role: What the process does.
        """
        name = socket.gethostname()
        host = name if config.host in ("0.0.0.0", "::", "") else config.host
        scheme = "https" if config.certificate is not None else "http"
        labels = {"run": run, "node": config.node or name, "rank": str(rank), "role": role}
        return cls(
            address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            labels=labels | {"__scheme__": scheme},
        )

    @staticmethod
    def listed(targets: Sequence["Target"], **more: str) -> str:
        """Targets in the form of file_sd and http_sd, with further labels."""
        listed: list[dict[str, Any]] = [
            {"targets": [target.address], "labels": target.labels | more} for target in targets
        ]
        return json.dumps(listed, indent=2) + "\n"


class TargetFile:
    """The file from which Prometheus (file_sd_configs) learns the address of this process.

    The file stays if the process dies, so that `up` falls to 0 and an alert fires. It is removed
    when the process ends normally.

    Args:
        config: Names the folder; without one nothing is written.
        target: This process, or None if nothing is served.
    """

    def __init__(self, config: ExporterConfig, target: Target | None) -> None:
        self._path: Path | None = None
        if config.file_sd is None or target is None:
            return
        labels, self._target = target.labels, target
        name = _file_name(labels["run"], labels["role"])  # pyright: ignore[reportArgumentType]
        path = config.file_sd / f"{name}-{labels['rank']}.json"
        try:
            config.file_sd.mkdir(parents=True, exist_ok=True)
            write_atomic(path, Target.listed([target]), sync=False)
        except OSError as error:
            logger.warning(
                "%s cannot be written: %s. The work continues; Prometheus does not find this "
                "process",
                path,
                error,
            )
            return
        self._path = path

    def add_reason(self, error: BaseException) -> None:
        """Add the error that ends this process as the label `ended`, for the alert's text."""
        if self._path is None:
            return
        try:
            listed = Target.listed([self._target], ended=type(error).__name__)
            write_atomic(self._path, listed, sync=False)
        except OSError as wrong:
            logger.warning("%s cannot be written: %s", self._path, wrong)

    def remove(self) -> None:
        """Take this process off the list."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
