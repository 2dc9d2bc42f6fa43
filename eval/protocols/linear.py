"""The linear probe: a linear classifier on a frozen encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from strata.errors import ConfigError
from strata.eval.accuracy import ClassSpace
from strata.eval.classifier import ClassifierConfig
from strata.eval.linear_probe import LinearConfig, linear_probe
from strata.eval.protocols.classifiers import (
    ClassifierEvaluation,
    NetworkAccuracy,
    join_rows,
    run_classifier,
)
from strata.eval.protocols.named import PROTOCOLS, ProtocolName, protocol_words
from strata.eval.reporting import report_one
from strata.eval.results import Measurement
from strata.eval.session import NamedNetwork, Session, open_session
from strata.eval.sets import SetPair

__all__ = [
    "LinearEvaluation",
    "cached_text",
    "measure_cached_probe",
    "refuse_cached",
    "run_linear",
]


@dataclass(frozen=True, kw_only=True)
class LinearEvaluation(ClassifierEvaluation):
    """Settings of `eval/main.py linear`."""

    variant: Literal["augmented", "cached"] = "augmented"
    """augmented trains on augmented clips, encoded again each epoch (CoCLR). cached trains on the
    features of the training videos' test clips, encoded once: minutes instead of hours."""
    training: ClassifierConfig = field(default_factory=lambda: PROTOCOLS["supplement"].linear)
    """Of the augmented variant; `run` is its folder."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """Of the cached variant."""


def refuse_cached(protocol: ProtocolName) -> None:
    """Refuse to give CoCLR's name to a probe that is not CoCLR's.

    Raises:
        ConfigError: The protocol is CoCLR's.
    """
    if protocol == "coclr":
        raise ConfigError(
            "--protocol coclr trains its probe on augmented clips, the cached probe is ours; use "
            "linear with --variant augmented, or --protocol supplement or ours"
        )


def cached_text(session: Session) -> str:
    """The protocol of the cached linear probe in words."""
    named = protocol_words(session.settings(), "cached")
    return (
        f"linear, cached, {named} with a probe of ours: a linear layer on frozen features of the "
        f"centre crops, {session.clips_text()}; {session.level_text()}, unit length and batch "
        "norm; softmax probabilities averaged over a video's clips"
    )


def measure_cached_probe(
    session: Session, networks: Sequence[NamedNetwork], pair: SetPair, config: LinearConfig
) -> Measurement:
    """Accuracy of the cached linear probe of some networks on one pair of sets."""
    level = session.features.level
    tested = []
    for network in networks:
        train = session.encode(pair.train, network.which)
        test = session.encode(pair.test, network.which)
        space = ClassSpace.of(train.labels, test.labels, train.classes, learned=True)
        result = linear_probe(
            train.clips(level),
            space.index(train.labels),
            test.clips(level),
            space.index(test.labels),
            len(space),
            config,
        )
        tested.append(
            NetworkAccuracy(
                network=network,
                test=result.accuracy,
                space=space,
                train_top1=result.train_top1,
            )
        )
    return join_rows(tested)


def run_linear(config: LinearEvaluation) -> None:
    """Train a linear classifier on a frozen encoder and report Top-1 and Top-5."""
    if config.training.train != "head":
        raise ConfigError("training.train is all; the linear probe is for head, use finetune")
    if config.variant == "augmented":
        run_classifier("linear", config)
        return
    refuse_cached(config.protocol)
    pairs = config.open_pairs()
    with open_session(config) as session:
        measured = [
            measure_cached_probe(session, config.networks, pair, config.probe) for pair in pairs
        ]
        name, text = config.report_name("linear-cached"), cached_text(session)
        report_one(session, name, "linear", text, pairs, measured)
