"""Pretrained encoders by the place they are at: a run, a checkpoint, an export, or the hub."""

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from strata.distributed import current_world
from strata.errors import CheckpointError
from strata.train import hub
from strata.train.engine_config import EngineConfig, choose_device
from strata.train.export import exported_clips, is_export, load_export
from strata.train.models.backbones import Backbone, Levels
from strata.train.run.checkpoint import find_checkpoint, read_state
from strata.train.run.encoder import load_backbone, trained_clips

__all__ = ["Encoder", "load_encoder"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Encoder(nn.Module):
    """A pretrained encoder with the clips that it was trained on.

    Args:
        backbone: The network.
        frames: T, frames of a clip.
        size: S, rows and columns of a clip.
    """

    def __init__(self, backbone: Backbone, *, frames: int, size: int) -> None:
        super().__init__()
        self.backbone, self.frames, self.size = backbone, frames, size

    def forward(self, clips_NCTHW: Tensor) -> Tensor:
        """Features of clips: the high level's average over time and space.

        Args:
            clips_NCTHW: `[N, 3, T, S, S]`, RGB normalised by ImageNet's mean and deviation.

        Returns:
            `[N, C]`; 512 numbers for R3D-18, 1024 for S3D.
        """
        return self.levels(clips_NCTHW).high.mean(dim=(2, 3, 4))

    def levels(self, clips_NCTHW: Tensor) -> Levels:
        """The maps of the three levels, `[N, C, T', S', S']` each."""
        missing = self.backbone.in_channels - clips_NCTHW.shape[1]
        if missing:
            clips_NCTHW = nn.functional.pad(clips_NCTHW, (0,) * 7 + (missing,))
        return self.backbone(clips_NCTHW)


def load_encoder(
    source: str | Path, *, device: Literal["auto", "cpu", "cuda"] | torch.device = "auto"
) -> Encoder:
    """Load an encoder for evaluation; nothing in its files is executed.

    Args:
        source: The folder of a run, of a checkpoint or of an export with weights, or the name
            `ORG/NAME` of an export on the Hugging Face hub.
        device: Where to put it; auto is the GPU where there is one.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        CheckpointError: There is none, or its files are damaged or of another kind.
        ConfigError: The hub's client is not installed.
    """
    folder = Path(source)
    if not folder.is_dir():
        if not _HUB_NAME.fullmatch(str(source)):
            raise CheckpointError(
                f"{source} does not exist; give the folder of a run, a checkpoint or an export, or "
                "a name ORG/NAME of the hub"
            )
        folder = hub.download(str(source))
    if is_export(folder):
        backbone, (frames, size) = load_export(folder), exported_clips(folder)
    else:
        found = find_checkpoint(folder)
        if found is None:
            raise CheckpointError(
                f"{folder} holds no complete checkpoint and no export; correct the path"
            )
        trained = trained_clips(read_state(found).config)
        backbone, frames, size = load_backbone(found), trained.frames, trained.size
    if not isinstance(device, torch.device):
        device = choose_device(EngineConfig(device=device), current_world())
    return Encoder(backbone, frames=frames, size=size).to(device).eval()
