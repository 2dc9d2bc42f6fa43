"""The public functions: shards to batches, features and figures, without a launcher.

`import strata` has all of them; they are imported when they are first used. Each is a few lines
over the functions that the commands use, and raises the same errors (`strata.errors`).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from strata.dataload.config import DataConfig
from strata.dataload.loader import EvaluationLoader, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import PretrainingRecipe, open_plan
from strata.distributed import current_world
from strata.errors import ConfigError
from strata.eval.protocols.features import FeatureConfig, Features, LevelChoice
from strata.eval.protocols.features import extract_features as extract
from strata.eval.protocols.linear import LinearConfig, LinearResult
from strata.eval.protocols.linear import linear_probe as fit_probe
from strata.eval.protocols.retrieval import Centring, recall_shares
from strata.train import losses, models
from strata.train.engine_config import EngineConfig, choose_device
from strata.train.models.inputs import normalise
from strata.train.pretrained import Encoder, load_encoder
from strata.train.representation.readout import knn_accuracy

__all__ = [
    "ClipBatch",
    "Clips",
    "Encoder",
    "Features",
    "PretrainingBatch",
    "PretrainingBatches",
    "Shards",
    "clips",
    "extract_features",
    "knn",
    "linear_probe",
    "load_encoder",
    "losses",
    "models",
    "open_shards",
    "pretraining_batches",
    "retrieval",
]

Shards = ShardReader
"""An open data set: `keys`, `labels`, `num_frames`, `num_samples`, `manifest.classes`."""
Device = Literal["auto", "cpu", "cuda"] | torch.device


def open_shards(url: str | Path, *, check: Literal["size", "hash"] = "size") -> Shards:
    """Open a data set.

    Args:
        url: A folder that `strata shard` or `strata shard index` wrote, or its URL (`s3://`,
            `gs://`, `http://`).
        check: Compare the shards' sizes with the manifest, or also their SHA-256.

    Raises:
        ConfigError: The URL's protocol is not supported.
        ShardError: There is no complete data set, or its files disagree.
    """
    return ShardReader(url, check)


def _opened(shards: Shards | str | Path) -> Shards:
    return shards if isinstance(shards, ShardReader) else open_shards(shards)


def _device(device: Device) -> torch.device:
    if isinstance(device, torch.device):
        return device
    return choose_device(EngineConfig(device=device), current_world())


class PretrainingBatch(NamedTuple):
    """Augmented views of b videos; S rows and columns."""

    short: Tensor
    """float32 `[b, 2, 3, T, S, S]`: two consecutive clips of T frames of each video, normalised by
    ImageNet's mean and deviation."""
    long: Tensor | None
    """float32 `[b, 3, L, S, S]`: both clips as one sequence; None if it was not asked for."""
    samples: Tensor
    """int64 `[b]`, on the CPU: the videos, as indices into `Shards.keys`."""


class PretrainingBatches:
    """Batches for a training loop; made by `pretraining_batches`.

    Iterating starts at the position and ends with the last epoch. The position is the state:
    `state_dict()` between two batches, `load_state_dict()` before the first.
    """

    def __init__(
        self,
        shards: Shards,
        config: DataConfig,
        *,
        epochs: int,
        seed: int,
        long: bool,
        device: Device,
    ) -> None:
        self._shards, self._config, self._epochs = shards, config, epochs
        self._recipe = PretrainingRecipe(config.clips, lambda _: long)
        self._plan = open_plan(shards, config, seed, self._recipe)
        self._device = _device(device)
        self._epoch = self._step = 0

    def __len__(self) -> int:
        """Number of batches of all epochs, the same on every rank."""
        return self._epochs * self._plan.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, and what identifies the order of videos."""
        return {"epoch": self._epoch, "step": self._step, "plan": self._plan.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position.

        Raises:
            ConfigError: The state is of other shards, another batch size or another seed.
        """
        if state["plan"] != self._plan.digest:
            raise ConfigError(
                "the state of the batches is of other shards, another batch_size or another seed; "
                "use those of the interrupted run"
            )
        self._epoch, self._step = state["epoch"], state["step"]

    def __iter__(self) -> Iterator[PretrainingBatch]:
        """Load from the position on.

        Raises:
            ShardError: A video does not decode.
        """
        if self._epoch >= self._epochs:
            return
        loader = TrainLoader(
            self._shards,
            self._config,
            self._plan,
            world=current_world(),
            device=self._device,
            epochs=(self._epoch, self._epochs),
            start_step=self._step,
            recipe=self._recipe,
        )
        with loader:
            for batch in loader:
                self._epoch, self._step = batch.epoch, batch.step + 1
                if self._step == self._plan.steps_per_epoch:
                    self._epoch, self._step = batch.epoch + 1, 0
                short = normalise(batch.short.flatten(0, 1), 3).unflatten(0, batch.short.shape[:2])
                long = None if batch.long is None else normalise(batch.long, 3)
                yield PretrainingBatch(short, long, torch.from_numpy(batch.samples))


def pretraining_batches(
    shards: Shards | str | Path,
    *,
    batch_size: int = 256,
    epochs: int = 1,
    seed: int = 0,
    long: bool = False,
    device: Device = "auto",
    **settings: Any,
) -> PretrainingBatches:
    """Augmented views of videos in a deterministic order, for any training loop.

    The same seed gives the same batches on any number of ranks; under a launcher each rank gets its
    share of the global batch.

    Args:
        shards: From `open_shards`, or a folder or URL.
        batch_size: Videos in a global batch.
        epochs: Passes over the data set; the last incomplete batch of each is left out.
        seed: Of the order and of the augmentation.
        long: Whether batches have the long sequence too.
        device: Where batches go, and where DALI decodes.
        settings: Further fields of `strata.dataload.config.DataConfig`, for instance `size=112`,
            `clips=ClipSpec(clip_frames=16)`, `views=AugmentSpec(...)`, `threads=4`.

    Raises:
        ConfigError: A setting is out of its range, or the set is smaller than a batch.
        ShardError: There is no complete data set.
    """
    opened = _opened(shards)
    unknown = settings.keys() - {f.name for f in dataclasses.fields(DataConfig)}
    if unknown:
        raise ConfigError(
            f"pretraining_batches has no setting {', '.join(sorted(unknown))}; see DataConfig"
        )
    config = DataConfig(shards=opened.location, batch_size=batch_size, **settings)
    return PretrainingBatches(opened, config, epochs=epochs, seed=seed, long=long, device=device)


class ClipBatch(NamedTuple):
    """Clips of n videos without augmentation."""

    clips: Tensor
    """float32 `[n, clips a video, 3, T, S, S]`, normalised by ImageNet's mean and deviation."""
    labels: Tensor
    """int64 `[n]`, on the CPU: -1 for a video without a label."""
    samples: Tensor
    """int64 `[n]`, on the CPU: the videos, as indices into `Shards.keys`."""


@dataclass(frozen=True)
class Clips:
    """Every video of a data set once, in order; made by `clips`."""

    shards: Shards
    config: DataConfig
    num_clips: int
    stride: int
    videos_per_batch: int
    device: torch.device

    def __iter__(self) -> Iterator[ClipBatch]:
        """Load all videos; under a launcher a rank's share.

        Raises:
            ShardError: A video does not decode.
        """
        loader = EvaluationLoader(
            self.shards,
            self.config,
            world=current_world(),
            device=self.device,
            videos_per_batch=self.videos_per_batch,
            num_clips=self.num_clips,
            stride=self.stride,
        )
        with loader:
            for batch in loader:
                clips, samples = (
                    batch.clips[torch.from_numpy(batch.valid)],
                    batch.samples[batch.valid],
                )
                if len(samples):
                    flat = normalise(clips.flatten(0, 1), 3)
                    labels = torch.from_numpy(self.shards.labels[samples])
                    yield ClipBatch(
                        flat.unflatten(0, clips.shape[:2]), labels, torch.from_numpy(samples)
                    )


def clips(
    shards: Shards | str | Path,
    *,
    num_clips: int = 1,
    stride: int = 1,
    videos_per_batch: int = 8,
    device: Device = "auto",
    **settings: Any,
) -> Clips:
    """Centre crops of every video once, without augmentation.

    Args:
        shards: From `open_shards`, or a folder or URL.
        num_clips: Clips of a video, placed uniformly along it.
        stride: Distance of a clip's neighbouring frames, in source frames.
        videos_per_batch: Videos in a batch.
        device: Where batches go, and where DALI decodes.
        settings: As in `pretraining_batches`.

    Raises:
        ConfigError: A setting is out of its range.
        ShardError: There is no complete data set.
    """
    opened = _opened(shards)
    config = DataConfig(shards=opened.location, **settings)
    return Clips(opened, config, num_clips, stride, videos_per_batch, _device(device))


def extract_features(
    encoder: Encoder, shards: Shards | str | Path, *, num_clips: int = 10, **settings: Any
) -> Features:
    """Features of every video of a labelled data set, as in the evaluations.

    Args:
        encoder: From `load_encoder`; on the device where to compute.
        shards: From `open_shards`, or a folder or URL.
        num_clips: Clips of a video, placed uniformly along it.
        settings: Further fields of `FeatureConfig`, for instance `stride=2`.

    Returns:
        `videos(level)` is `[N, C]`, `clips(level)` `[N, clips a video, C]`; also `labels`, `keys`
        and `classes`.

    Raises:
        ShardError: The data set has videos without labels, or a video does not decode.
    """
    config = FeatureConfig(
        **{
            "num_clips": num_clips,
            "size": encoder.size,
            "clip_frames": encoder.frames,
            **settings,
        }
    )
    device = next(encoder.parameters()).device
    opened, world = _opened(shards), current_world()
    return extract(
        encoder.backbone, opened, config, world=world, device=device, network="", cache=None
    )


def retrieval(
    train: Features, test: Features, *, level: LevelChoice = "high", centre: Centring = "none"
) -> dict[str, float]:
    """R@k: whether a video of a test video's class is among its k nearest training videos.

    Args:
        train: Features of the training set, the gallery.
        test: Features of the test set, the queries.
        level: Which level's features; `all` joins the three.
        centre: Means that are subtracted first, see `RetrievalConfig`.

    Returns:
        Shares in [0, 1] by `R@1`, `R@5`, `R@10`, `R@20`, `R@50`.

    Raises:
        ConfigError: A set is empty, or the features are of different widths or not finite.
    """
    return recall_shares(train, test, level, centre)


def knn(train: Features, test: Features, *, level: LevelChoice = "high") -> float:
    """Top-1, in [0, 1], of a vote of the 20 nearest training videos, see `knn_accuracy`."""
    return knn_accuracy(train.videos(level), train.labels, test.videos(level), test.labels)


def linear_probe(
    train: Features, test: Features, *, level: LevelChoice = "high", **settings: Any
) -> LinearResult:
    """Fit a linear classifier on the features of the training set, and test it.

    Args:
        train: Features of the training set.
        test: Features of the test set.
        level: Which level's features; `all` joins the three.
        settings: Fields of `LinearConfig`, for instance `epochs=50`.

    Returns:
        `accuracy.top1` and `accuracy.top5` of the test videos, `train_top1`.

    Raises:
        ConfigError: A setting is out of its range, or the training set is empty.
    """
    return fit_probe(
        train.clips(level),
        train.labels,
        test.clips(level),
        test.labels,
        len(train.classes),
        LinearConfig(**settings),
    )
