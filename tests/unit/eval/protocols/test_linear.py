"""The linear probe against scikit-learn, and what its prediction is made of."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from strata.errors import ConfigError
from strata.eval.protocols.linear import LinearConfig, linear_probe


def clusters(rng: np.random.Generator, num: int, spread: float):
    """Videos of three classes, four clips each, around three directions."""
    centres = np.random.default_rng(7).normal(size=(3, 16))
    labels = np.arange(num) % 3
    clips = centres[labels][:, None] + spread * rng.normal(size=(num, 4, 16))
    return clips.astype(np.float32), labels


def test_close_to_logistic_regression(rng: np.random.Generator):
    train, train_labels = clusters(rng, 90, 1.5)
    test, test_labels = clusters(rng, 90, 1.5)
    got = linear_probe(train, train_labels, test, test_labels, 3, LinearConfig(epochs=60))

    def flat(clips):
        unit = clips / np.linalg.norm(clips, axis=2, keepdims=True)
        return unit.reshape(-1, 16)

    scale = flat(train).std(axis=0)
    model = LogisticRegression(max_iter=1000).fit(flat(train) / scale, np.repeat(train_labels, 4))
    probabilities = model.predict_proba(flat(test) / scale).reshape(90, 4, 3).mean(axis=1)
    want = (probabilities.argmax(axis=1) == test_labels).mean()
    assert 0.6 < want < 1
    assert abs(got.accuracy.top1 - want) <= 0.05
    assert got.accuracy.top5 == 1.0


def test_the_same_settings_give_the_same_result(rng: np.random.Generator):
    data = (*clusters(rng, 30, 1.0), *clusters(rng, 30, 1.0))
    one, two = (linear_probe(*data, 3, LinearConfig(epochs=3)) for _ in range(2))
    np.testing.assert_array_equal(one.accuracy.predictions, two.accuracy.predictions)
    assert one.accuracy.top1 == two.accuracy.top1


def test_the_prediction_averages_probabilities_over_clips(rng: np.random.Generator):
    train, labels = clusters(rng, 60, 0.3)
    # Three clips of class 0 and one of class 1 in each video: the majority wins.
    mixed = train[labels == 0][:5].copy()
    mixed[:, 3] = train[labels == 1][:5, 3]
    result = linear_probe(train, labels, mixed, np.zeros(5, int), 3, LinearConfig(epochs=40))
    assert result.accuracy.top1 == 1.0


def test_an_empty_training_set_is_an_error():
    empty = np.zeros((0, 4, 8), np.float32)
    with pytest.raises(ConfigError, match="fewer than two training clips"):
        linear_probe(empty, np.zeros(0, int), empty, np.zeros(0, int), 2, LinearConfig())
