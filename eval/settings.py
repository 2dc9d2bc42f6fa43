"""Settings that the evaluations share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from strata.eval.networks import NamedNetwork, Network, untrained_network
from strata.eval.protocols.features import FeatureConfig
from strata.eval.sets import SetPair, open_pairs
from strata.telemetry.metrics import ExporterConfig

__all__ = ["Evaluation", "OneNetwork"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Settings that all evaluations share."""

    SHOWN: ClassVar = (
        *("checkpoint", "train", "test", "shards", "data", "splits", "protocol", "variant"),
        *("weights", "untrained_seeds", "others", "features.num_clips", "device", "out"),
    )

    checkpoint: Path
    """A run's folder, whose newest checkpoint is taken, or a checkpoint's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """How a video becomes features."""
    monitor: ExporterConfig = field(default_factory=lambda: ExporterConfig(port=0))
    """Where to serve metrics to Prometheus while it runs; by default nowhere."""
    out: Path | None = None
    """File for the result, beside which its page gets the ending .html; by default report.json in
    a folder of its own under the checkpoint's run, in eval/."""


@dataclass(frozen=True, kw_only=True)
class OneNetwork(Evaluation):
    """An evaluation of one network."""

    weights: Literal["pretrained", "untrained", "thumbnails", "motion"] = "pretrained"
    """untrained draws the weights of the same network from the seed: the baseline. thumbnails and
    motion take no network but 8x8 maps of the clips' pixels, or of what changes between frames."""
    seed: int = 0
    """Of the untrained weights."""
    untrained_seeds: tuple[int, ...] = (0,)
    """Seeds of untrained networks that go through the same protocol, to stand beside the figures;
    [] leaves them out."""
    train: Path | None = None
    """Shards of the training set: retrieval's gallery."""
    test: Path | None = None
    """Shards of the test set: retrieval's queries."""
    backbone: Literal["any", "r3d18", "s3d"] = "any"
    """The encoder that the checkpoint must have; another is refused."""
    data: tuple[Path, ...] = ()
    """Folders of shards with train01, test01 and so on, for instance [shards/ucf101,
    shards/hmdb51]: instead of a training and a test set."""
    splits: tuple[int, ...] = (1, 2, 3)
    """Splits of each folder of `data`."""

    def open_pairs(self) -> list[SetPair]:
        """Open the sets, see `open_pairs`."""
        return open_pairs(self.data, self.splits, self.train, self.test)

    @property
    def measured(self) -> Network:
        """The network that is evaluated."""
        if self.weights == "untrained":
            return self.seed
        return None if self.weights == "pretrained" else self.weights

    @property
    def networks(self) -> list[NamedNetwork]:
        """The evaluated network first, then the baselines."""
        seeds = self.untrained_seeds if self.weights == "pretrained" else ()
        first = NamedNetwork(row="measured", role="measured", which=self.measured)
        return [first, *(untrained_network(seed) for seed in seeds)]
