"""The report on a step of pretraining: losses, health and rates, to the log and the metrics."""

import math
from collections.abc import Mapping

from strata.logs import get_logger
from strata.telemetry.metrics import Metrics
from strata.train.config import TrainConfig
from strata.train.method.schedules import Phase
from strata.train.monitor.bottleneck import RankTimes
from strata.train.monitor.health import IDENTITY_MASS, graph_in_words
from strata.train.run.checkpoint import RunState

__all__ = ["StepReport"]

logger = get_logger(__name__)


class StepReport:
    """Writes what was measured of an interval's last step to the log and the metrics.

    Args:
        config: The run's settings.
        metrics: Receives the values and the record.
        is_first: Whether this rank logs in words.
    """

    def __init__(self, config: TrainConfig, metrics: Metrics, *, is_first: bool) -> None:
        self._config, self._metrics, self._is_first = config, metrics, is_first
        self._graph_is_identity: bool | None = None

    def write(
        self,
        state: RunState,
        epoch: int,
        phase: Phase,
        *,
        losses: Mapping[str, float],
        health: Mapping[str, float],
        times: RankTimes,
        grad_norm: float | None,
    ) -> None:
        """Write one report.

        Args:
            state: After the step.
            epoch: Of the step.
            phase: Of the epoch.
            losses: Means over all ranks.
            health: Of the representation, where it was measured.
            times: Of the interval.
            grad_norm: Of the last gradient.
        """
        metrics, rate = self._metrics, self._config.engine.learning_rate * phase.lr_factor
        samples_per_s = times.rate(self._config.data.batch_size)
        for term, value in losses.items():
            metrics.set("strata_loss", value, term=term)
        self._log_graph(state.step, health, phase)
        metrics.set("strata_learning_rate", rate)
        metrics.set("strata_stage", phase.stage)
        metrics.set("strata_epoch", epoch)
        metrics.set("strata_step", state.step)
        metrics.set("strata_samples_per_second", samples_per_s)
        if grad_norm is not None:
            metrics.set("strata_grad_norm", grad_norm)
        metrics.record(
            "step",
            step=state.step,
            epoch=epoch,
            stage=phase.stage,
            # JSON has no NaN, which is the value if the last step was skipped.
            losses={k: v if math.isfinite(v) else None for k, v in losses.items()},
            health={k: v if math.isfinite(v) else None for k, v in health.items()},
            learning_rate=rate,
            grad_norm=grad_norm,
            samples_per_second=samples_per_s,
            data_wait_ratio=times.data_wait_ratio,
        )

    def _log_graph(self, step: int, health: Mapping[str, float], phase: Phase) -> None:
        """Log when the graph becomes the identity or stops being it."""
        mass = health.get("graph_off_diagonal_mass")
        active = self._config.method.active(phase.stage)
        if mass is None or not self._is_first or not any(n.startswith("graph_") for n in active):
            return
        is_identity = mass < IDENTITY_MASS
        if is_identity != self._graph_is_identity:
            self._graph_is_identity = is_identity
            logger.info("step %d: %s", step, graph_in_words(mass))
