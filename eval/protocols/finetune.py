"""Finetuning: all weights of the network are trained with a classifier."""

from dataclasses import dataclass

from strata.errors import ConfigError
from strata.eval.pixels import PIXEL_MAPS
from strata.eval.protocols.classifiers import ClassifierEvaluation, run_classifier

__all__ = ["FinetuneEvaluation", "run_finetune"]


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluation(ClassifierEvaluation):
    """Settings of `eval/main.py finetune`."""


def run_finetune(config: FinetuneEvaluation) -> None:
    """Train the complete network from the checkpoint's encoder and report Top-1 and Top-5."""
    if config.training.train != "all":
        raise ConfigError("training.train is head; finetuning is for all, use linear")
    if config.weights in PIXEL_MAPS:
        raise ConfigError(f"--weights {config.weights} has no network to finetune; use linear")
    run_classifier("finetune", config)
