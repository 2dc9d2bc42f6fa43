"""Settings of the training of a classifier."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from strata.dataload.augment import AugmentSpec
from strata.errors import ConfigError
from strata.ranges import check_range
from strata.train.run.checkpoint import CheckpointConfig

__all__ = ["ClassifierConfig"]


def _views() -> AugmentSpec:
    """CoCLR's augmentation of a classifier's clips; all three protocols have it."""
    return AugmentSpec(
        crop_area=(0.2, 1.0),
        jitter=0.3,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        blur=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How a classifier is trained. The protocols of eval/protocols/named.py set all of it."""

    train: Literal["all", "head"] = "all"
    """Whether the encoder learns too (finetune), or the linear layer alone (linear probe)."""
    epochs: int = 100
    """Passes over the training videos, a clip of each."""
    lr_drop_epochs: tuple[int, ...] = (60, 80)
    """Epochs, from 0, at whose start the learning rate falls."""
    lr_drop_factor: float = 0.1
    """What the learning rate is multiplied with at each drop."""
    batch_size: int = 32
    """Videos in a global batch, over all ranks."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd has a momentum of 0.9."""
    learning_rate: float = 1e-3
    """Of the linear layer."""
    backbone_lr_factor: float = 0.1
    """The encoder's learning rate over the linear layer's."""
    weight_decay: float = 1e-3
    """L2 penalty added to the gradient."""
    dropout: float = 0.9
    """Probability that a feature is dropped before the linear layer."""
    normalised: bool = False
    """Whether features are brought to unit length and batch-normalised before the linear layer."""
    stride: int = 1
    """Distance of a training clip's neighbouring frames, in source frames."""
    views: AugmentSpec = field(default_factory=_views)
    """Augmentation of a training clip, the same for all of its frames."""
    test_crops: Literal[1, 10] = 1
    """Crops of a test clip: 1, the centre; 10, the centre and the corners, each as it is and
    mirrored."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """See `EngineConfig`."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(keep=1))
    """When checkpoints are written."""
    max_skipped_steps: int = 0
    """Steps of a training that may be skipped because a loss or the gradient is not finite."""
    max_steps: int = 0
    """End after so many steps, with a checkpoint and without a test; 0 trains all epochs."""
    seed: int = 0
    """Of the linear layer's weights, order, augmentation and dropout."""

    def __post_init__(self) -> None:
        if self.train not in ("all", "head"):
            raise ConfigError(f"training.train is {self.train!r}; use all or head")
        check = partial(check_range, self, prefix="training.")
        check("epochs", "stride", at_least=1)
        # Batch norm needs two.
        check("batch_size", at_least=2)
        check("learning_rate", above=0)
        check("backbone_lr_factor", "weight_decay", "max_steps", "max_skipped_steps", at_least=0)
        check("dropout", at_least=0, below=1)
        check("lr_drop_factor", at_least=0, at_most=1)

    def lr_factor(self, epoch: int) -> float:
        """Learning rate of an epoch over its initial value."""
        return self.lr_drop_factor ** sum(epoch >= drop for drop in self.lr_drop_epochs)
