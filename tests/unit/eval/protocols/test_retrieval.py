"""Retrieval against scikit-learn and plain counting, and in degenerate cases."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from strata.errors import ConfigError
from strata.eval.protocols.features import Features
from strata.eval.protocols.retrieval import CENTRINGS, retrieve
from strata.train.representation.knn import chance_recall, recall_at


def by_scikit_learn(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Nearest first, ties by the lower index, to the decimals that count."""
    return np.argsort(-np.round(cosine_similarity(queries, gallery), 10), axis=1, kind="stable")


def adversarial(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    base = rng.normal(size=(7, 5))
    return {
        "random": (rng.normal(size=(20, 8)), rng.normal(size=(50, 8))),
        "duplicates": (base[:4], np.concatenate([base, base, 3 * base])),
        "ties": (np.eye(4)[:2], np.eye(4).repeat(5, axis=0)),
        "all the same": (np.ones((3, 6)), np.ones((60, 6))),
        "zeros": (np.zeros((2, 3)), np.eye(3)),
        "one video": (base[:1], base[1:2]),
        "far apart in size": (base * 1e-6, base[::-1] * 1e6),
    }


@pytest.mark.parametrize("case", list(adversarial(np.random.default_rng(0))))
def test_nearest_are_those_of_scikit_learn(case: str, rng: np.random.Generator):
    queries, gallery = adversarial(rng)[case]
    for count in (1, 3, len(gallery), 500):
        got, values = retrieve(queries, gallery, "none", count)
        np.testing.assert_array_equal(got, by_scikit_learn(queries, gallery)[:, :count])
        want = np.take_along_axis(cosine_similarity(queries, gallery), got, axis=1)
        np.testing.assert_allclose(values, want, atol=1e-9)


def test_recall_is_that_of_nearest_neighbours(rng: np.random.Generator):
    gallery, queries = rng.normal(size=(80, 6)), rng.normal(size=(31, 6))
    gallery_labels, query_labels = rng.integers(0, 5, 80), rng.integers(0, 6, 31)
    finder = NearestNeighbors(n_neighbors=50, metric="cosine").fit(gallery)
    theirs = finder.kneighbors(queries, return_distance=False)
    mine, _ = retrieve(queries, gallery, "none", 50)
    want = {
        k: np.mean(
            [q in gallery_labels[row[:k]] for q, row in zip(query_labels, theirs, strict=True)]
        )
        for k in (1, 5, 10, 20, 50)
    }
    got = recall_at(query_labels, gallery_labels, mine)
    assert got == pytest.approx(want)
    assert got[50] < 1  # class 5 is not in the gallery: its queries are misses


@pytest.mark.parametrize("centre", ["gallery", "each"])
def test_centring_subtracts_the_means_it_names(centre, rng: np.random.Generator):
    queries, gallery = rng.normal(2, 1, size=(20, 8)), rng.normal(5, 1, size=(50, 8))
    mean = gallery.mean(axis=0) if centre == "gallery" else queries.mean(axis=0)
    similarity = cosine_similarity(queries - mean, gallery - gallery.mean(axis=0))
    got, _ = retrieve(queries, gallery, centre, 10)
    np.testing.assert_array_equal(got, np.argsort(-similarity, axis=1)[:, :10])


@pytest.mark.parametrize("centre", CENTRINGS)
def test_only_the_centring_that_says_so_sees_other_queries(centre, rng: np.random.Generator):
    queries, gallery = rng.normal(2, 1, size=(20, 8)), rng.normal(2, 1, size=(50, 8))
    whole, _ = retrieve(queries, gallery, centre, 50)
    alone, _ = retrieve(queries[:1], gallery, centre, 50)
    assert np.array_equal(whole[:1], alone) == (centre != "each")


def test_joined_levels_have_equal_shares(rng: np.random.Generator):
    levels = {"low": 100 * np.ones((2, 3, 4)), "mid": np.ones((2, 3, 1)), "high": np.eye(6)}
    levels["high"] = levels["high"].reshape(2, 3, 6)
    levels = {k: v.astype(np.float32) for k, v in levels.items()}
    joined = Features(levels, np.zeros(2, int), ("a", "b"), ("c",)).clips("all")
    assert joined.shape == (2, 3, 11)
    for part in (joined[..., :4], joined[..., 4:5], joined[..., 5:]):
        np.testing.assert_allclose(np.linalg.norm(part, axis=2), 1, rtol=1e-6)


def test_recall_counts_any_hit_among_the_nearest():
    nearest = np.array([[0, 1, 2], [2, 1, 0], [1, 2, 0]])
    recall = recall_at(np.array([0, 0, 3]), np.array([0, 1, 2]), nearest, (1, 2, 3, 50))
    assert recall == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 2 / 3, 50: 2 / 3})


def test_one_class_is_always_found():
    nearest, _ = retrieve(np.ones((3, 2)), np.ones((4, 2)), "none", 50)
    assert set(recall_at(np.zeros(3, int), np.zeros(4, int), nearest).values()) == {1.0}
    assert set(chance_recall(np.zeros(3, int), np.zeros(4, int)).values()) == {1.0}


def test_chance_is_the_mean_of_random_orders(rng: np.random.Generator):
    query_labels, gallery_labels = rng.integers(0, 4, 30), rng.integers(0, 4, 40)
    chance = chance_recall(query_labels, gallery_labels, (1, 5))
    trials = []
    for _ in range(400):
        nearest = np.stack([rng.permutation(40)[:5] for _ in query_labels])
        trials.append(list(recall_at(query_labels, gallery_labels, nearest, (1, 5)).values()))
    np.testing.assert_allclose(list(chance.values()), np.mean(trials, axis=0), atol=0.02)


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ConfigError, match="query set is empty"):
        recall_at(np.array([], int), np.array([1]), np.zeros((0, 1), int))
    with pytest.raises(ConfigError, match="gallery is empty"):
        retrieve(np.ones((1, 2)), np.zeros((0, 2)), "none", 5)
    with pytest.raises(ConfigError, match="not finite"):
        retrieve(np.array([[np.nan, 1.0]]), np.ones((1, 2)), "none", 5)
