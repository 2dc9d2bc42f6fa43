"""The encoder of a checkpoint: its settings, its weights, and the clips that it was trained on."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from strata.errors import CheckpointError, ConfigError
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone
from strata.train.run.checkpoint import read_state, verified_weights

__all__ = ["TrainedClips", "backbone_config", "build_for_file", "load_backbone", "trained_clips"]

_BACKBONE = "backbone."
_SPARE_BYTES = 1 << 20


def load_backbone(folder: Path) -> Backbone:
    """Load the encoder of a checkpoint, built from its own config; no code in it is executed.

    Raises:
        CheckpointError: A file is missing, altered or damaged.
    """
    path = verified_weights(folder)
    backbone = build_for_file(backbone_config(read_state(folder).config), path)
    try:
        with safe_open(path, framework="pt") as tensors:
            names = [k for k in tensors.keys() if k.startswith(_BACKBONE)]
            weights = {k.removeprefix(_BACKBONE): tensors.get_tensor(k) for k in names}
        backbone.load_state_dict(weights, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold this encoder: {error}; use another checkpoint"
        ) from error
    return backbone


def build_for_file(config: BackboneConfig, path: Path) -> Backbone:
    """Build the encoder for a weights file; refuse one that is larger than the file.

    Raises:
        CheckpointError: The encoder has far more weights than the file.
    """
    try:
        with torch.device("meta"):
            sketch = build_backbone(config)
        due = sum(t.numel() * t.element_size() for t in sketch.state_dict().values())
        found = path.stat().st_size
    except (OSError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} does not hold this encoder: {error}") from error
    if due > 2 * found + _SPARE_BYTES:
        raise CheckpointError(
            f"{path} does not hold this encoder: it has {found} bytes, an encoder of width "
            f"{config.width} has {due}; use another checkpoint"
        )
    return build_backbone(config)


def backbone_config(config: dict[str, Any]) -> BackboneConfig:
    """Parse the encoder's settings of a run's resolved configuration.

    Raises:
        CheckpointError: The configuration is of another version.
    """
    described = config.get("model")
    known = {f.name for f in dataclasses.fields(BackboneConfig)}
    try:
        if isinstance(described, dict):
            # How the stem is computed was once a setting here; it is no property of the weights.
            described = {k: v for k, v in described.items() if k != "fold_stem"}
        if isinstance(described, dict) and not described.keys() <= known:
            raise ConfigError(f"unknown settings {sorted(map(str, described.keys() - known))[:3]}")
        return msgspec.convert(described, BackboneConfig)
    except (msgspec.ValidationError, ConfigError) as error:
        raise CheckpointError(
            f"the checkpoint's config does not describe an encoder: {error}; use another one"
        ) from error


class _ClipPart(msgspec.Struct, frozen=True):
    clip_frames: Annotated[int, msgspec.Meta(ge=2, le=1 << 12)]


class TrainedClips(msgspec.Struct, frozen=True):
    """Settings of the clips that an encoder was trained on, read from a run's config."""

    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
    """Rows and columns."""
    clips: _ClipPart

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return self.clips.clip_frames


def trained_clips(config: dict[str, Any]) -> TrainedClips:
    """Parse the clip settings of a run's resolved configuration.

    Raises:
        CheckpointError: It has no valid clip settings.
    """
    try:
        return msgspec.convert(config.get("data"), TrainedClips)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint's config does not describe clips: {error}; use another"
        ) from error
