"""Nearest neighbours by cosine similarity, and retrieval recall R@k."""

import numpy as np

from strata.errors import ConfigError

__all__ = ["RECALL_AT", "chance_recall", "nearest_by_cosine", "recall_at"]

RECALL_AT = (1, 5, 10, 20, 50)
_TIE = 10
"""Decimals to which equal similarities are ties; the order of sums changes 1e-15."""
_BLOCK = 1024
"""Queries compared at a time: 80 MB a block for the 9,537 training videos of UCF101."""


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norm, np.finfo(vectors.dtype).tiny)


def nearest_by_cosine(
    queries: np.ndarray, gallery: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest gallery videos of each query.

    Args:
        queries: Shape `[Q, C]`; a vector of zeros has the similarity 0 with all.
        gallery: Shape `[G, C]`.
        count: Number of videos to return per query.

    Returns:
        Gallery indices and similarities, `[Q, min(count, G)]` each: nearest first, ties by the
        lower index.

    Raises:
        ConfigError: A feature is not finite, the gallery is empty, or the widths differ.
    """
    if not len(gallery):
        raise ConfigError("retrieval: the gallery is empty; choose another --train")
    if queries.shape[1:] != gallery.shape[1:]:
        raise ConfigError(
            f"retrieval: queries have {queries.shape[1:]} features, the gallery "
            f"{gallery.shape[1:]}; encode both with one network"
        )
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise ConfigError("retrieval: features are not finite; check the checkpoint")
    queries, gallery = _unit(queries.astype(np.float64)), _unit(gallery.astype(np.float64))
    count = min(count, len(gallery))
    places = np.zeros((len(queries), count), np.int64)
    values = np.zeros((len(queries), count))
    for start in range(0, len(queries), _BLOCK):
        away = -np.round(queries[start : start + _BLOCK] @ gallery.T, _TIE)
        limit = np.partition(away, count - 1, axis=1)[:, count - 1]
        for row, distances in enumerate(away):
            within = np.flatnonzero(distances <= limit[row])
            chosen = within[np.argsort(distances[within], kind="stable")[:count]]
            places[start + row], values[start + row] = chosen, -distances[chosen]
    return places, values


def recall_at(
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    nearest: np.ndarray,
    counts: tuple[int, ...] = RECALL_AT,
) -> dict[int, float]:
    """R@k: the share of queries with a video of their class among the k nearest.

    A k larger than the gallery uses the complete gallery; a query whose class the gallery does not
    have is a miss at every k.

    Args:
        query_labels: Shape `[Q]`.
        gallery_labels: Shape `[G]`.
        nearest: Shape `[Q, n]`, see `nearest_by_cosine`.
        counts: The values of k.

    Returns:
        Share by k, in [0, 1].

    Raises:
        ConfigError: There are no queries.
    """
    if len(query_labels) == 0:
        raise ConfigError("retrieval: the query set is empty; choose another --test")
    hits = gallery_labels[nearest] == query_labels[:, None]
    return {k: float(hits[:, :k].any(axis=1).mean()) for k in counts}


def chance_recall(
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    counts: tuple[int, ...] = RECALL_AT,
) -> dict[int, float]:
    """Expected R@k for a random order of the gallery.

    For a class with m of G gallery videos: 1 - C(G - m, k) / C(G, k).
    """
    size = len(gallery_labels)
    classes, which = np.unique(query_labels, return_inverse=True)
    result = {}
    for k in counts:
        drawn = np.arange(min(k, size))
        miss = []
        for label in classes:
            others = size - int((gallery_labels == label).sum())
            miss.append(np.prod(np.maximum(others - drawn, 0) / (size - drawn)))
        result[k] = float(1 - np.array(miss)[which].mean())
    return result
