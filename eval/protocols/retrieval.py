"""Video retrieval: queries from the test set, gallery the training set, cosine similarity."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from strata.eval.protocols.features import Features, LevelChoice
from strata.train.representation.knn import RECALL_AT, chance_recall, nearest_by_cosine, recall_at

__all__ = [
    "CENTRINGS",
    "RECALL_AT",
    "Centring",
    "RetrievalConfig",
    "centred",
    "chance_shares",
    "recall_shares",
    "retrieve",
]

Centring = Literal["none", "gallery", "each"]
CENTRINGS: tuple[Centring, ...] = get_args(Centring)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Settings of a retrieval: centring, and the contents of the report."""

    centre: Centring = "none"
    """Subtract no mean, the gallery's from both, or each set's own, as CoCLR does; the last uses
    statistics of the complete test set, and the report says so."""
    variants: bool = True
    """Whether the report also has every other level and centring."""
    shown: int = 5
    """Nearest videos of each query that the report names."""


def centred(
    queries: np.ndarray, gallery: np.ndarray, centre: Centring
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64, with the means that `centre` names subtracted."""
    queries, gallery = queries.astype(np.float64), gallery.astype(np.float64)
    match centre:
        case "none":
            return queries, gallery
        case "gallery":
            mean = gallery.mean(axis=0)
            return queries - mean, gallery - mean
        case "each":
            return queries - queries.mean(axis=0), gallery - gallery.mean(axis=0)


def retrieve(
    queries: np.ndarray, gallery: np.ndarray, centre: Centring, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest gallery videos of each query by cosine similarity.

    Args:
        queries: Shape `[Q, C]`.
        gallery: Shape `[G, C]`.
        centre: Which means are subtracted first.
        count: How many to return.

    Returns:
        See `nearest_by_cosine`.

    Raises:
        ConfigError: See `nearest_by_cosine`.
    """
    return nearest_by_cosine(*centred(queries, gallery, centre), count)


def recall_shares(
    gallery: Features, queries: Features, level: LevelChoice, centre: Centring
) -> dict[str, float]:
    """R@k of one level and centring, in [0, 1], by `R@1`, `R@5` and so on.

    Raises:
        ConfigError: A set is empty, or the features are of different widths or not finite.
    """
    nearest, _ = retrieve(queries.videos(level), gallery.videos(level), centre, max(RECALL_AT))
    return {f"R@{k}": v for k, v in recall_at(queries.labels, gallery.labels, nearest).items()}


def chance_shares(gallery: Features, queries: Features) -> dict[str, float]:
    """R@k of drawing videos at random."""
    return {f"R@{k}": v for k, v in chance_recall(queries.labels, gallery.labels).items()}
