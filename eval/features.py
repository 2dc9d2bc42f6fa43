"""Frozen features over a data set: every sample exactly once, whatever the number of ranks."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from strata.dataload.clips import ClipSpec
from strata.dataload.loader import DataConfig, EvaluationLoader
from strata.dataload.reader import ShardReader
from strata.distributed import World, barrier, gather_objects
from strata.errors import ConfigError, ShardError
from strata.train.method import normalise
from strata.train.models.backbones import Backbone

__all__ = ["FeatureConfig", "Features", "extract_features"]


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How a video becomes features."""

    num_clips: int = 10
    """Clips placed uniformly along each video. TEXT: 10."""
    stride: int = 1
    """Distance of a clip's neighbouring frames, in source frames."""
    size: int = 0
    """Rows and columns of a clip; 0 takes what the network was pretrained on. TEXT: 112."""
    clip_frames: int = 0
    """Frames of a clip; 0 takes what the network was pretrained on. TEXT: 16."""
    level: Literal["low", "mid", "high"] = "high"
    """Which level's maps are averaged over time and space."""
    videos_per_batch: int = 8
    """Videos that a rank encodes at a time; changes memory, not results."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        for name in ("num_clips", "stride", "videos_per_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"features.{name} is {getattr(self, name)}; use 1 or more")
        if self.size < 0 or self.clip_frames < 0:
            raise ConfigError("features.size and features.clip_frames must be 0 or more")


@dataclass(frozen=True)
class Features:
    """Features of N videos in the order of the data set.

    Args:
        clips: Shape `[N, clips a video, C]`, float32: averages over time and space.
        labels: Shape `[N]`, int64.
        keys: N sample keys.
        classes: Class names by label.
    """

    clips: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    classes: tuple[str, ...]

    def videos(self) -> np.ndarray:
        """Mean over the clips of each video: `[N, C]`."""
        return self.clips.mean(axis=1)


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def extract_features(
    backbone: Backbone,
    reader: ShardReader,
    config: FeatureConfig,
    *,
    world: World,
    device: torch.device,
    network: str,
    cache: Path | None,
) -> Features:
    """Encode every video of a data set. All ranks call it and get the same.

    Args:
        backbone: On the device; put into evaluation mode.
        reader: The data set; all samples labelled.
        config: With size and clip_frames resolved.
        world: This rank and its peers.
        device: Where to compute.
        network: What identifies the weights.
        cache: Folder for features by (network, manifest, protocol); None to compute anew.

    Returns:
        Features in the order of the data set.

    Raises:
        ShardError: The data set has samples without labels, or a sample is missing.
    """
    if (reader.labels < 0).any():
        raise ShardError(
            f"{reader.location} has samples without labels; evaluate on a set with classes"
        )
    # The batch size changes no result, so it is not part of the identity.
    protocol = {k: v for k, v in asdict(config).items() if k != "videos_per_batch"}
    name = _digest({"network": network, "set": reader.manifest.digest, "protocol": protocol})
    path = None if cache is None else cache / f"{name}.safetensors"
    clips = None if path is None else _cached(path)
    if clips is None:
        clips = _encode(backbone, reader, config, world, device)
        if path is not None and world.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file({"clips": clips}, temporary)
            temporary.replace(path)
    # No rank may look into the cache again before it is whole.
    barrier()
    return Features(clips, reader.labels, reader.keys, reader.manifest.classes)


def _cached(path: Path) -> np.ndarray | None:
    # Rank 0 may be ahead of the others: it writes only after a collective that all take part in.
    if not path.is_file():
        return None
    try:
        return load_file(path)["clips"]
    except SafetensorError as error:
        raise ShardError(
            f"cached features {path} are damaged ({error}); delete the file"
        ) from error


@torch.inference_mode()
def _encode(
    backbone: Backbone,
    reader: ShardReader,
    config: FeatureConfig,
    world: World,
    device: torch.device,
) -> np.ndarray:
    backbone.eval()
    in_channels = backbone.input_conv().in_channels
    loader = EvaluationLoader(
        reader,
        DataConfig(
            shards=reader.location,
            size=config.size,
            clips=ClipSpec(clip_frames=config.clip_frames),
        ),
        world=world,
        device=device,
        videos_per_batch=config.videos_per_batch,
        num_clips=config.num_clips,
        stride=config.stride,
    )
    samples: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    shown = tqdm(
        loader, total=len(loader), desc=f"features {reader.name}", disable=not world.is_first
    )
    try:
        for batch in shown:
            flat = normalise(batch.clips.flatten(0, 1), in_channels)
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                maps = getattr(backbone(flat), config.level)
            vectors = maps.float().mean(dim=(2, 3, 4)).unflatten(0, batch.clips.shape[:2])
            parts.append(vectors.cpu().numpy()[batch.valid])
            samples.append(batch.samples[batch.valid])
    finally:
        loader.close()
    gathered = gather_objects((np.concatenate(samples), np.concatenate(parts)))
    order = np.concatenate([s for s, _ in gathered])
    clips = np.concatenate([c for _, c in gathered])
    if not np.array_equal(np.sort(order), np.arange(reader.num_samples)):
        raise ShardError(f"{reader.location}: not every sample was encoded exactly once")
    return clips[np.argsort(order)]
