"""Where a frozen network sees the direction of time: a head on a level's maps, its activations.

A linear head without bias separates clips from the same clips with reversed frames. It acts on the
average of a level's map over time and space. Its weights applied at each place of the map are a
class activation map (Zhou et al., CVPR 2016, arXiv 1512.04150, section 2) whose mean is the head's
logit: without bias the map contains the complete logit. The backbone's convolutions see the order
of frames, so the average can distinguish a reversed clip. The reversed clip goes through the
complete network, since a map that is reversed afterwards has the same average.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from strata.dataload.clips import ClipSpec
from strata.dataload.config import DataConfig
from strata.dataload.loader import EvaluationLoader
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.eval.pictures import contact_sheet
from strata.ranges import check_range
from strata.train.models.backbones import Backbone
from strata.train.models.inputs import normalise
from strata.train.representation.encode import VideoClips, inference_autocast

__all__ = [
    "CamConfig",
    "VideoCam",
    "activation_maps",
    "direction_accuracy",
    "fit_direction_head",
    "overlay",
    "shown_samples",
    "video_cam",
]

_RED, _BLUE = (222.0, 45.0, 38.0), (33.0, 102.0, 205.0)
_OPACITY = 0.75
_ZOOM = 2
_SHEET_FRAMES, _SHEET_PIXELS = 8, 96
"""Frames in a row of a sheet, and their least rows and columns."""


@dataclass(frozen=True, kw_only=True)
class CamConfig:
    """Settings of the head and of the shown videos."""

    weight_decay: float = 1e-3
    """L2 penalty on the head, whose features are scaled to a mean square of 1 for each channel."""
    videos: int = 8
    """Test videos that are shown, evenly spaced in the set."""
    max_clips: int = 32
    """Clips of a video that are shown, at most. Up to here they cover the video without gaps (at
    stride 1); of a longer one, this many clips placed uniformly."""

    def __post_init__(self) -> None:
        # Without a penalty the head may have no solution, or several.
        check_range(self, "weight_decay", prefix="cam.", above=0)
        check_range(self, "videos", "max_clips", prefix="cam.", at_least=1)


def fit_direction_head(
    originals: np.ndarray, backwards: np.ndarray, weight_decay: float
) -> np.ndarray:
    """Fit logistic regression without intercept; the loss is convex with a single minimum.

    Args:
        originals: Shape `[N, C]`: features of clips.
        backwards: Shape `[N, C]`: of the same clips reversed in time.
        weight_decay: See `CamConfig`.

    Returns:
        Shape `[C]`, float64: for the features as they are. Above 0 speaks for the original.
    """
    features = np.concatenate([originals, backwards]).astype(np.float64)
    scale = np.sqrt(np.square(features).mean(axis=0))
    scale[scale == 0] = 1.0
    rows = torch.from_numpy(features / scale)
    signs = torch.ones(len(rows), dtype=torch.float64)
    signs[len(originals) :] = -1
    weight = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=1000,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.softplus(-signs * (rows @ weight)).mean()
        value = value + 0.5 * weight_decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach().numpy() / scale


def direction_accuracy(
    weight: np.ndarray, originals: np.ndarray, backwards: np.ndarray
) -> dict[str, float]:
    """How often the direction is predicted correctly; every clip counts once in each direction.

    Args:
        weight: Shape `[C]`.
        originals: Shape `[N, clips, C]`.
        backwards: Shape `[N, clips, C]`.

    Returns:
        `clips`, and `videos` by the mean of their clips' logits.
    """
    logits = [features.astype(np.float64) @ weight for features in (originals, backwards)]
    # A logit of 0 is a guess, right in one of the two directions.
    return {
        "clips": float(((logits[0] > 0).mean() + (logits[1] <= 0).mean()) / 2),
        "videos": float(((logits[0].mean(1) > 0).mean() + (logits[1].mean(1) <= 0).mean()) / 2),
    }


@torch.inference_mode()
def activation_maps(
    backbone: Backbone, clips: Tensor, weight: np.ndarray, level: str, *, backwards: bool
) -> Tensor:
    """The head's class activation maps of clips.

    Args:
        backbone: In evaluation mode.
        clips: uint8 `[n, T, S, S, 3]`, on the backbone's device.
        weight: Shape `[C]`: the head.
        level: `low`, `mid` or `high`: the map that it acts upon.
        backwards: Whether the network sees the clips reversed in time.

    Returns:
        Shape `[n, t, h, w]`, float32, in the order of the clips' own frames in both cases; the mean
        over t, h and w is the logit.
    """
    seen = clips.flip(1) if backwards else clips
    with inference_autocast(clips.device):
        maps = getattr(backbone(normalise(seen, backbone.in_channels)), level)
    head = torch.from_numpy(weight).to(maps.device, torch.float32)
    cam = torch.einsum("ncthw,c->nthw", maps.float(), head)
    return cam.flip(1) if backwards else cam


def overlay(frames: np.ndarray, heat: np.ndarray, top: float) -> np.ndarray:
    """Frames in gray with a map over them: red above 0, blue below, the stronger the denser.

    Args:
        frames: Shape `[T, S, S, 3]`, uint8.
        heat: Shape `[T, S, S]`.
        top: The absolute value that is shown at full density.

    Returns:
        Shape `[T, S, S, 3]`, uint8.
    """
    gray = frames.mean(axis=3, keepdims=True)
    density = (_OPACITY * np.minimum(np.abs(heat) / max(top, 1e-12), 1.0))[..., None]
    colour = np.where(heat[..., None] > 0, np.array(_RED), np.array(_BLUE))
    return np.rint(gray * (1 - density) + colour * density).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class VideoCam:
    """A video with its maps; F frames, each once, in order."""

    frames: np.ndarray
    """Shape `[F, S, S, 3]`, uint8: all that a clip holds."""
    places: np.ndarray
    """Shape `[F]`: their numbers in the stored video."""
    heat: np.ndarray
    """Shape `[2, F, S, S]`, float32: maps of the original and of the reversed clips, in the order
    of the frames; where clips overlap, their mean."""
    logits: np.ndarray
    """Shape `[2, clips]`."""
    middle: tuple[int, int]
    """First row of `frames` of the clip in the middle of the video, and the one after its last."""

    @property
    def top(self) -> float:
        """The absolute value that is shown at full density: 99 % of the maps are below."""
        return float(np.quantile(np.abs(self.heat), 0.99))

    def rows(self) -> list[np.ndarray]:
        """The frames; with the original's map; with the reversed one's. `[F, S, S, 3]` each."""
        return [self.frames, *(overlay(self.frames, heat, self.top) for heat in self.heat)]

    def video(self) -> np.ndarray:
        """The three side by side, enlarged: `[F, rows, columns, 3]`, uint8."""
        joined = np.concatenate(self.rows(), axis=2)
        return joined.repeat(_ZOOM, axis=1).repeat(_ZOOM, axis=2)

    def sheet(self, title: str) -> Image.Image:
        """Frames of the middle clip above both maps."""
        first, end = self.middle
        chosen = np.unique(np.linspace(first, end - 1, _SHEET_FRAMES).round().astype(int))
        middle = self.logits[:, self.logits.shape[1] // 2]
        captions = (
            "frames of the clip in the middle",
            f"clip as it is: logit {middle[0]:+.2f}, right if above 0",
            f"reversed (shown in the order above): logit {middle[1]:+.2f}, right if below 0",
        )
        zoom = -(-_SHEET_PIXELS // self.frames.shape[1])
        parts = [
            (caption, rows[chosen].repeat(zoom, axis=1).repeat(zoom, axis=2))
            for caption, rows in zip(captions, self.rows(), strict=True)
        ]
        return contact_sheet(parts, title, len(chosen))


def video_cam(
    backbone: Backbone,
    reader: ShardReader,
    sample: int,
    clips: VideoClips,
    weight: np.ndarray,
    level: str,
    *,
    max_clips: int,
    device: torch.device,
) -> VideoCam:
    """The maps of one video, from clips that cover it. One rank alone calls it.

    Args:
        backbone: On the device, in evaluation mode.
        reader: The data set.
        sample: Which video.
        clips: Size, frames and stride of a clip; their number follows from the video's length.
        weight: Shape `[C]`: the head.
        level: The map that it acts upon.
        max_clips: See `CamConfig`.
        device: Where to compute.

    Raises:
        ShardError: The video does not decode.
    """
    span = (clips.clip_frames - 1) * clips.stride + 1
    num_clips = min(-(-int(reader.num_frames[sample]) // span), max_clips)
    spec = ClipSpec(clip_frames=clips.clip_frames)
    loader = EvaluationLoader(
        reader,
        DataConfig(shards=reader.location, size=clips.size, clips=spec),
        world=World(),
        device=device,
        videos_per_batch=1,
        num_clips=num_clips,
        stride=clips.stride,
        samples=[sample],
    )
    with loader:
        (batch,) = loader
    (numbers,) = loader.frames_of([sample])
    pixels = batch.clips[0]
    heat, logits = [], []
    for backwards in (False, True):
        maps = torch.cat(
            [
                activation_maps(backbone, part, weight, level, backwards=backwards)
                for part in pixels.split(clips.videos_per_batch)
            ]
        )
        logits.append(maps.mean(dim=(1, 2, 3)).cpu().numpy())
        size = tuple(pixels.shape[1:4])
        wide = functional.interpolate(maps.unsqueeze(1), size=size, mode="trilinear")
        heat.append(wide.squeeze(1).flatten(0, 1).cpu().numpy())
    return _joined(pixels.flatten(0, 1).cpu().numpy(), np.stack(heat), numbers, np.stack(logits))


def _joined(
    pixels: np.ndarray, heat: np.ndarray, numbers: np.ndarray, logits: np.ndarray
) -> VideoCam:
    """Clips as one video: each frame once, maps averaged where clips overlap."""
    flat = numbers.reshape(-1)
    places, first, where, counts = np.unique(
        flat, return_index=True, return_inverse=True, return_counts=True
    )
    summed = np.zeros((2, len(places), *heat.shape[2:]), np.float32)
    for way in range(2):
        np.add.at(summed[way], where, heat[way])
    middle = np.searchsorted(places, numbers[len(numbers) // 2])
    return VideoCam(
        frames=pixels[first],
        places=places,
        heat=summed / counts[:, None, None].astype(np.float32),
        logits=logits,
        middle=(int(middle[0]), int(middle[-1]) + 1),
    )


def shown_samples(num_samples: int, count: int) -> Sequence[int]:
    """Videos evenly spaced in a set."""
    return np.unique(np.linspace(0, num_samples - 1, count).round().astype(int)).tolist()
