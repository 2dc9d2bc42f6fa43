"""Frozen features over a data set: every sample exactly once, whatever the number of ranks."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from strata.dataload.labels import check_labels
from strata.dataload.reader import ShardReader
from strata.distributed import World, barrier, gather_objects
from strata.errors import ConfigError, ShardError
from strata.files import open_atomic
from strata.ranges import check_range
from strata.telemetry.metrics import Metrics
from strata.train.models.backbones import LEVELS, Backbone, Level
from strata.train.representation.encode import (
    VideoClips,
    encode_levels,
    inference_precision,
    over_videos,
)

__all__ = ["LEVEL_CHOICES", "FeatureConfig", "Features", "extract_features", "write_features"]

_HASH = "sha256"
LevelChoice = Literal[Level, "all"]
LEVEL_CHOICES: tuple[LevelChoice, ...] = (*LEVELS, "all")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How a video becomes features."""

    num_clips: int = 10
    """Clips placed uniformly along each video. TEXT: 10."""
    stride: int = 1
    """Distance of a clip's neighbouring frames, in source frames."""
    crop: float = 1.0
    """Side of the centre crop over the shorter side of the frame."""
    size: int = 0
    """Rows and columns of a clip; 0 takes what the network was pretrained on. TEXT: 112."""
    clip_frames: int = 0
    """Frames of a clip; 0 takes what the network was pretrained on. TEXT: 16."""
    level: LevelChoice = "high"
    """Which level's maps are averaged over time and space; all joins the three, each clip's vector
    of a level brought to unit length before."""
    videos_per_batch: int = 8
    """Videos that a rank encodes at a time; changes memory, not results."""

    def __post_init__(self) -> None:
        check = partial(check_range, self, prefix="features.")
        check("num_clips", "stride", "videos_per_batch", at_least=1)
        check("crop", above=0, at_most=1)
        check("size", "clip_frames", at_least=0)
        if self.clip_frames % 2:
            raise ConfigError(f"features.clip_frames is {self.clip_frames}; use an even number")

    def clips(self) -> VideoClips:
        """The clips, once size and clip_frames are resolved."""
        return VideoClips(
            num_clips=self.num_clips,
            stride=self.stride,
            crop=self.crop,
            size=self.size,
            clip_frames=self.clip_frames,
            videos_per_batch=self.videos_per_batch,
        )


@dataclass(frozen=True)
class Features:
    """Features of N videos in the order of the data set.

    Args:
        levels: By level, shape `[N, clips a video, C]`, float32: averages over time and space.
        labels: Shape `[N]`, int64.
        keys: N sample keys.
        classes: Class names by label.
    """

    levels: Mapping[str, np.ndarray]
    labels: np.ndarray
    keys: tuple[str, ...]
    classes: tuple[str, ...]

    def clips(self, level: LevelChoice) -> np.ndarray:
        """Features of the clips at a level, `[N, clips a video, C]`; see `FeatureConfig.level`."""
        if level != "all":
            return self.levels[level]
        tiny = np.finfo(np.float32).tiny
        norms = {k: np.linalg.norm(v, axis=2, keepdims=True) for k, v in self.levels.items()}
        unit = [self.levels[k] / np.maximum(norms[k], tiny) for k in LEVELS]
        return np.concatenate(unit, axis=2)

    def videos(self, level: LevelChoice) -> np.ndarray:
        """Mean over the clips of each video: `[N, C]`."""
        return self.clips(level).mean(axis=1)


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
    metrics: Metrics | None = None,
    backwards: bool = False,
) -> Features:
    """Encode every video of a data set. All ranks call it and get the same.

    Args:
        backbone: On the device; put into evaluation mode.
        reader: The data set; all samples labelled.
        config: With size and clip_frames resolved.
        world: This rank and its peers.
        device: Where to compute.
        network: What identifies the weights.
        cache: Folder for features by (network, manifest, protocol); None for no cache.
        metrics: Where to count what was read and decoded.
        backwards: Whether the network sees the clips reversed in time.

    Returns:
        Features of all levels in the order of the data set.

    Raises:
        ShardError: The data set has samples without labels, or a sample does not decode.
    """
    check_labels(reader)
    # Neither the batch size nor the level changes what is computed.
    apart = ("videos_per_batch", "level")
    protocol = {k: v for k, v in asdict(config).items() if k not in apart}
    # The form of the file: with a hash.
    protocol["form"] = 2
    protocol["precision"] = inference_precision(device)
    if backwards:
        protocol["backwards"] = True
    name = _digest({"network": network, "set": reader.manifest.digest, "protocol": protocol})
    path = None if cache is None else cache / f"{name}.safetensors"
    levels = None
    # Only if every rank sees the file; on a disk that is not shared, all compute.
    if path is not None and all(gather_objects(path.is_file())):
        levels = _cached(path, (reader.num_samples, config.num_clips))
    if levels is None:
        backbone.eval()
        levels = over_videos(
            encode_levels(backbone, device, backwards=backwards),
            reader,
            config.clips(),
            world=world,
            device=device,
            shown=f"features {reader.name}",
            metrics=metrics,
        )
        if path is not None and world.is_first:
            _write(levels, path)
    # No rank may look into the cache again before it is complete.
    barrier()
    return Features(levels, reader.labels, reader.keys, reader.manifest.classes)


def _content_hash(levels: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for level in LEVELS:
        digest.update(np.ascontiguousarray(levels[level]).data)
    return digest.hexdigest()


def _write(levels: dict[str, np.ndarray], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as out:
        save_file(levels, out.name, metadata={_HASH: _content_hash(levels)})


def _cached(path: Path, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The features in a file of the cache, `[N, clips a video, C]` float32 each.

    Args:
        path: The file.
        shape: N and clips a video.

    Raises:
        ShardError: The file is not what was written, or not for this data set.
    """
    try:
        with safe_open(path, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
            found = {level: tensors.get_tensor(level) for level in LEVELS}
        for level, values in found.items():
            if values.dtype != np.float32 or values.ndim != 3 or values.shape[:2] != shape:
                raise ValueError(f"{level} has shape {values.shape} and type {values.dtype}")
        if metadata.get(_HASH) != _content_hash(found):
            raise ValueError("the hash of the content differs")
    # TypeError: a type that NumPy does not have.
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ShardError(
            f"cached features {path} are damaged ({error}); delete the file"
        ) from error
    return found


def write_features(features: Features, path: Path) -> None:
    """Export features for use elsewhere, as an .npz file.

    Its arrays are `low`, `mid` and `high` (`[N, clips a video, C]`, float32), `labels` (`[N]`,
    int64), `keys` and `classes` (text).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as out:
        np.savez(
            out,
            allow_pickle=False,
            labels=features.labels,
            keys=np.array(features.keys),
            classes=np.array(features.classes),
            **features.levels,
        )
