"""Accuracy of simple classifiers on features: k-nearest neighbours and logistic regression."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from strata.train.representation.knn import nearest_by_cosine

__all__ = ["LINEAR_L2", "NUM_VOTERS", "knn_accuracy", "linear_accuracy"]

NUM_VOTERS = 20
"""Number of nearest training videos that vote on a class."""
_VOTE_TEMPERATURE = 0.07
"""Wu et al., CVPR 2018 (arXiv 1805.01978): a neighbour's vote is exp(cosine / 0.07)."""
LINEAR_L2 = 1e-3
"""Penalty on half the squared norm of the weights, added to the mean cross-entropy."""


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Accuracy of a weighted k-nearest-neighbour classifier on the test videos.

    Args:
        train: Shape `[N, C]`.
        train_labels: Shape `[N]`.
        test: Shape `[M, C]`.
        test_labels: Shape `[M]`.

    Raises:
        ConfigError: A feature is not finite, or the training set is empty.
    """
    nearest, cosines = nearest_by_cosine(test, train, NUM_VOTERS)
    classes, which = np.unique(train_labels, return_inverse=True)
    votes = np.zeros((len(test), len(classes)))
    rows = np.arange(len(test))
    for place in range(nearest.shape[1]):
        # Only differences matter, so the largest exponent is shifted to 0.
        vote = np.exp((cosines[:, place] - cosines[:, 0]) / _VOTE_TEMPERATURE)
        votes[rows, which[nearest[:, place]]] += vote
    return float((classes[votes.argmax(axis=1)] == test_labels).mean())


def linear_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Accuracy of logistic regression, fitted on the training videos, on the test videos.

    Features are standardised by the training set's mean and deviation. The loss is convex and
    minimised from zeros, so there is no randomness.

    Args:
        train: Shape `[N, C]`.
        train_labels: Shape `[N]`.
        test: Shape `[M, C]`.
        test_labels: Shape `[M]`; a class that the training set does not have is a miss.
    """
    classes, which = np.unique(train_labels, return_inverse=True)
    mean, scale = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1.0
    rows, asked = (torch.from_numpy((part - mean) / scale) for part in (train, test))
    weight, bias = _logistic_regression(rows, torch.from_numpy(which), len(classes))
    chosen = (asked @ weight + bias).argmax(dim=1).numpy()
    return float((classes[chosen] == test_labels).mean())


def _logistic_regression(
    rows_NC: Tensor, classes_N: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Fit weights `[C, K]` and biases `[K]`, float64."""
    weight = rows_NC.new_zeros(rows_NC.shape[1], num_classes, requires_grad=True)
    bias = rows_NC.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(rows_NC @ weight + bias, classes_N)
        value = value + 0.5 * LINEAR_L2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
