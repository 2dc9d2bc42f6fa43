"""The settings of `--protocol`; docs/evaluation.md has the source of each.

A setting that the command line or a file gives is kept; the report then says how it differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from strata.config import dotted, plain
from strata.eval.classifier.config import ClassifierConfig
from strata.eval.protocols.features import FeatureConfig
from strata.eval.protocols.retrieval import RetrievalConfig

__all__ = ["PROTOCOLS", "NamedProtocol", "ProtocolName", "protocol_defaults", "protocol_words"]

ProtocolName = Literal["coclr", "supplement", "ours"]

_NOT_COMPARED = (
    *("features.size", "features.clip_frames", "features.videos_per_batch", "features.level"),
    *("retrieval.shown", "retrieval.variants"),
    *("training.max_steps", "training.max_skipped_steps", "training.seed"),
    *("training.precision", "training.checkpoint."),
)
"""Settings that no protocol decides."""


@dataclass(frozen=True, kw_only=True)
class NamedProtocol:
    """Settings of a protocol for each part of an evaluation."""

    features: FeatureConfig
    """Clips of a video."""
    retrieval: RetrievalConfig
    linear: ClassifierConfig
    """Training of the linear probe."""
    finetune: ClassifierConfig
    """Training of the finetuned network."""

    def parts(self, evaluation: str) -> dict[str, Any]:
        """Settings by the name of their part on the command line."""
        training = {"linear": self.linear, "finetune": self.finetune}
        found = {"features": self.features, "retrieval": self.retrieval}
        return found | ({"training": training[evaluation]} if evaluation in training else {})


def _linear(test_crops: Literal[1, 10]) -> ClassifierConfig:
    """CoCLR's: README of its code, section Linear-probe, on two GPUs of 32 videos each."""
    return ClassifierConfig(
        train="head",
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-3,
        batch_size=64,
        epochs=100,
        lr_drop_epochs=(60, 80),
        dropout=0.0,
        normalised=True,
        test_crops=test_crops,
    )


def _finetune(test_crops: Literal[1, 10]) -> ClassifierConfig:
    """CoCLR's: README of its code, section Finetune, on two GPUs of 32 videos each."""
    return ClassifierConfig(
        train="all",
        optimizer="adam",
        learning_rate=1e-3,
        backbone_lr_factor=0.1,
        weight_decay=1e-3,
        batch_size=64,
        epochs=500,
        lr_drop_epochs=(400, 450),
        dropout=0.9,
        test_crops=test_crops,
    )


PROTOCOLS: dict[ProtocolName, NamedProtocol] = {
    "coclr": NamedProtocol(
        features=FeatureConfig(num_clips=10, stride=1, crop=0.875),
        retrieval=RetrievalConfig(centre="each"),
        linear=_linear(10),
        finetune=_finetune(10),
    ),
    "supplement": NamedProtocol(
        features=FeatureConfig(num_clips=10, stride=1),
        retrieval=RetrievalConfig(centre="none"),
        linear=_linear(1),
        finetune=_finetune(1),
    ),
    "ours": NamedProtocol(
        features=FeatureConfig(num_clips=10, stride=1),
        retrieval=RetrievalConfig(centre="none"),
        linear=ClassifierConfig(train="head", dropout=0.0, normalised=True),
        finetune=ClassifierConfig(train="all"),
    ),
}
"""By the name that `--protocol` takes."""


def protocol_defaults(settings: type[Any], evaluation: str, name: ProtocolName) -> dict[str, Any]:
    """Defaults of an evaluation under a protocol, by dotted name.

    Args:
        settings: The evaluation's settings; only parts that it has are returned.
        evaluation: Its name on the command line.
        name: The protocol.
    """
    known = {field.name for field in fields(settings)}
    parts = PROTOCOLS[name].parts(evaluation)
    return dotted({k: plain(v) for k, v in parts.items() if k in known})


def protocol_words(settings: Mapping[str, Any], evaluation: str) -> str:
    """The protocol's name, and where the settings differ from it.

    Args:
        settings: The evaluation's resolved settings, plain, with `protocol`.
        evaluation: Its name on the command line.
    """
    name: ProtocolName = settings["protocol"]
    mine = dotted({k: v for k, v in settings.items() if isinstance(v, Mapping)})
    there = dotted({k: plain(v) for k, v in PROTOCOLS[name].parts(evaluation).items()})
    other = [
        f"{key} {mine[key]} instead of {value}"
        for key, value in there.items()
        if key in mine and mine[key] != value and not key.startswith(_NOT_COMPARED)
    ]
    return f"protocol {name}" + (f" but for {', '.join(other)}" if other else "")
