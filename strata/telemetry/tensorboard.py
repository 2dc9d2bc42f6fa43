"""Writes a run's records as TensorBoard's event files."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata.errors import ConfigError

__all__ = ["TensorBoard", "require_tensorboard", "scalars_of"]


def require_tensorboard() -> None:
    """Check that the optional package is installed.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "monitor.tensorboard needs the package tensorboard, which is not installed; "
            "pip install tensorboard, or leave monitor.tensorboard false"
        )


class TensorBoard:
    """Writes the numbers of `step` and `probe` records; call it with every record of a run.

    Args:
        folder: Folder of the event files; a resumed run adds a file that hides the repeated steps.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __call__(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a record: `start` opens the file, `step` and `probe` become scalars."""
        if kind == "start":
            # Imported here since it takes a second and is rarely needed.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=fields["step"] + 1)
        elif self._writer is not None:
            for name, value in scalars_of(kind, fields).items():
                self._writer.add_scalar(name, value, fields["step"])
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def scalars_of(kind: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a `step` or `probe` record by the name that every logger gives them."""
    if kind not in ("step", "probe"):
        return {}
    numbers = {name: value for name, value in fields.items() if name != "step"}
    return dict(_numbers("" if kind == "step" else "probe/", numbers))


def _numbers(prefix: str, fields: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Nested names joined by slashes, which loggers show as groups."""
    found: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found += _numbers(f"{prefix}{name}/", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found
