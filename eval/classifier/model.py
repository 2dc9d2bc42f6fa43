"""The classifier's network, and its predictions for videos."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from strata.dataload.reader import ShardReader
from strata.distributed import World, gather, mean_over_ranks
from strata.eval.classifier.config import ClassifierConfig
from strata.train.engine_config import ParameterGroup
from strata.train.models.backbones import Backbone
from strata.train.models.inputs import normalise
from strata.train.representation.encode import VideoClips, inference_autocast, over_videos

__all__ = ["Classifier", "share_statistics", "video_probabilities"]


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
        """Parameter groups that are trained."""
        head = [*self.norm.parameters(), *self.linear.parameters()]
        groups = [ParameterGroup("head", head)]
        if not self.frozen:
            encoder = list(self.backbone.parameters())
            groups.append(ParameterGroup("backbone", encoder, config.backbone_lr_factor))
        return groups

    def train(self, mode: bool = True) -> "Classifier":
        """Set training mode, except for a frozen encoder, which keeps its statistics."""
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


@torch.no_grad()
def share_statistics(model: nn.Module, world: World) -> None:
    """Give every rank the mean of all ranks' batch statistics. All ranks call it.

    Each rank's batch norms saw its own share alone; without this the ranks would test different
    networks. Running statistics are linear in what was seen, so it does not matter how often.
    """
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    if world.size == 1 or not statistics:
        return
    means = mean_over_ranks(torch.cat([b.flatten() for b in statistics]))
    for own, mean in zip(statistics, means.split([b.numel() for b in statistics]), strict=True):
        own.copy_(mean.view_as(own))
