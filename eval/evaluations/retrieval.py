"""Retrieval of test videos among the training videos."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from strata.eval.evaluations.common import level_text, report_name, report_one
from strata.eval.protocols.features import LEVEL_CHOICES, Features
from strata.eval.protocols.named import ProtocolName, protocol_words
from strata.eval.protocols.retrieval import (
    CENTRINGS,
    RECALL_AT,
    Centring,
    RetrievalConfig,
    chance_shares,
    recall_shares,
    retrieve,
)
from strata.eval.results import Figures, Measurement, Retrieved, Row, retrieved
from strata.eval.session import Session, open_session
from strata.eval.sets import SetPair
from strata.eval.settings import OneNetwork

__all__ = [
    "RetrievalEvaluation",
    "retrieval_details",
    "retrieval_text",
    "run_retrieval",
]

_CENTRE_TEXT: dict[Centring, str] = {
    "none": "no centring",
    "gallery": "centred by the gallery's mean",
    "each": "each set centred by its own mean (uses statistics of the test set)",
}


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation(OneNetwork):
    """Settings of `eval/main.py retrieval`."""

    RENAMED: ClassVar = {"gallery": "train", "query": "test"}

    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Centring, and what the report shows."""


def run_retrieval(config: RetrievalEvaluation) -> None:
    """Retrieve each test video's nearest training videos and report R@k."""
    pairs = config.open_pairs()
    with open_session(config) as session:
        measured = [_measure_retrieval(session, config, pair) for pair in pairs]
        text = retrieval_text(session, config.retrieval.centre)
        report_one(session, report_name("retrieval", config), "retrieval", text, pairs, measured)


def _measure_retrieval(session: Session, config: RetrievalEvaluation, pair: SetPair) -> Measurement:
    level, centre = session.features.level, config.retrieval.centre
    rows: list[Row] = []
    variants: Figures = {}
    details: Retrieved | None = None
    chance: dict[str, float] = {}
    for network in config.networks:
        gallery = session.encode(pair.train, network.which)
        queries = session.encode(pair.test, network.which)
        shares = recall_shares(gallery, queries, level, centre)
        rows.append(Row(name=network.row, role=network.role, shares=shares))
        if network.role != "measured":
            continue
        chance = chance_shares(gallery, queries)
        details = retrieval_details(gallery, queries, level, config.retrieval)
        if config.retrieval.variants:
            variants = {
                f"{other} level, {_CENTRE_TEXT[way]}": recall_shares(gallery, queries, other, way)
                for other in LEVEL_CHOICES
                for way in CENTRINGS
            }
    rows.append(Row(name="chance", role="chance", shares=chance))
    return Measurement(rows=tuple(rows), variants=variants, details=details)


def retrieval_details(
    gallery: Features, queries: Features, level: Any, config: RetrievalConfig
) -> Retrieved:
    """Details of a retrieval for the report: queries with their nearest videos."""
    nearest, similarity = retrieve(
        queries.videos(level), gallery.videos(level), config.centre, max(RECALL_AT)
    )
    return retrieved(queries, gallery, nearest, similarity, config.shown)


def retrieval_text(session: Session, centre: Centring) -> str:
    """The protocol of a retrieval in words."""
    named = protocol_words(session.settings(), "retrieval")
    return (
        f"retrieval, {named}: test videos query the training set, cosine similarity, "
        f"{session.clips_text()}; "
        f"{level_text(session)}, mean over clips, {_CENTRE_TEXT[centre]}"
    )
