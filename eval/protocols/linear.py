"""Linear probe: a linear classifier on frozen features; predictions averaged over clips."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from strata.errors import ConfigError
from strata.eval.accuracy import Accuracy, measure_accuracy
from strata.ranges import check_range

__all__ = ["LinearConfig", "LinearResult", "linear_probe"]


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """The cached probe, which is ours: after CoCLR's, on features of centre crops."""

    epochs: int = 100
    """Passes over the training clips."""
    learning_rate: float = 1e-3
    """Of Adam; falls to 0 along half a cosine."""
    weight_decay: float = 1e-3
    """L2 penalty in the gradient."""
    batch_size: int = 32
    """Clips a step."""
    seed: int = 0
    """Of the classifier's weights and the order of clips."""

    def __post_init__(self) -> None:
        check_range(self, "epochs", prefix="probe.", at_least=1)
        check_range(self, "batch_size", prefix="probe.", at_least=2)
        check_range(self, "learning_rate", prefix="probe.", above=0)
        check_range(self, "weight_decay", prefix="probe.", at_least=0)


@dataclass(frozen=True)
class LinearResult:
    """Accuracy of a probe.

    Args:
        accuracy: On the test videos.
        train_top1: Top-1 on the training videos.
    """

    accuracy: Accuracy
    train_top1: float


def _probabilities(classifier: nn.Module, clips: Tensor) -> Tensor:
    """Mean over clips of the softmax probabilities: `[N, K]`."""
    with torch.inference_mode():
        logits = classifier(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
    return logits.softmax(dim=2).mean(dim=1)


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    config: LinearConfig,
) -> LinearResult:
    """Train on the clips of the training videos, test on those of the test videos.

    Features are brought to unit length and batch-normalised without scale before the linear layer
    (CoCLR). The prediction of a video is the mean of its clips' softmax probabilities (TEXT).

    Args:
        train: Shape `[N, clips, C]`.
        train_labels: Shape `[N]`.
        test: Shape `[M, clips, C]`.
        test_labels: Shape `[M]`.
        num_classes: K.
        config: Settings of the training.

    Returns:
        Accuracies and predictions; the same on every machine rank that calls it.

    Raises:
        ConfigError: The training set is empty.
    """
    if len(train) * train.shape[1] < 2:
        raise ConfigError("linear probe: fewer than two training clips; choose another --train")
    generator = torch.Generator().manual_seed(config.seed)
    clips = functional.normalize(torch.from_numpy(train), dim=2)
    test_clips = functional.normalize(torch.from_numpy(test), dim=2)
    flat = clips.flatten(0, 1)
    labels = torch.from_numpy(train_labels).repeat_interleave(train.shape[1])
    linear = nn.Linear(flat.shape[1], num_classes)
    with torch.no_grad():
        linear.weight.normal_(0.0, 0.01, generator=generator)
        linear.bias.zero_()
    classifier = nn.Sequential(nn.BatchNorm1d(flat.shape[1], affine=False), linear)
    optimizer = torch.optim.Adam(
        linear.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    size = min(config.batch_size, len(flat))
    steps = config.epochs * (len(flat) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(config.epochs):
        order = torch.randperm(len(flat), generator=generator)
        for start in range(0, len(flat) - size + 1, size):
            chosen = order[start : start + size]
            loss = functional.cross_entropy(classifier(flat[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    on_train = _probabilities(classifier, clips).argmax(dim=1)
    return LinearResult(
        accuracy=measure_accuracy(_probabilities(classifier, test_clips).numpy(), test_labels),
        train_top1=(on_train == torch.from_numpy(train_labels)).double().mean().item(),
    )
