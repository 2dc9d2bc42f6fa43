"""The evaluations by the first word of eval/main.py."""

from collections.abc import Callable
from typing import Any

from strata.eval.evaluations.classify import (
    FinetuneEvaluation,
    LinearEvaluation,
    run_finetune,
    run_linear,
)
from strata.eval.evaluations.compare import CompareEvaluation, run_compare
from strata.eval.evaluations.export_features import FeaturesExport, run_features
from strata.eval.evaluations.retrieval import RetrievalEvaluation, run_retrieval
from strata.eval.evaluations.temporal_cues import TemporalCamEvaluation, run_temporal_cam

__all__ = ["RUNNERS"]

RUNNERS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "retrieval": (RetrievalEvaluation, run_retrieval),
    "linear": (LinearEvaluation, run_linear),
    "finetune": (FinetuneEvaluation, run_finetune),
    "compare": (CompareEvaluation, run_compare),
    "features": (FeaturesExport, run_features),
    "temporal_cam": (TemporalCamEvaluation, run_temporal_cam),
}
"""By the command's first word: its settings and what runs it."""
