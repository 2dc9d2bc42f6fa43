"""The evaluations by name."""

from collections.abc import Callable
from typing import Any

from strata.eval.protocols.compare import CompareEvaluation, run_compare
from strata.eval.protocols.export import FeaturesExport, run_features
from strata.eval.protocols.finetune import FinetuneEvaluation, run_finetune
from strata.eval.protocols.linear import LinearEvaluation, run_linear
from strata.eval.protocols.retrieval import RetrievalEvaluation, run_retrieval
from strata.eval.protocols.temporal_cam import TemporalCamEvaluation, run_temporal_cam

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
