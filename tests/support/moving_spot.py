"""Generated videos whose motion alone decides the class, and what a network's features know of it.

Appearance differs from video to video. Small networks are trained on the videos, and linear probes
read direction, pace and order from their features. Deterministic on one thread.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from strata.distributed import World
from strata.train.method.model import VideoModel
from strata.train.method.objective import LossTerms, Method
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.models.backbones import BackboneConfig
from strata.train.models.heads import pool_space
from strata.train.models.inputs import normalise

_CLIP = 16
_PHASE = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)


class Moving(NamedTuple):
    """Generated videos and what their motion is."""

    clips: Tensor
    """`[B, frames, size, size, 3]`, uint8."""
    direction: Tensor
    """`[B]`, int64: in which of four directions the spot moves."""
    pace: Tensor
    """`[B]`, int64: 0 slow, 1 fast."""


def moving_videos(num_videos: int, *, size: int = 24, frames: int = 32, seed: int = 0) -> Moving:
    """A spot that slows down and grows on a still background: time has an arrow.

    Background, colour and place are drawn independently of the motion.

    Args:
        num_videos: B.
        size: Rows and columns.
        frames: Of a video.
        seed: Of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    coarse = uniform(num_videos, 3, 4, 4) * 0.6
    background = functional.interpolate(coarse, (size, size), mode="bilinear")
    colour = 0.4 + 0.6 * uniform(num_videos, 3)
    direction = torch.randint(0, 4, (num_videos,), generator=generator)
    pace = torch.randint(0, 2, (num_videos,), generator=generator)
    angle = direction * math.pi / 2 + 0.6 * (uniform(num_videos) - 0.5)
    heading = torch.stack([angle.sin(), angle.cos()], dim=1)
    reach = 0.35 + 0.35 * pace + 0.2 * uniform(num_videos)
    centre = 0.35 + 0.3 * uniform(num_videos, 2)
    decay = torch.exp(-3 * torch.linspace(0, 1, frames))
    travel = (1 - decay) / (1 - math.exp(-3)) - 0.5
    place = centre[:, None] + (heading * reach[:, None])[:, None] * travel[None, :, None]
    radius = torch.linspace(0.08, 0.16, frames)
    at = torch.linspace(0, 1, size)
    rows = (at - place[:, :, 0, None]).square()
    columns = (at - place[:, :, 1, None]).square()
    distance = rows[:, :, :, None] + columns[:, :, None, :]
    spot = torch.exp(-distance / (2 * radius.square()[:, None, None]))[:, :, None]
    clips = background[:, None] * (1 - spot) + colour[:, None, :, None, None] * spot
    clips = clips + 0.02 * torch.randn(clips.shape, generator=generator)
    pixels = (clips.clamp(0, 1) * 255).round().to(torch.uint8)
    return Moving(pixels.permute(0, 1, 3, 4, 2).contiguous(), direction, pace)


def small_model(
    weights: TermWeights, *, shuffle: bool = True, width: int = 8, seed: int = 0
) -> VideoModel:
    """An R3D-18 of few channels with the method's branches, initialised from a seed."""
    config = MethodConfig(
        weights=weights, num_prototypes=16, queue_length=64, embedding_size=32, shuffle=shuffle
    )
    torch.manual_seed(seed)
    return VideoModel(BackboneConfig(width=width), config, clip_frames=_CLIP)


def train_on(model: VideoModel, *, steps: int, batch: int, size: int) -> list[LossTerms]:
    """Train on new videos at every step, all terms of the model's config from the first.

    Returns:
        Each step's terms, with the health of the representation.
    """
    method = Method(model, model.config, World())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history: list[LossTerms] = []
    for step in range(steps):
        clips = moving_videos(batch, size=size, frames=2 * _CLIP, seed=1_000_000 + step).clips
        orders = model.orders(np.arange(batch) + batch * step, 0, 0, _CLIP)
        long = clips if model.config.wants_long(_PHASE.stage) else None
        out = model(clips.unflatten(1, (2, _CLIP)), long, *orders, _PHASE)
        terms = method.losses(out, _PHASE, with_health=True)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append(terms)
    return history


@torch.no_grad()
def features_of(
    model: VideoModel, clips: Tensor, *, reverse_maps: bool = False
) -> dict[str, Tensor]:
    """The features of short clips that a probe reads, in evaluation mode.

    Args:
        model: Trained or not.
        clips: `[N, T, S, S, 3]`, uint8.
        reverse_maps: Whether the feature maps are reversed in time first, as L_aug does it.

    Returns:
        `[N, ...]` by name: of each level the average over time, and the steps side by side.
    """
    model.eval()
    maps = model.backbone(normalise(clips, model.in_channels))._asdict()
    if reverse_maps:
        maps = {level: values.flip(2) for level, values in maps.items()}
    steps = {level: pool_space(values) for level, values in maps.items()}
    averages = {level: values.mean(dim=1) for level, values in steps.items()}
    return averages | {f"{level}, each step": values.flatten(1) for level, values in steps.items()}


def probe(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a linear probe: least squares to one-hot labels, a ridge of 0.01.

    Features are standardised by the training half's statistics. The solution is unique and not
    random.
    """
    train, test = train.double(), test.double()
    mean, scale = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    targets = functional.one_hot(labels).double()
    offset = targets.mean(dim=0)
    ridge = 1e-2 * torch.eye(train.shape[1], dtype=torch.float64)
    gram, cross = train.T @ train / len(train), train.T @ (targets - offset) / len(train)
    guess = (test @ torch.linalg.solve(gram + ridge, cross) + offset).argmax(dim=1)
    return float((guess == test_labels).double().mean())


def probes(model: VideoModel, *, videos: int, size: int) -> dict[str, dict[str, float]]:
    """Accuracies by question and by features; a probe is tested on videos that it did not learn.

    A video gives one clip: alternately its first and its second half.
    """
    sets = []
    for seed in (1, 2):
        made = moving_videos(videos, size=size, frames=2 * _CLIP, seed=seed)
        halves = made.clips.unflatten(1, (2, _CLIP))
        clips = halves[torch.arange(videos), torch.arange(videos) % 2]
        features = {
            "as it is": features_of(model, clips),
            "reversed": features_of(model, clips.flip(1)),
            "maps reversed": features_of(model, clips, reverse_maps=True),
        }
        sets.append((made, features))
    (train, seen), (test, unseen) = sets
    order = torch.arange(2).repeat_interleave(videos)

    def order_of(other: str, name: str) -> float:
        pairs = (torch.cat([part["as it is"][name], part[other][name]]) for part in (seen, unseen))
        return probe(next(pairs), order, next(pairs), order)

    found: dict[str, dict[str, float]] = {"direction": {}, "reversed clip": {}, "reversed maps": {}}
    for name in seen["as it is"]:
        x, y = seen["as it is"][name], unseen["as it is"][name]
        found["direction"][name] = probe(x, train.direction, y, test.direction)
        found["reversed clip"][name] = order_of("reversed", name)
        found["reversed maps"][name] = order_of("maps reversed", name)
    return found
