"""Retrieval and simple classifiers on a labelled set, during and without effect on training."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from strata.dataload.labels import check_labels, check_pair
from strata.dataload.reader import ShardReader
from strata.distributed import World, broadcast_object
from strata.errors import ConfigError
from strata.logs import get_logger
from strata.ranges import check_range
from strata.telemetry.metrics import Metrics
from strata.train.models.backbones import Backbone
from strata.train.representation.encode import VideoClips, encode_levels, over_videos
from strata.train.representation.knn import RECALL_AT, chance_recall, nearest_by_cosine, recall_at
from strata.train.representation.readout import LINEAR_L2, NUM_VOTERS, knn_accuracy, linear_accuracy

__all__ = ["OnlineProbe", "ProbeConfig", "ProbeFigures"]

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of retrieval and simple classifiers during pretraining, docs/evaluation.md."""

    every_epochs: int = 0
    """Epochs between measurements, which include start and end of training; 0 for none."""
    train: Path | None = None
    """Shards of a labelled training set. Training does not use the labels."""
    test: Path | None = None
    """Shards of its test set. Settings chosen by these results are tuned on the test set."""
    num_clips: int = 2
    """Clips placed uniformly along each video. The evaluation (TEXT) has 10."""
    stride: int = 1
    """Distance of a clip's consecutive frames, in source frames."""
    videos_per_batch: int = 8
    """Videos that a rank encodes at a time; changes memory, not results."""

    def __post_init__(self) -> None:
        check_range(self, "every_epochs", prefix="probe.", at_least=0)
        check_range(self, "num_clips", "stride", "videos_per_batch", prefix="probe.", at_least=1)
        if self.every_epochs and (self.train is None or self.test is None):
            raise ConfigError(
                "probe.every_epochs asks for retrieval on a labelled set; give --probe.train and "
                "--probe.test"
            )


@dataclass(frozen=True, kw_only=True)
class ProbeFigures:
    """Results of a measurement, as shares in [0, 1]."""

    recall: dict[int, float]
    """R@k."""
    accuracy: dict[str, float]
    """Top-1: `knn`, by k-nearest neighbours; `linear`, by logistic regression."""
    chance: dict[int, float]
    """R@k at chance level."""


class OnlineProbe:
    """Measures R@k and Top-1 of an encoder during its training.

    Weights, buffers, random state and the order of batches are unchanged afterwards.

    Args:
        config: Settings with both sets.
        size: Rows and columns of a clip, as in pretraining.
        clip_frames: Frames of a clip, as in pretraining.

    Raises:
        ConfigError: The sets have different classes or payloads.
        ShardError: A set is missing, empty, or has no labels.
    """

    def __init__(self, config: ProbeConfig, *, size: int, clip_frames: int) -> None:
        assert config.train is not None
        assert config.test is not None
        self._every = config.every_epochs
        self._sets = [ShardReader(config.train), ShardReader(config.test)]
        for reader in self._sets:
            check_labels(reader)
        check_pair(*self._sets)
        self._clips = VideoClips(
            num_clips=config.num_clips,
            stride=config.stride,
            size=size,
            clip_frames=clip_frames,
            videos_per_batch=config.videos_per_batch,
        )
        self.protocol = (
            f"retrieval of {_count(self._sets[1])} videos among {_count(self._sets[0])} by cosine "
            "similarity of the high level's average over time and space, "
            f"{config.num_clips} clips of {clip_frames} frames at stride {config.stride} placed "
            f"uniformly, centre crop, {size}x{size}, mean over clips, no centring; Top-1 of the "
            f"same features: knn, a vote of the {NUM_VOTERS} nearest by exp(cosine / 0.07); "
            f"linear, logistic regression of standardised features, L2 {LINEAR_L2:g}"
        )

    def digests(self) -> dict[str, str]:
        """Digests that identify the sets."""
        names = ("probe gallery manifest", "probe query manifest")
        return {n: r.manifest.digest for n, r in zip(names, self._sets, strict=True)}

    def is_due(self, *, epoch: int, epoch_step: int, last_epoch: int) -> bool:
        """Whether a measurement is due before the step at this position."""
        return epoch_step == 0 and (epoch % self._every == 0 or epoch == last_epoch)

    def measure(
        self,
        backbone: Backbone,
        *,
        world: World,
        device: torch.device,
        beat: Callable[[str], None],
    ) -> ProbeFigures:
        """Measure all results. All ranks call it and get the same.

        Args:
            backbone: The encoder.
            world: This rank and the world size.
            device: The device to compute on.
            beat: Called before each batch with a description of the work.
        """
        encode = encode_levels(backbone, device)

        def compute(clips: Tensor) -> dict[str, Tensor]:
            beat("encoding the labelled set of probe")
            return {"high": encode(clips)["high"]}

        with _as_saved(backbone):
            gallery, queries = (
                over_videos(compute, r, self._clips, world=world, device=device, shown=None)["high"]
                for r in self._sets
            )
        beat("comparing the labelled set of probe")
        known, asked = (r.labels for r in self._sets)
        train, test = gallery.mean(axis=1), queries.mean(axis=1)
        nearest, _ = nearest_by_cosine(test, train, count=max(RECALL_AT))
        return ProbeFigures(
            recall=recall_at(asked, known, nearest),
            accuracy={
                "knn": knn_accuracy(train, known, test, asked),
                "linear": linear_accuracy(train, known, test, asked),
            },
            chance=chance_recall(asked, known),
        )

    def report(
        self,
        backbone: Backbone,
        *,
        step: int,
        epoch: int,
        world: World,
        device: torch.device,
        metrics: Metrics,
        beat: Callable[[str], None],
    ) -> None:
        """Measure, and write the results to log and metrics. All ranks call it."""
        start = time.perf_counter()
        found = self.measure(backbone, world=world, device=device, beat=beat)
        took_s = time.perf_counter() - start
        if not world.is_first:
            return
        for k, value in found.recall.items():
            metrics.set("strata_probe_recall_ratio", value, k=str(k))
            metrics.set("strata_probe_chance_ratio", found.chance[k], k=str(k))
        for readout, value in found.accuracy.items():
            metrics.set("strata_probe_accuracy_ratio", value, readout=readout)
        metrics.set("strata_probe_epoch", epoch)
        metrics.record(
            "probe",
            step=step,
            epoch=epoch,
            recall={f"R@{k}": value for k, value in found.recall.items()},
            accuracy=found.accuracy,
            chance={f"R@{k}": value for k, value in found.chance.items()},
            protocol=self.protocol,
            took_s=took_s,
        )
        logger.info(
            "after %d epochs: R@1 %.1f %%, chance %.1f %%, Top-1 knn %.1f %%, linear %.1f %% (%s)",
            epoch,
            100 * found.recall[1],
            100 * found.chance[1],
            100 * found.accuracy["knn"],
            100 * found.accuracy["linear"],
            self.protocol,
        )


def _count(reader: ShardReader) -> str:
    return f"{reader.num_samples:,} (listed {reader.num_listed:,})"


@contextmanager
def _as_saved(backbone: Backbone) -> Iterator[None]:
    """Context manager: evaluation mode with rank 0's batch statistics on all ranks.

    These are the statistics that a checkpoint has. Otherwise the ranks would encode with different
    networks, because each rank has the statistics of its own part of the batches.
    """
    training = backbone.training
    buffers = list(backbone.buffers())
    own = [buffer.clone() for buffer in buffers]
    first = broadcast_object([buffer.cpu() for buffer in buffers])
    try:
        with torch.no_grad():
            for buffer, value in zip(buffers, first, strict=True):
                buffer.copy_(value)
        backbone.eval()
        yield
    finally:
        backbone.train(training)
        with torch.no_grad():
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)
