"""A classifier on an encoder: its settings, the module, its training and its test.

The engine, checkpoints and resume are those of pretraining.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from strata.config import dump_config
from strata.dataload.augment import AugmentSpec
from strata.dataload.config import DataConfig
from strata.dataload.labels import check_labels
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import ClassificationRecipe, open_plan
from strata.distributed import World, any_true, barrier, gather, mean_over_ranks
from strata.errors import CheckpointError, ConfigError, StrataError
from strata.eval.accuracy import Accuracy, ClassSpace, measure_accuracy
from strata.logs import get_logger
from strata.telemetry.metrics import Metrics
from strata.train.engine import Engine, EngineConfig, ParameterGroup
from strata.train.models.backbones import Backbone
from strata.train.models.inputs import normalise
from strata.train.representation.encode import VideoClips, inference_autocast, over_videos
from strata.train.run import checkpoint
from strata.train.run.checkpoint import CheckpointConfig, RunState

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "ClassifierRun",
    "video_probabilities",
]

logger = get_logger(__name__)

_MOMENTUM = 0.9
"""Of SGD; CoCLR's, and the works' that its protocol comes from."""


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
    max_steps: int = 0
    """End after so many steps, with a checkpoint and without a test; 0 trains all epochs."""
    seed: int = 0
    """Of the linear layer's weights, order, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.train not in ("all", "head"):
            raise ConfigError(f"training.train is {self.train!r}; use all or head")
        for name in ("epochs", "batch_size", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; use 1 or more")
        if self.batch_size < 2:
            raise ConfigError("training.batch_size is 1; batch norm needs 2 or more")
        if self.learning_rate <= 0 or self.backbone_lr_factor < 0:
            raise ConfigError(
                "training.learning_rate must be above 0, training.backbone_lr_factor 0 or more"
            )
        if self.weight_decay < 0 or self.max_steps < 0:
            raise ConfigError("training.weight_decay and training.max_steps must be 0 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"training.dropout is {self.dropout}; use 0 to below 1")
        if not 0 <= self.lr_drop_factor <= 1:
            raise ConfigError(f"training.lr_drop_factor is {self.lr_drop_factor}; use 0 to 1")

    def lr_factor(self, epoch: int) -> float:
        """Learning rate of an epoch over its initial value."""
        return self.lr_drop_factor ** sum(epoch >= drop for drop in self.lr_drop_epochs)


class Classifier(nn.Module):
    """An encoder, an average over time and space, and a linear layer.

    With a frozen encoder the head sees the global batch on every rank, so its statistics and its
    gradient do not depend on the number of ranks; an encoder that learns has the batch statistics
    of each rank's share, as in pretraining.

    Args:
        backbone: The encoder.
        num_classes: K.
        config: Which parts are there, and which learn.
    """

    def __init__(self, backbone: Backbone, num_classes: int, config: ClassifierConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.frozen = config.train == "head"
        self._normalised = config.normalised
        width = backbone.widths.high
        self.norm = nn.BatchNorm1d(width) if config.normalised else nn.Identity()
        self.linear = nn.Linear(width, num_classes)
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            self.linear.weight.normal_(0.0, 0.01, generator=generator)
            self.linear.bias.zero_()
        if self.frozen:
            backbone.requires_grad_(False)

    def groups(self, config: ClassifierConfig) -> list[ParameterGroup]:
        """What learns."""
        head = [*self.norm.parameters(), *self.linear.parameters()]
        groups = [ParameterGroup("head", head)]
        if not self.frozen:
            encoder = list(self.backbone.parameters())
            groups.append(ParameterGroup("backbone", encoder, config.backbone_lr_factor))
        return groups

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode for what learns; a frozen encoder keeps its statistics."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def features(self, clips: Tensor) -> Tensor:
        """Averages of the high level: uint8 `[n, T, S, S, 3]` to `[n, C]`, float32."""
        maps = self.backbone(normalise(clips, self.backbone.in_channels)).high
        return maps.float().mean(dim=(2, 3, 4))

    def head(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits, `[n, K]`, in float32."""
        with torch.autocast(features.device.type, enabled=False):
            if self._normalised:
                features = self.norm(functional.normalize(features, dim=1))
            if keep is not None:
                features = features * keep
            return self.linear(features)

    def forward(self, clips: Tensor, keep: Tensor | None) -> Tensor:
        """Logits of a rank's share of a batch, or of the global batch if the encoder is frozen.

        Args:
            clips: uint8 `[b, T, S, S, 3]`.
            keep: Factor of each feature of each row that the head sees (dropout), or None.
        """
        if not self.frozen:
            return self.head(self.features(clips), keep)
        with torch.no_grad():
            features = self.features(clips)
        return self.head(gather(features), keep)


def video_probabilities(
    model: Classifier,
    reader: ShardReader,
    clips: VideoClips,
    *,
    world: World,
    device: torch.device,
) -> np.ndarray:
    """Mean over each video's clips and crops of the softmax probabilities. All ranks call it.

    Returns:
        Shape `[N, K]`, float32, in the order of the data set.
    """
    model.eval()

    def compute(batch: Tensor) -> dict[str, Tensor]:
        with inference_autocast(device):
            features = model.features(batch.flatten(0, 1))
        logits = model.head(features).unflatten(0, batch.shape[:2])
        return {"probabilities": logits.softmax(dim=2).mean(dim=1)}

    shown = f"test {reader.name}"
    found = over_videos(compute, reader, clips, world=world, device=device, shown=shown)
    return found["probabilities"]


class ClassifierRun:
    """Trains a classifier and tests it; goes on where it was stopped.

    Args:
        backbone: The encoder to begin with.
        train: The training set.
        test: The test set.
        config: Settings of the training.
        clips: Clips of the test; size and frames are those of the training too.
        folder: The run's folder: config, log, checkpoints; what is there is gone on with.
        described: What identifies the run; a folder of another run is refused.
        world: This rank and its peers.
        device: Where to compute.

    Raises:
        ConfigError: The batch does not divide by the ranks, or the sets do not fit.
        CheckpointError: The folder belongs to another run.
    """

    def __init__(
        self,
        backbone: Backbone,
        train: ShardReader,
        test: ShardReader,
        config: ClassifierConfig,
        clips: VideoClips,
        *,
        folder: Path,
        described: dict[str, Any],
        world: World,
        device: torch.device,
    ) -> None:
        if config.batch_size % world.size:
            raise ConfigError(
                f"training.batch_size {config.batch_size} does not divide by {world.size} ranks; "
                "use a multiple"
            )
        check_labels(train)
        check_labels(test)
        self.config, self.clips, self.folder = config, clips, folder
        self._train, self._test, self._world, self._device = train, test, world, device
        self.space = ClassSpace.of(train.labels, test.labels, train.manifest.classes, learned=True)
        self._targets = torch.from_numpy(self.space.index(train.labels))
        self._data = DataConfig(
            shards=train.location,
            batch_size=config.batch_size,
            size=clips.size,
            views=config.views,
        )
        self._recipe = ClassificationRecipe(clip_frames=clips.clip_frames, stride=config.stride)
        self._plan = open_plan(train, self._data, config.seed, self._recipe)
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        barrier()
        self.model = Classifier(backbone, len(self.space), config)
        self._engine = Engine(
            self.model,
            self.model.groups(config),
            EngineConfig(
                precision=config.precision,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
            ),
            batch_size=config.batch_size,
            world=world,
            device=device,
            run=folder,
            momentum=_MOMENTUM if config.optimizer == "sgd" else None,
        )
        backbone.channels_last()
        self.state = RunState(
            step=0,
            epoch=0,
            epoch_step=0,
            manifest_digest=train.manifest.digest,
            plan_digest=self._plan.digest,
            world_size=world.size,
            config=described,
        )
        self._resume()

    @property
    def total_steps(self) -> int:
        """Steps of the whole training, or those until it is told to stop."""
        steps = self.config.epochs * self._plan.steps_per_epoch
        return min(steps, self.config.max_steps or steps)

    def _resume(self) -> None:
        found = checkpoint.find_checkpoint(self.folder)
        if found is None:
            return
        state = checkpoint.restore(self._engine, self.model, found)
        if state.config != self.state.config or state.plan_digest != self.state.plan_digest:
            raise CheckpointError(
                f"{self.folder} belongs to another evaluation; choose another --run"
            )
        self.state = dataclasses.replace(state, world_size=self._world.size)
        logger.info("resumed %s at step %d", found, state.step)

    def fit(self) -> None:
        """Train from the current position to the end."""
        config = self.config
        metrics = Metrics(self.folder / "log.jsonl" if self._world.is_first else None)
        if self._world.is_first:
            dump_config(config, self.folder / "training.yaml")
        loader = TrainLoader(
            self._train,
            self._data,
            self._plan,
            world=self._world,
            device=self._device,
            epochs=(self.state.epoch, config.epochs),
            start_step=self.state.epoch_step,
            recipe=self._recipe,
        ).start()
        shown = tqdm(
            total=self.total_steps,
            initial=self.state.step,
            unit="step",
            desc=f"train on {self._train.name}",
            disable=not self._world.is_first,
        )
        tally: list[Tensor] = []
        last_saved = self.state.step
        try:
            batches = iter(loader)
            while self.state.step < self.total_steps:
                batch = next(batches)
                tally.append(self._step(batch))
                self._advance()
                shown.update()
                ended = self.state.epoch_step == 0
                if ended or self._save_due() or self.state.step == self.total_steps:
                    self._report(metrics, batch.epoch, tally)
                    tally = []
                if self._save_due():
                    self._save()
                    last_saved = self.state.step
            if last_saved != self.state.step:
                self._save()
        finally:
            shown.close()
            loader.close()
            metrics.close()

    def _step(self, batch: Batch) -> Tensor:
        """Returns `[loss, share right]` of the batch, on the device."""
        model = self.model
        model.train()
        targets = self._targets[torch.from_numpy(batch.samples)].to(self._device)
        if model.frozen:
            targets = gather(targets)
        logits = self._engine(batch.short[:, 0], self._keep(len(batch.samples)))
        loss = functional.cross_entropy(logits, targets)
        right = (logits.detach().argmax(dim=1) == targets).float().mean()
        self._engine.step(loss, lr_factor=self.config.lr_factor(batch.epoch))
        return torch.stack([loss.detach().float(), right])

    def _keep(self, num_local: int) -> Tensor | None:
        """Dropout as a function of (seed, step): the same after a resume and on any ranks."""
        config, world = self.config, self._world
        if not config.dropout:
            return None
        generator = torch.Generator().manual_seed((config.seed << 32) + self.state.step)
        width = self.model.linear.in_features
        draws = torch.rand(num_local * world.size, width, generator=generator)
        if not self.model.frozen:
            draws = draws[world.rank * num_local : (world.rank + 1) * num_local]
        return ((draws >= config.dropout) / (1 - config.dropout)).to(self._device)

    def _advance(self) -> None:
        state, last = self.state, self.state.epoch_step + 1 == self._plan.steps_per_epoch
        self.state = dataclasses.replace(
            state,
            step=state.step + 1,
            epoch=state.epoch + last,
            epoch_step=0 if last else state.epoch_step + 1,
        )

    def _save_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        return self.state.step % every == 0 if every else self.state.epoch_step == 0

    @torch.no_grad()
    def _share_statistics(self) -> None:
        """Give every rank the mean of all ranks' batch statistics.

        Each rank's batch norms saw its own share alone; without this the ranks would test different
        networks. Running statistics are linear in what was seen, so it does not matter how often.
        """
        statistics = [b for b in self.model.buffers() if b.is_floating_point()]
        if self._world.size == 1 or not statistics:
            return
        means = mean_over_ranks(torch.cat([b.flatten() for b in statistics]))
        for own, mean in zip(statistics, means.split([b.numel() for b in statistics]), strict=True):
            own.copy_(mean.view_as(own))

    def _save(self) -> None:
        self._share_statistics()
        snapshot = self._engine.snapshot(keep=self._world.is_first)
        if self._world.is_first:
            state = dataclasses.replace(self.state, loss_scale=dict(snapshot.loss_scale))
            checkpoint.write(snapshot, state, self.folder, self.config.checkpoint)
        barrier()

    def _report(self, metrics: Metrics, epoch: int, tally: list[Tensor]) -> None:
        """Read the figures since the last report from the device."""
        loss, top1 = mean_over_ranks(torch.stack(tally).mean(dim=0)).tolist()
        if any_true(not np.isfinite(loss), self._device):
            raise StrataError(
                f"the classifier's loss is not finite before step {self.state.step}; go on from "
                "the last checkpoint with a smaller --training.learning_rate"
            )
        rate = self.config.learning_rate * self.config.lr_factor(epoch)
        metrics.record(
            "step",
            step=self.state.step,
            epoch=epoch,
            num_steps=len(tally),
            loss=loss,
            top1=top1,
            learning_rate=rate,
        )

    def test(self) -> Accuracy:
        """Accuracy on the test set, of the weights as they are at the end of the training.

        No epoch is chosen by its accuracy on the test set.
        """
        crops = self.config.test_crops
        clips = dataclasses.replace(
            self.clips,
            num_crops=crops,
            videos_per_batch=max(1, self.clips.videos_per_batch // crops),
        )
        probabilities = video_probabilities(
            self.model, self._test, clips, world=self._world, device=self._device
        )
        return measure_accuracy(probabilities, self.space.index(self._test.labels))
