"""What L_aug and L_ret teach about time: `python tools/bench.py temporal --help`.

Generated videos whose appearance differs from video to video and whose motion alone decides the
class. Small networks are trained on them with and without the temporal terms (TEXT Table 3), and
linear probes read direction, pace and order from each level's features, before motion excitation
and after. Deterministic on one thread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from strata.distributed import World
from strata.errors import ConfigError
from strata.tools.benchmarks.measure import (
    append_record,
    machine,
    machine_line,
    parse_options,
    require_known,
    table,
)
from strata.train.method.model import VideoModel
from strata.train.method.objective import LossTerms, Method
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.models.backbones import BackboneConfig
from strata.train.models.heads import pool_space
from strata.train.models.inputs import normalise

__all__ = [
    "ARMS",
    "QUESTIONS",
    "Moving",
    "main",
    "moving_videos",
    "probes",
    "small_model",
    "train_on",
]

_NO_AUG = {"augmentation_low": 0.0, "augmentation_mid": 0.0}
_NO_RET = {"retrieval_low": 0.0, "retrieval_mid": 0.0, "retrieval_high": 0.0}
ARMS: dict[str, dict[str, float]] = {
    "untrained": {},
    "neither": _NO_AUG | _NO_RET,
    "L_aug": _NO_RET,
    "L_ret": _NO_AUG,
    "both": {},
}
"""Weights that differ from the `paper` recipe's. Motion excitation is in all: the graph uses it."""

QUESTIONS = {
    "direction": 0.25,
    "pace": 0.5,
    "reversed clip": 0.5,
    "reversed maps": 0.5,
    "reversed maps, still clip": 0.5,
}
"""What the linear probes predict, and the accuracy of chance."""

_CLIP = 16
_PHASE = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)
_SETTLE = 30
"""Batches that set the statistics of an untrained network's batch norms."""


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


def replicate_in_time(model: VideoModel) -> None:
    """Pad the encoder's convolutions in time by repeating the first and last step, not by zeros.

    This is the control for what L_aug can read at the ends: zeros distinguish the first steps from
    the last.
    """
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
            time, rows, columns = module.padding
            beyond = [0, 0, 0, 0, int(time), int(time)]
            module.padding = (0, int(rows), int(columns))

            def repeat(_: nn.Module, args: tuple[Tensor], beyond: list[int] = beyond) -> Tensor:
                return functional.pad(args[0], beyond, mode="replicate")

            module.register_forward_pre_hook(repeat)


def train_on(
    model: VideoModel, *, steps: int, batch: int, size: int, seed: int, lr: float = 3e-3
) -> list[LossTerms]:
    """Train on new videos at every step, all terms of the model's config from the first.

    Returns:
        Each step's terms, with the health of the representation.
    """
    method = Method(model, model.config, World())
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    history: list[LossTerms] = []
    for step in range(steps):
        out = _embed(model, batch=batch, size=size, seed=seed, step=step)
        terms = method.losses(out, _PHASE, with_health=True)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append(terms)
    return history


def _embed(model: VideoModel, *, batch: int, size: int, seed: int, step: int) -> Any:
    number = 1_000_000 * (seed + 1) + step
    clips = moving_videos(batch, size=size, frames=2 * _CLIP, seed=number).clips
    orders = model.orders(np.arange(batch) + batch * step, 0, seed, _CLIP)
    long = clips if model.config.wants_long(_PHASE.stage) else None
    return model(clips.unflatten(1, (2, _CLIP)), long, *orders, _PHASE)


def small_model(
    weights: TermWeights, *, shuffle: bool = True, width: int = 8, seed: int = 0
) -> VideoModel:
    """An R3D-18 of few channels with the method's branches, initialised from a seed."""
    config = MethodConfig(
        weights=weights, num_prototypes=16, queue_length=64, embedding_size=32, shuffle=shuffle
    )
    torch.manual_seed(seed)
    return VideoModel(BackboneConfig(width=width), config, clip_frames=_CLIP)


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
        `[N, ...]` by name: of each level the average over time, of low and mid also that of motion
        excitation's output, and of each level the steps side by side.
    """
    model.eval()
    parts: list[dict[str, Tensor]] = []
    for some in clips.split(128):
        maps = model.backbone(normalise(some, model.in_channels))._asdict()
        if reverse_maps:
            maps = {level: values.flip(2) for level, values in maps.items()}
        steps = {level: pool_space(values) for level, values in maps.items()}
        part = {level: values.mean(dim=1) for level, values in steps.items()}
        for level in model.motion:
            part[f"{level}, excited"] = model.motion[level](maps[level])[0].mean(dim=1)
        part |= {f"{level}, each step": values.flatten(1) for level, values in steps.items()}
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
        still = clips[:, _CLIP // 2, None].expand_as(clips)
        features = {
            "as it is": features_of(model, clips),
            "reversed": features_of(model, clips.flip(1)),
            "maps reversed": features_of(model, clips, reverse_maps=True),
            "still": features_of(model, still),
            "still, maps reversed": features_of(model, still, reverse_maps=True),
        }
        sets.append((made, features))
    (train, seen), (test, unseen) = sets
    order = torch.arange(2).repeat_interleave(videos)

    def order_of(one: str, other: str, name: str) -> float:
        pairs = (torch.cat([part[one][name], part[other][name]]) for part in (seen, unseen))
        return probe(next(pairs), order, next(pairs), order)

    found: dict[str, dict[str, float]] = {question: {} for question in QUESTIONS}
    for name in seen["as it is"]:
        x, y = seen["as it is"][name], unseen["as it is"][name]
        found["direction"][name] = probe(x, train.direction, y, test.direction)
        found["pace"][name] = probe(x, train.pace, y, test.pace)
        found["reversed clip"][name] = order_of("as it is", "reversed", name)
        found["reversed maps"][name] = order_of("as it is", "maps reversed", name)
        found["reversed maps, still clip"][name] = order_of("still", "still, maps reversed", name)
    return found


def accuracy_table(records: Sequence[dict[str, Any]], arms: Sequence[str]) -> str:
    """Accuracies in percent as a Markdown table: mean over seeds (lowest to highest)."""
    rows = []
    for question, chance in QUESTIONS.items():
        for name in records[0]["probes"][question]:
            if question.startswith("reversed maps") and "excited" not in name:
                continue  # The average over time is the same, and of steps it is no question.
            cells = []
            for arm in arms:
                found = [100 * r["probes"][question][name] for r in records if r["arm"] == arm]
                spread = f" ({min(found):.0f} to {max(found):.0f})" if len(found) > 1 else ""
                cells.append(f"{np.mean(found):.1f}{spread}")
            rows.append([f"{question} ({chance:.0%})", name, *cells])
    return table(["question (chance)", "features", *arms], rows)


@dataclass(frozen=True, kw_only=True)
class TemporalOptions:
    """What L_aug and L_ret teach about time, on generated videos."""

    arms: tuple[str, ...] = ("untrained", "neither", "both")
    """Which terms a network is trained with: untrained, neither, L_aug, L_ret, both."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the networks and of their videos."""
    steps: int = 150
    """Training steps."""
    batch: int = 12
    """Videos of a step."""
    size: int = 24
    """Rows and columns."""
    width: int = 8
    """Channels of the encoder's stem."""
    videos: int = 384
    """Videos that a probe learns from, and as many again to test it."""
    padding: Literal["zeros", "replicate"] = "zeros"
    """How the convolutions are padded in time."""
    out: Path | None = None
    """JSON lines to append to."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        require_known("arm", self.arms, list(ARMS))
        if min(self.steps, self.videos) < 1 or self.batch < 2:
            raise ConfigError("steps and videos must be 1 or more and batch 2 or more")


def measure(arm: str, seed: int, options: TemporalOptions) -> dict[str, Any]:
    """Train one network and probe it."""
    model = small_model(TermWeights(**ARMS[arm]), width=options.width, seed=seed)
    if options.padding == "replicate":
        replicate_in_time(model)
    last: list[LossTerms] = []
    if arm == "untrained":
        with torch.no_grad():
            for step in range(_SETTLE):
                _embed(model, batch=options.batch, size=options.size, seed=seed, step=step)
    else:
        history = train_on(
            model, steps=options.steps, batch=options.batch, size=options.size, seed=seed
        )
        last = history[-10:]
    terms = [{**step.terms, **step.health} for step in last]
    return {
        "arm": arm,
        "seed": seed,
        "padding": options.padding,
        "terms": {n: float(np.mean([float(t[n]) for t in terms])) for n in (terms or [{}])[0]},
        "probes": probes(model, videos=options.videos, size=options.size),
    }


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: An option is out of its range.
    """
    options = parse_options(TemporalOptions, argv, "temporal")
    torch.set_num_threads(1)
    print(machine_line(machine()))
    records = []
    for seed in options.seeds:
        for arm in options.arms:
            records.append(measure(arm, seed, options))
            append_record(options.out, records[-1])
    print(accuracy_table(records, options.arms))
