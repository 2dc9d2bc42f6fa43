"""Accuracy against scikit-learn, with ties, one class, and classes that are not there."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score

from strata.errors import ConfigError
from strata.eval.accuracy import ClassSpace, measure_accuracy


@pytest.mark.parametrize("num_classes", [2, 5, 6, 11])
def test_figures_are_those_of_scikit_learn(num_classes: int, rng: np.random.Generator):
    probabilities = rng.dirichlet(np.ones(num_classes), 200)
    truth = rng.integers(0, num_classes, 200)
    truth[:num_classes] = np.arange(num_classes)
    got = measure_accuracy(probabilities, truth)
    assert got.top1 == pytest.approx(accuracy_score(truth, probabilities.argmax(axis=1)))
    if num_classes > 5:
        assert got.top5 == pytest.approx(top_k_accuracy_score(truth, probabilities, k=5))
    else:
        assert got.top5 == 1
    predicted = probabilities.argmax(axis=1)
    np.testing.assert_array_equal(got.confusion, confusion_matrix(truth, predicted))
    # types of scikit-learn know no None here.
    recall: Any = recall_score
    np.testing.assert_allclose(got.by_class, recall(truth, predicted, average=None))


def test_ties_go_to_the_lower_class():
    got = measure_accuracy(np.full((7, 7), 1 / 7), np.arange(7))
    assert got.top1 == pytest.approx(1 / 7)
    assert got.top5 == pytest.approx(5 / 7)
    assert got.predictions.tolist() == [0] * 7


def test_one_class_is_always_right():
    got = measure_accuracy(np.ones((4, 1)), np.zeros(4, int))
    assert (got.top1, got.top5) == (1, 1)


def test_a_class_without_test_videos_has_no_accuracy():
    got = measure_accuracy(np.eye(3)[[0, 2]], np.array([0, 2]))
    assert np.isnan(got.by_class[1])
    assert got.by_class[[0, 2]].tolist() == [1, 1]


def test_outputs_are_the_classes_that_occur():
    space = ClassSpace.of(
        np.array([9, 4, 4]), np.array([4]), tuple(f"c{k}" for k in range(12)), learned=True
    )
    assert space.names == ("c4", "c9")
    assert space.index(np.array([9, 4])).tolist() == [1, 0]


def test_what_cannot_be_learned_or_tested_is_an_error():
    names = ("walk", "run", "jump")
    with pytest.raises(ConfigError, match=r"no training video \(first: jump\)"):
        ClassSpace.of(np.array([0, 1]), np.array([2]), names, learned=True)
    ClassSpace.of(np.array([0, 1]), np.array([2]), names, learned=False)
    with pytest.raises(ConfigError, match="test set is empty"):
        ClassSpace.of(np.array([0]), np.array([], int), names, learned=True)
    with pytest.raises(ConfigError, match="not finite"):
        measure_accuracy(np.array([[np.nan, 1.0]]), np.array([0]))
