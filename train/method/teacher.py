"""A frozen encoder whose features of the same clips a student learns to find (L_dis)."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from strata.errors import ConfigError
from strata.train.method.model import VideoModel
from strata.train.models.inputs import normalise
from strata.train.pretrained import load_encoder
from strata.train.representation.encode import inference_autocast

__all__ = ["Teacher"]


class Teacher:
    """The encoder of a run, a checkpoint or an export, in evaluation mode; it never changes.

    Args:
        location: Its folder.

    Raises:
        CheckpointError: There is no encoder, or its files are damaged.
    """

    def __init__(self, location: Path) -> None:
        self.location = location
        self._encoder = load_encoder(location, device="cpu").requires_grad_(False)
        digest = hashlib.sha256(str(self._encoder.backbone.differences).encode())
        for name, tensor in self._encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        self.digest = digest.hexdigest()
        """SHA-256 of its weights, and of whether it sees frame differences."""

    def to(self, device: torch.device) -> None:
        """Move it to the device of the clips."""
        self._encoder.to(device)

    def check(self, student: VideoModel) -> None:
        """Check that the student's head for L_dis has as many channels as the teacher's features.

        Raises:
            ConfigError: It has not.
        """
        teacher, own = self._encoder.backbone.widths.high, student.backbone.widths.high
        if teacher != own:
            raise ConfigError(
                f"method.teacher {self.location} has features of {teacher} channels, this encoder "
                f"of {own}; use a teacher of the same model.width"
            )

    @torch.no_grad()
    def features(self, short: Tensor) -> Tensor:
        """Features of short clips.

        Args:
            short: `[b, V, T, S, S, 3]`, uint8, on the teacher's device.

        Returns:
            `[b, V, C]`, float32: averages of the high level over time and space.
        """
        clips = normalise(short.flatten(0, 1), self._encoder.backbone.in_channels)
        with inference_autocast(clips.device):
            features = self._encoder(clips)
        return features.float().unflatten(0, short.shape[:2])
