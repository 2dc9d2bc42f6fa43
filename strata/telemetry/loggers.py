"""Writes a run's figures to TensorBoard, Weights & Biases and MLflow, under the same names.

Projects, servers and keys are those that the user has set for these programs: WANDB_MODE,
WANDB_PROJECT, `wandb login`; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME. None is read here.
"""

import hashlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata.errors import ConfigError

__all__ = ["MlflowLogger", "TensorBoard", "WandbLogger", "require_logger"]

_PARAMS_A_CALL = 100
"""MLflow's limit of parameters in one request."""


def require_logger(name: str) -> None:
    """Check that a logger's package is installed.

    Args:
        name: `tensorboard`, `wandb` or `mlflow`: the package, its setting and its extra.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"monitor.{name} needs the package {name}, which is not installed; install "
            f"strata-video[{name}], or leave monitor.{name} false"
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
            for name, value in _scalars_of(kind, fields).items():
                self._writer.add_scalar(name, value, fields["step"])
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def _scalars_of(kind: str, fields: Mapping[str, Any]) -> dict[str, float]:
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


def _identity(folder: Path) -> str:
    """What stays the same when a run is resumed."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


class WandbLogger:
    """Writes the numbers of `step` and `probe` records to Weights & Biases.

    Args:
        folder: The run's folder; a resumed run continues its record.
        settings: The run's settings by dotted name.

    Raises:
        ConfigError: Weights & Biases refuses the run, for example because nobody is logged in.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        # Imported here since it takes seconds and is rarely needed.
        import wandb

        try:
            self._run: Any = wandb.init(
                dir=str(folder),
                id=_identity(folder),
                name=folder.name,
                resume="allow",
                config=dict(settings),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"monitor.wandb: {' '.join(str(error).split())}; run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        # A resumed run repeats steps, which wandb's own step does not allow.
        self._run.define_metric("*", step_metric="step")

    def __call__(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a record."""
        numbers = _scalars_of(kind, fields)
        if numbers:
            self._run.log({"step": fields["step"], **numbers})

    def close(self) -> None:
        """Send or write what is left."""
        import wandb

        self._run.finish()
        # Its service writes the file, and may do so after the run is finished.
        wandb.teardown()


class MlflowLogger:
    """Writes the numbers of `step` and `probe` records to MLflow.

    MLflow allows no `@` in a name: `R@1` is `R_at_1` there.

    Args:
        folder: The run's folder; a resumed run continues its record.
        settings: The run's settings by dotted name.

    Raises:
        ConfigError: The server or the store refuses, or does not answer.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME
        from mlflow.exceptions import MlflowException

        self._error = MlflowException
        name, identity = MLFLOW_EXPERIMENT_NAME.get() or "strata", _identity(folder)
        try:
            self._client = MlflowClient()
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            same = self._client.search_runs([experiment], f"tags.`strata.run` = '{identity}'")
            if same:
                self._run = same[0].info.run_id
                return
            tags = {"strata.run": identity}
            made = self._client.create_run(experiment, run_name=folder.name, tags=tags)
            self._run = made.info.run_id
            params = [Param(key, str(value)[:500]) for key, value in settings.items()]
            for start in range(0, len(params), _PARAMS_A_CALL):
                self._client.log_batch(self._run, params=params[start : start + _PARAMS_A_CALL])
        except (MlflowException, OSError) as error:
            raise ConfigError(
                f"monitor.mlflow: {' '.join(str(error).split())}; correct MLFLOW_TRACKING_URI"
            ) from error

    def __call__(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a record.

        Raises:
            OSError: The server did not take it.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name.replace("@", "_at_"), value, now, fields["step"])
            for name, value in _scalars_of(kind, fields).items()
        ]
        try:
            if metrics:
                self._client.log_batch(self._run, metrics=metrics)
        except self._error as error:
            raise OSError(f"MLflow did not take a record: {error}") from error

    def close(self) -> None:
        """Mark the run as finished.

        Raises:
            OSError: The server did not take it.
        """
        try:
            self._client.set_terminated(self._run)
        except self._error as error:
            raise OSError(f"MLflow did not take the end of the run: {error}") from error
