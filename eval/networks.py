"""The networks that an evaluation measures: of checkpoints, untrained, or maps of pixels."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from strata.distributed import all_equal
from strata.errors import CheckpointError
from strata.eval.protocols.pixels import PixelMaps, PixelMapsChoice
from strata.eval.results import Role
from strata.train.models.backbones import Backbone, build_backbone
from strata.train.run.checkpoint import RunState, read_marker, read_state
from strata.train.run.encoder import backbone_config, load_backbone
from strata.train.run.history import require_checkpoint

__all__ = [
    "NamedNetwork",
    "Network",
    "Networks",
    "network_name",
    "untrained_network",
]

Network = int | PixelMapsChoice | Path | None
"""The seed of an untrained network, maps of pixels, another checkpoint of the same architecture, or
None for the checkpoint's weights."""


def network_name(which: Network) -> str:
    """As a part of a file's name."""
    if which is None:
        return "pretrained"
    return f"untrained-{which}" if isinstance(which, int) else str(which)


@dataclass(frozen=True, kw_only=True)
class NamedNetwork:
    """A network to measure, and the row of figures that it gets."""

    row: str
    role: Role
    which: Network


def untrained_network(seed: int) -> NamedNetwork:
    """The same architecture with weights drawn from a seed: a baseline."""
    return NamedNetwork(row=f"untrained, seed {seed}", role="untrained", which=seed)


class Networks:
    """Loads or builds the encoders of an evaluation, each with the identity of its weights.

    Args:
        found: The evaluated checkpoint's folder.
        state: The state in it.
        device: Where the encoders go.
    """

    def __init__(self, found: Path, state: RunState, device: torch.device) -> None:
        self._found, self._state, self._device = found, state, device
        self.identity = read_marker(found)
        """What identifies the evaluated checkpoint."""
        all_equal("checkpoint", self.identity)

    def open(self, which: Network) -> tuple[Backbone, str]:
        """Load an encoder on the device, with the identity of its weights. All ranks call it.

        Raises:
            CheckpointError: Another checkpoint is missing, or its architecture is another.
        """
        if which is None:
            return load_backbone(self._found).to(self._device), self.identity
        if isinstance(which, Path):
            return self._other(which)
        if isinstance(which, str):
            return PixelMaps(which), f"pixels: {which}"
        torch.manual_seed(which)
        backbone = build_backbone(backbone_config(self._state.config))
        identity = json.dumps([self._state.config["model"], "untrained", which])
        return backbone.to(self._device), identity

    def _other(self, folder: Path) -> tuple[Backbone, str]:
        found = require_checkpoint(folder)
        if backbone_config(read_state(found).config) != backbone_config(self._state.config):
            raise CheckpointError(
                f"{found} holds another encoder than {self._found}; compare runs of one "
                "architecture"
            )
        identity = read_marker(found)
        all_equal("checkpoint", identity)
        return load_backbone(found).to(self._device), identity
