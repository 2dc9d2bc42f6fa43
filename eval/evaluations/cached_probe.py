"""The linear probe on cached features, and figures of classifiers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strata.errors import ConfigError
from strata.eval.accuracy import ClassSpace
from strata.eval.evaluations.common import level_text
from strata.eval.networks import NamedNetwork
from strata.eval.protocols.features import Features
from strata.eval.protocols.linear import LinearConfig, linear_probe
from strata.eval.protocols.named import ProtocolName, protocol_words
from strata.eval.results import Classified, Measurement, Row, classified
from strata.eval.session import Session

__all__ = ["Tested", "cached_probe", "cached_text", "chance_accuracy", "joined", "refuse_cached"]


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A classifier of one network on one pair of sets."""

    shares: dict[str, float]
    training: dict[str, float]
    """On the training set; empty where it was not tested."""
    chance: dict[str, float]
    details: Classified


def chance_accuracy(num_classes: int) -> dict[str, float]:
    """Accuracy of drawing classes at random."""
    return {"Top-1": 1 / num_classes, "Top-5": min(5, num_classes) / num_classes}


def cached_probe(train: Features, test: Features, level: Any, config: LinearConfig) -> Tested:
    """The cached linear probe of one network."""
    space = ClassSpace.of(train.labels, test.labels, train.classes, learned=True)
    result = linear_probe(
        train.clips(level),
        space.index(train.labels),
        test.clips(level),
        space.index(test.labels),
        len(space),
        config,
    )
    return Tested(
        shares={"Top-1": result.accuracy.top1, "Top-5": result.accuracy.top5},
        training={"Top-1": result.train_top1},
        chance=chance_accuracy(len(space)),
        details=classified(result.accuracy, space),
    )


def joined(tested: Sequence[tuple[NamedNetwork, Tested]]) -> Measurement:
    """The classifiers of all networks on a pair; the first network is the evaluated one."""
    rows = [Row(name=n.row, role=n.role, shares=found.shares) for n, found in tested]
    first = tested[0][1]
    if first.training:
        rows.append(Row(name="training", role="training", shares=first.training))
    rows.append(Row(name="chance", role="chance", shares=first.chance))
    return Measurement(rows=tuple(rows), details=first.details)


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
        f"centre crops, {session.clips_text()}; {level_text(session)}, unit length and batch "
        "norm; softmax probabilities averaged over a video's clips"
    )
