"""Names, texts and the report on a single protocol, for all evaluations."""

from collections.abc import Sequence
from pathlib import Path

from strata.eval.networks import network_name
from strata.eval.output import write_result
from strata.eval.protocols.pixels import PIXEL_MAPS
from strata.eval.results import Kind, Measurement, PairResult
from strata.eval.session import Session
from strata.eval.sets import SetPair
from strata.eval.settings import OneNetwork

__all__ = ["level_text", "report_name", "report_one"]


def level_text(session: Session) -> str:
    """Describe the compared features: a level of the network, or pixels."""
    weights = getattr(session.config, "weights", "pretrained")
    if weights in PIXEL_MAPS:
        return PIXEL_MAPS[weights]
    config = session.features
    if config.level == "all":
        return "the three levels' averages over time and space, of unit length each, joined"
    return f"the {config.level} level's average over time and space"


def report_name(protocol: str, config: OneNetwork) -> str:
    """The name of a report: the protocol, and the network if it is not the checkpoint's."""
    which = config.measured
    return protocol if which is None else f"{protocol}-{network_name(which)}"


def report_one(
    session: Session,
    name: str,
    kind: Kind,
    text: str,
    pairs: Sequence[SetPair],
    measured: Sequence[Measurement],
    *,
    path: Path | None = None,
) -> None:
    """Report an evaluation by a single protocol."""
    results = [
        PairResult(sets=pair, measured={kind: found})
        for pair, found in zip(pairs, measured, strict=True)
    ]
    write_result(session, name, {kind: text}, results, path=path)
