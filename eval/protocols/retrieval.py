"""Retrieval: test videos query the training set; R@k."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from strata.eval.features import LEVEL_CHOICES, Features
from strata.eval.nearest_videos import (
    CENTRINGS,
    RECALL_AT,
    Centring,
    RetrievalConfig,
    chance_recall,
    recall_at,
    retrieve,
)
from strata.eval.protocols.named import ProtocolName, protocol_words
from strata.eval.reporting import report_one
from strata.eval.results import Figures, Measurement, Retrieved, Row, Shares, retrieved
from strata.eval.session import NamedNetwork, OneNetwork, Session, open_session
from strata.eval.sets import SetPair

__all__ = ["RetrievalEvaluation", "measure_retrieval", "retrieval_text", "run_retrieval"]

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


def retrieval_text(session: Session, centre: Centring) -> str:
    """The protocol of a retrieval in words."""
    named = protocol_words(session.settings(), "retrieval")
    return (
        f"retrieval, {named}: test videos query the training set, cosine similarity, "
        f"{session.clips_text()}; "
        f"{session.level_text()}, mean over clips, {_CENTRE_TEXT[centre]}"
    )


def _figures(gallery: Features, queries: Features, level: Any, centre: Centring) -> Shares:
    """R@k of one level and centring."""
    nearest, _ = retrieve(queries.videos(level), gallery.videos(level), centre, max(RECALL_AT))
    return {f"R@{k}": v for k, v in recall_at(queries.labels, gallery.labels, nearest).items()}


def measure_retrieval(
    session: Session,
    networks: Sequence[NamedNetwork],
    pair: SetPair,
    config: RetrievalConfig,
    *,
    variants: bool,
) -> Measurement:
    """R@k of some networks on one pair of sets.

    Args:
        session: The evaluation.
        networks: The evaluated network first.
        pair: The gallery and the queries.
        config: Centring, and what is shown of the first network.
        variants: Whether to measure every other level and centring of it too.
    """
    level = session.features.level
    rows: list[Row] = []
    other_settings: Figures = {}
    details: Retrieved | None = None
    chance: Shares = {}
    for network in networks:
        gallery = session.encode(pair.train, network.which)
        queries = session.encode(pair.test, network.which)
        shares = _figures(gallery, queries, level, config.centre)
        rows.append(Row(name=network.row, role=network.role, shares=shares))
        if details is not None:
            continue
        found = chance_recall(queries.labels, gallery.labels)
        chance = {f"R@{k}": value for k, value in found.items()}
        nearest = retrieve(
            queries.videos(level), gallery.videos(level), config.centre, max(RECALL_AT)
        )
        details = retrieved(queries, gallery, *nearest, config.shown)
        if variants:
            other_settings = {
                f"{other} level, {_CENTRE_TEXT[way]}": _figures(gallery, queries, other, way)
                for other in LEVEL_CHOICES
                for way in CENTRINGS
            }
    rows.append(Row(name="chance", role="chance", shares=chance))
    return Measurement(rows=tuple(rows), variants=other_settings, details=details)


def run_retrieval(config: RetrievalEvaluation) -> None:
    """Retrieve each test video's nearest training videos and report R@k."""
    pairs = config.open_pairs()
    with open_session(config) as session:
        measured = [
            measure_retrieval(
                session,
                config.networks,
                pair,
                config.retrieval,
                variants=config.retrieval.variants,
            )
            for pair in pairs
        ]
        text = retrieval_text(session, config.retrieval.centre)
        report_one(session, config.report_name("retrieval"), "retrieval", text, pairs, measured)
