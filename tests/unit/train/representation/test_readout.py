"""The simple classifiers compared with scikit-learn and with known results."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from strata.train.representation.readout import LINEAR_L2, NUM_VOTERS, knn_accuracy, linear_accuracy


@pytest.fixture
def sets(rng: np.random.Generator) -> list[np.ndarray]:
    """Three overlapping classes, numbered 2, 5 and 9; one channel is constant."""
    labels = [rng.choice([2, 5, 9], size) for size in (90, 60)]
    centres = {2: 0.0, 5: 1.0, 9: 2.0}
    found = []
    for of in labels:
        rows = rng.normal(1.0, 1.5, (len(of), 6)) + np.array([centres[k] for k in of])[:, None]
        rows[:, 5] = 3.0
        found += [rows.astype(np.float32), of]
    return found


def test_the_linear_classifier_is_logistic_regression(sets: list[np.ndarray]):
    train, labels, test, asked = sets
    scale = np.where(train.std(axis=0) == 0, 1, train.std(axis=0))
    rows, others = ((part - train.mean(axis=0)) / scale for part in (train, test))
    # Their penalty is on the sum over samples, ours on the mean.
    theirs = LogisticRegression(C=1 / (LINEAR_L2 * len(rows)), tol=1e-10, max_iter=5000)
    theirs.fit(rows, labels)
    expected = np.mean(theirs.predict(others) == asked)
    assert 0.4 < expected < 1
    assert linear_accuracy(train, labels, test, asked) == pytest.approx(expected)


def test_knn_votes_are_weighted_by_similarity(sets: list[np.ndarray]):
    train, labels, test, asked = sets
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, test)]
    weights: Any = lambda away: np.exp((1 - away) / 0.07)  # noqa: E731
    theirs = KNeighborsClassifier(NUM_VOTERS, metric="cosine", weights=weights)
    theirs.fit(unit[0], labels)
    expected = np.mean(theirs.predict(unit[1]) == asked)
    assert 0.3 < expected < 1
    assert knn_accuracy(train, labels, test, asked) == pytest.approx(expected)


def test_an_unknown_class_is_a_miss(sets: list[np.ndarray]):
    train, labels, test, _ = sets
    nobody = np.full(len(test), 7)
    assert knn_accuracy(train, labels, test, nobody) == 0
    assert linear_accuracy(train, labels, test, nobody) == 0
    # Of fewer training videos than voters all vote.
    assert knn_accuracy(train[:3], labels[:3], train[:1], labels[:1]) == 1
