"""From probabilities to Top-1, Top-5, accuracy by class and the confusion matrix."""

from dataclasses import dataclass

import numpy as np

from strata.errors import ConfigError

__all__ = ["Accuracy", "ClassSpace", "measure_accuracy"]


@dataclass(frozen=True)
class ClassSpace:
    """The classes that occur; a part of a data set keeps its manifest's numbering.

    Args:
        present: Shape `[K]`: labels that occur, ascending; output k of a classifier is present[k].
        names: K class names.
    """

    present: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, train: np.ndarray, test: np.ndarray, classes: tuple[str, ...], *, learned: bool
    ) -> "ClassSpace":
        """The classes of a training set and a test set.

        Args:
            train: Labels of the training videos.
            test: Labels of the test videos.
            classes: The manifest's class names.
            learned: Whether a classifier is trained, which must have seen every class it is tested
                on.

        Raises:
            ConfigError: A set is empty, or a class to be learned has no training video.
        """
        for what, labels in (("training", train), ("test", test)):
            if not len(labels):
                raise ConfigError(f"the {what} set is empty; choose another")
        unseen = np.setdiff1d(test, train)
        if learned and len(unseen):
            names = ", ".join(classes[k] for k in unseen[:3])
            raise ConfigError(
                f"{len(unseen)} classes have test videos but no training video (first: {names}); "
                "no classifier can learn them: add training videos, or leave these classes out"
            )
        present = np.union1d(train, test)
        return cls(present, tuple(classes[k] for k in present))

    def __len__(self) -> int:
        """K."""
        return len(self.present)

    def index(self, labels: np.ndarray) -> np.ndarray:
        """Labels as outputs of a classifier."""
        return np.searchsorted(self.present, labels)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How a classifier did on N test videos of K classes."""

    top1: float
    top5: float
    """Share of videos whose class is among the five (or K, if fewer) highest."""
    by_class: np.ndarray
    """Shape `[K]`: Top-1 on the videos of each class; NaN where there is none."""
    confusion: np.ndarray
    """Shape `[K, K]`, int64: videos by true class (row) and predicted class (column)."""
    predictions: np.ndarray
    """Shape `[N]`."""


def measure_accuracy(probabilities: np.ndarray, truth: np.ndarray) -> Accuracy:
    """Compare probabilities with labels; among equal ones the lower class comes first.

    Args:
        probabilities: Shape `[N, K]`.
        truth: Shape `[N]`, in [0, K).

    Raises:
        ConfigError: There is nothing to test on, or a probability is not finite.
    """
    if not len(truth):
        raise ConfigError("the test set is empty; choose another")
    if not np.isfinite(probabilities).all():
        raise ConfigError("the classifier's probabilities are not finite; lower the learning rate")
    num_classes = probabilities.shape[1]
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (truth, best[:, 0]), 1)
    counts = confusion.sum(axis=1)
    by_class = np.where(counts > 0, confusion.diagonal() / np.maximum(counts, 1), np.nan)
    return Accuracy(
        top1=float((best[:, 0] == truth).mean()),
        top5=float((best == truth[:, None]).any(axis=1).mean()),
        by_class=by_class,
        confusion=confusion,
        predictions=best[:, 0],
    )
