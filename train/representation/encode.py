"""Run a network over every video of a set exactly once, on any number of ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from strata.dataload.clips import ClipSpec
from strata.dataload.config import DataConfig
from strata.dataload.loader import EvaluationLoader
from strata.dataload.reader import ShardReader
from strata.distributed import World, gather_objects
from strata.errors import ShardError
from strata.logs import progress_bar
from strata.ranges import check_range
from strata.telemetry.metrics import Metrics
from strata.train.models.backbones import LEVELS, Backbone
from strata.train.models.inputs import normalise

__all__ = [
    "VideoClips",
    "encode_levels",
    "inference_autocast",
    "inference_precision",
    "over_videos",
]


@dataclass(frozen=True, kw_only=True)
class VideoClips:
    """Settings of the clips of a video for evaluation."""

    num_clips: int
    """Number of clips, placed uniformly: the first at the video's start, the last at its end."""
    stride: int
    """Distance of a clip's consecutive frames, in source frames."""
    size: int
    """Rows and columns."""
    clip_frames: int
    """Frames of a clip, an even number."""
    crop: float = 1.0
    """Side of a crop over the shorter side of the frame."""
    num_crops: Literal[1, 10] = 1
    """1: the centre. 10: the centre and the corners, each also mirrored."""
    videos_per_batch: int
    """Videos that a rank encodes at a time; changes memory, not results."""

    def __post_init__(self) -> None:
        counts = ("num_clips", "stride", "size", "clip_frames", "videos_per_batch")
        check_range(self, *counts, prefix="test clips: ", at_least=1)
        check_range(self, "crop", prefix="test clips: ", above=0, at_most=1)


def inference_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """In what a network is evaluated: bfloat16 by autocast on a GPU, else float32."""
    return "bf16" if device.type == "cuda" else "fp32"


def inference_autocast(device: torch.device) -> torch.autocast:
    """While entered, forward passes have `inference_precision`."""
    enabled = inference_precision(device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.inference_mode()
def over_videos(
    compute: Callable[[Tensor], Mapping[str, Tensor]],
    reader: ShardReader,
    clips: VideoClips,
    *,
    world: World,
    device: torch.device,
    shown: str | None,
    metrics: Metrics | None = None,
) -> dict[str, np.ndarray]:
    """Compute a function of every video. All ranks call it and get the same result.

    The videos are divided among ranks; padding of the last batch is dropped after gathering.

    Args:
        compute: Function of uint8 `[n, clips per video, T, S, S, 3]` to tensors of n rows.
        reader: The data set.
        clips: Settings of the clips.
        world: This rank and the world size.
        device: The device to compute on.
        shown: Text of the progress bar of rank 0; None for no bar.
        metrics: Receives the counts of read and decoded data.

    Returns:
        Tensors by name, one row per video, in the order of the data set.

    Raises:
        ShardError: A video does not decode, or was not computed exactly once.
    """
    loader = EvaluationLoader(
        reader,
        DataConfig(
            shards=reader.location,
            size=clips.size,
            clips=ClipSpec(clip_frames=clips.clip_frames),
        ),
        world=world,
        device=device,
        videos_per_batch=clips.videos_per_batch,
        num_clips=clips.num_clips,
        stride=clips.stride,
        crop=clips.crop,
        num_crops=clips.num_crops,
    )
    samples: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {}
    hidden = shown is None or not world.is_first
    with loader:
        for batch in progress_bar(loader, total=len(loader), desc=shown, disable=hidden):
            for name, value in compute(batch.clips).items():
                parts.setdefault(name, []).append(value.float().cpu().numpy()[batch.valid])
            samples.append(batch.samples[batch.valid])
            if metrics is not None:
                num = int(batch.valid.sum())
                metrics.add("strata_samples_total", num)
                metrics.add("strata_clips_total", num * clips.num_clips * clips.num_crops)
                metrics.add("strata_frames_decoded_total", batch.frames_decoded)
                metrics.add("strata_bytes_read_total", batch.bytes_read)
    mine = {name: np.concatenate(rows) for name, rows in parts.items()}
    gathered = gather_objects((np.concatenate(samples), mine))
    order = np.concatenate([s for s, _ in gathered])
    if not np.array_equal(np.sort(order), np.arange(reader.num_samples)):
        raise ShardError(f"{reader.location}: not every sample was computed exactly once")
    place = np.argsort(order)
    return {name: np.concatenate([p[name] for _, p in gathered])[place] for name in mine}


def encode_levels(
    backbone: Backbone, device: torch.device, *, backwards: bool = False
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Make a function for `over_videos`: each level's average over time and space per clip.

    Args:
        backbone: The encoder, on the device and in evaluation mode.
        device: The device of the encoder.
        backwards: Whether clips are reversed in time.

    Returns:
        A function from clips to `[n, clips per video, C]` by level, float32.
    """
    in_channels = backbone.in_channels

    def compute(clips: Tensor) -> dict[str, Tensor]:
        flat = clips.flatten(0, 1)
        flat = normalise(flat.flip(1) if backwards else flat, in_channels)
        with inference_autocast(device):
            maps = backbone(flat)
        return {
            level: getattr(maps, level).float().mean(dim=(2, 3, 4)).unflatten(0, clips.shape[:2])
            for level in LEVELS
        }

    return compute
