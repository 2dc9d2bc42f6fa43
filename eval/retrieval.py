"""Video retrieval: queries from the test set, gallery the training set, cosine similarity."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from strata.errors import ConfigError

__all__ = ["RECALL_AT", "RetrievalConfig", "chance_recall", "recall_at", "retrieve"]

RECALL_AT = (1, 5, 10, 20, 50)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What TEXT leaves open."""

    centre: Literal["none", "gallery", "each"] = "none"
    """Subtract no mean, the gallery's from both, or each set's own, as CoCLR does; the last uses
    statistics of the whole test set."""


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norm, np.finfo(vectors.dtype).tiny)


def retrieve(
    queries: np.ndarray, gallery: np.ndarray, config: RetrievalConfig, count: int
) -> np.ndarray:
    """The nearest gallery videos of each query by cosine similarity.

    Args:
        queries: Shape `[Q, C]`.
        gallery: Shape `[G, C]`.
        config: Whether means are subtracted.
        count: How many to return.

    Returns:
        Shape `[Q, min(count, G)]`: gallery indices, nearest first; ties by the lower index.
    """
    queries, gallery = queries.astype(np.float64), gallery.astype(np.float64)
    match config.centre:
        case "none":
            pass
        case "gallery":
            mean = gallery.mean(axis=0)
            queries, gallery = queries - mean, gallery - mean
        case "each":
            queries, gallery = queries - queries.mean(axis=0), gallery - gallery.mean(axis=0)
    similarity = _unit(queries) @ _unit(gallery).T
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def recall_at(
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    nearest: np.ndarray,
    counts: tuple[int, ...] = RECALL_AT,
) -> dict[int, float]:
    """R@k: the share of queries with a video of their class among the k nearest.

    A k larger than the gallery counts the whole gallery.

    Args:
        query_labels: Shape `[Q]`.
        gallery_labels: Shape `[G]`.
        nearest: Shape `[Q, n]`, see `retrieve`.
        counts: The values of k.

    Returns:
        Share by k, in [0, 1].

    Raises:
        ConfigError: There are no queries.
    """
    if len(query_labels) == 0:
        raise ConfigError("retrieval: the query set is empty; choose another --query")
    hits = gallery_labels[nearest] == query_labels[:, None]
    return {k: float(hits[:, :k].any(axis=1).mean()) for k in counts}


def chance_recall(
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    counts: tuple[int, ...] = RECALL_AT,
) -> dict[int, float]:
    """What R@k is in expectation if the gallery's order is random.

    For a class with m of G gallery videos: 1 - C(G - m, k) / C(G, k).
    """
    size = len(gallery_labels)
    result = {}
    for k in counts:
        miss = []
        for label in query_labels:
            others = size - int((gallery_labels == label).sum())
            drawn = np.arange(min(k, size))
            miss.append(np.prod(np.maximum(others - drawn, 0) / (size - drawn)))
        result[k] = float(1 - np.mean(miss))
    return result
