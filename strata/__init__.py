"""Strata: self-supervised video representation learning, from video files to an evaluated model.

The public names below are imported when they are first used, so `import strata` takes no time:

    shards = strata.open_shards("shards/ucf101/train01")
    for batch in strata.pretraining_batches(shards, batch_size=32): ...
    encoder = strata.load_encoder("runs/a")
    features = strata.extract_features(encoder, shards)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strata.api import (
        ClipBatch,
        Clips,
        Encoder,
        Features,
        PretrainingBatch,
        PretrainingBatches,
        Shards,
        clips,
        extract_features,
        knn,
        linear_probe,
        load_encoder,
        losses,
        models,
        open_shards,
        pretraining_batches,
        retrieval,
    )

__all__ = [
    "ClipBatch",
    "Clips",
    "Encoder",
    "Features",
    "PretrainingBatch",
    "PretrainingBatches",
    "Shards",
    "__version__",
    "clips",
    "extract_features",
    "knn",
    "linear_probe",
    "load_encoder",
    "losses",
    "models",
    "open_shards",
    "pretraining_batches",
    "retrieval",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("strata.api"), name)
    raise AttributeError(f"module 'strata' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
