"""Retrieval against scikit-learn and plain counting, and in degenerate cases."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from strata.errors import ConfigError
from strata.eval.retrieval import RetrievalConfig, chance_recall, recall_at, retrieve


def test_nearest_are_those_of_scikit_learn(rng: np.random.Generator):
    queries, gallery = rng.normal(size=(20, 8)), rng.normal(size=(50, 8))
    got = retrieve(queries, gallery, RetrievalConfig(), 50)
    want = np.argsort(-cosine_similarity(queries, gallery), axis=1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("centre", ["gallery", "each"])
def test_centring_subtracts_the_means_it_names(centre, rng: np.random.Generator):
    queries, gallery = rng.normal(2, 1, size=(20, 8)), rng.normal(5, 1, size=(50, 8))
    mean = gallery.mean(axis=0) if centre == "gallery" else queries.mean(axis=0)
    similarity = cosine_similarity(queries - mean, gallery - gallery.mean(axis=0))
    got = retrieve(queries, gallery, RetrievalConfig(centre=centre), 10)
    np.testing.assert_array_equal(got, np.argsort(-similarity, axis=1)[:, :10])


def test_ties_go_to_the_lower_index():
    got = retrieve(np.ones((1, 3)), np.ones((4, 3)), RetrievalConfig(), 4)
    assert got.tolist() == [[0, 1, 2, 3]]


def test_a_zero_vector_is_far_from_all():
    got = retrieve(np.ones((1, 2)), np.array([[0.0, 0.0], [1.0, 1.0]]), RetrievalConfig(), 2)
    assert got.tolist() == [[1, 0]]


def test_recall_counts_any_hit_among_the_nearest():
    nearest = np.array([[0, 1, 2], [2, 1, 0], [1, 2, 0]])
    recall = recall_at(np.array([0, 0, 3]), np.array([0, 1, 2]), nearest, (1, 2, 3, 50))
    assert recall == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 2 / 3, 50: 2 / 3})


def test_chance_is_the_mean_of_random_orders(rng: np.random.Generator):
    query_labels, gallery_labels = rng.integers(0, 4, 30), rng.integers(0, 4, 40)
    chance = chance_recall(query_labels, gallery_labels, (1, 5))
    trials = []
    for _ in range(400):
        nearest = np.stack([rng.permutation(40)[:5] for _ in query_labels])
        trials.append(list(recall_at(query_labels, gallery_labels, nearest, (1, 5)).values()))
    np.testing.assert_allclose(list(chance.values()), np.mean(trials, axis=0), atol=0.02)


def test_no_queries_is_an_error():
    with pytest.raises(ConfigError, match="query set is empty"):
        recall_at(np.array([], int), np.array([1]), np.zeros((0, 1), int))
