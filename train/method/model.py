"""Multi-level feature optimization: from views to features, loss terms and their sum.

Qian et al., ICCV 2021; the equations are in train/losses, one file each, and docs/method.md states
the deviations. Shape suffixes: b videos of this rank, B of the global batch, V = 2 short views,
A alterations, T time steps of a level, L those of the long sequence, C channels, D embedding size,
K prototypes.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from strata.counter_random import Stream, uniforms
from strata.distributed import (
    World,
    gather,
    gather_keeping_own_grad,
    gather_with_grad,
    mean_over_ranks,
)
from strata.errors import ConfigError
from strata.train.engine import ParameterGroup
from strata.train.losses.graph import distribution_graphs, graph_loss
from strata.train.losses.instance import instance_loss
from strata.train.losses.precision import widen
from strata.train.losses.prototypical import hard_labels, prototype_loss, sinkhorn
from strata.train.losses.temporal import augmentation_loss, retrieval_loss
from strata.train.method.schedules import Phase
from strata.train.method.score_queue import ScoreQueue
from strata.train.models.alteration import draw_permutations, time_orders
from strata.train.models.backbones import (
    BackboneConfig,
    Levels,
    LevelStrides,
    build_backbone,
)
from strata.train.models.heads import GlobalHead, StepHead, pool_space
from strata.train.models.inputs import frame_differences
from strata.train.models.motion import MotionExcitation
from strata.train.models.prototypes import Prototypes
from strata.train.monitor.health import (
    alteration_health,
    chance_levels,
    embedding_health,
    graph_health,
    prototype_health,
)

__all__ = [
    "Embeddings",
    "LossTerms",
    "Method",
    "MethodConfig",
    "TermWeights",
    "VideoModel",
    "normalise",
]

Level = Literal["low", "mid", "high"]
_LEVELS: tuple[Level, ...] = ("low", "mid", "high")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_NUM_VIEWS = 3
"""Two short clips and the long sequence."""


@dataclass(frozen=True, kw_only=True)
class TermWeights:
    """Weight of each loss term; 0 disables the term and its head. Default: `paper`."""

    instance: float = 1.0
    """L_ins at the high level."""
    prototype: float = 0.5
    """L_pro at the high level."""
    graph_low: float = 0.3
    """Graph constraint at the low level."""
    graph_mid: float = 0.5
    """Graph constraint at the mid level."""
    graph_high: float = 0.0
    """Graph constraint at the high level; the release has 1."""
    augmentation_low: float = 0.3
    """L_aug at the low level."""
    augmentation_mid: float = 0.5
    """L_aug at the mid level."""
    augmentation_high: float = 0.0
    """L_aug at the high level, with a separate motion excitation. A clip of 16 frames has two steps
    there, which can be reversed but not shuffled (method.shuffle)."""
    retrieval_low: float = 0.3
    """L_ret at the low level."""
    retrieval_mid: float = 0.5
    """L_ret at the mid level."""
    retrieval_high: float = 1.0
    """L_ret at the high level."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A weight is negative, or none is positive.
        """
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"method.weights.{name} is {value}; use 0 or more")
        if not self.instance and not self.prototype:
            raise ConfigError("method.weights: the first stage needs instance or prototype above 0")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of the method; the defaults are the `paper` recipe (method.md Part I)."""

    weights: TermWeights = field(default_factory=TermWeights)
    """Weight of each term."""
    temperature: float = 0.07
    """tau of the contrastive terms. TEXT: 0.07."""
    prototype_temperature: float = 0.1
    """Temperature of the prototype prediction. Release: 0.1."""
    sinkhorn_epsilon: float = 0.05
    """Regularisation of the assignment. Release: 0.05."""
    num_prototypes: int = 1000
    """K. TEXT: 1000."""
    queue_length: int = 1024
    """Length of the queue of scores for Sinkhorn, in videos. TEXT: 1024."""
    graph_threshold: float = 0.05
    """eta of G_ins. TEXT: 0.05."""
    shuffle: bool = True
    """Whether L_aug also has randomly shuffled clips as negatives (TEXT), or reversed ones only."""
    temporal_from_stage: Literal[1, 2] = 2
    """First stage with L_aug and L_ret. TEXT: 2; release: 1."""
    gather_with_grad: bool = True
    """Whether gradient flows to the embeddings of other ranks; in the release it does not."""
    graph_divides_by_batch: bool = False
    """Whether the graph constraint is divided by B once more, as in the release."""
    embedding_size: int = 128
    """D of all heads. Release: 128."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        for name in ("temperature", "prototype_temperature", "sinkhorn_epsilon"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"method.{name} is {getattr(self, name)}; use more than 0")
        for name in ("num_prototypes", "queue_length", "embedding_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name} is {getattr(self, name)}; use 1 or more")
        if not 0 <= self.graph_threshold <= 1:
            raise ConfigError(f"method.graph_threshold is {self.graph_threshold}; use 0 to 1")

    def uses(self, term: str, level: Level) -> bool:
        """Whether a term has a weight at a level."""
        return getattr(self.weights, f"{term}_{level}", 0.0) > 0

    def active(self, stage: int) -> frozenset[str]:
        """Names of the terms of a stage, as in `TermWeights`; others are not computed."""
        first_stage = {
            "instance": 1,
            "prototype": 1,
            "graph": 2,
            "augmentation": self.temporal_from_stage,
            "retrieval": self.temporal_from_stage,
        }
        return frozenset(
            name
            for name, weight in vars(self.weights).items()
            if weight > 0 and stage >= first_stage[name.partition("_")[0]]
        )

    def check_clips(self, clip_frames: int, long_frames: int, strides: LevelStrides) -> None:
        """Check that the short clips' time steps line up with the long sequence's.

        Args:
            clip_frames: Frames of a short clip.
            long_frames: Frames of the long sequence.
            strides: Temporal strides of the encoder's levels.

        Raises:
            ConfigError: The steps cannot be matched for L_ret.
        """
        for level in _LEVELS:
            stride = getattr(strides, level)
            short, long = (-(-frames // stride) for frames in (clip_frames, long_frames))
            pool, rest = divmod(2 * short, long)
            if self.uses("retrieval", level) and (rest or pool == 0 or short % pool):
                raise ConfigError(
                    f"data.clips.clip_frames {clip_frames} gives two short clips of {short} steps "
                    f"at the {level} level and a long one of {long}, which do not line up; use a "
                    "multiple of 8 (of 16 with data.clips.long_stride 2), or "
                    f"method.weights.retrieval_{level} 0"
                )

    def wants_long(self, stage: int) -> bool:
        """Whether a stage needs the long sequence."""
        return any(name.startswith("retrieval_") for name in self.active(stage))


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of a rank's videos; those that the stage does not use are absent."""

    instance: Tensor
    """`[b, V, D]`: for L_ins and the graph."""
    scores: Tensor
    """`[b, V, K]`: cosines with the prototypes."""
    graph: dict[str, Tensor] = field(default_factory=dict)
    """By level, `[b, V, D]`."""
    clips: dict[str, Tensor] = field(default_factory=dict)
    """By level, `[b, V, D]`: the originals for L_aug."""
    altered: dict[str, Tensor] = field(default_factory=dict)
    """By level, `[b, A, V, D]`."""
    steps: dict[str, Tensor] = field(default_factory=dict)
    """By level, `[b, V, T, D]`: the short clips for L_ret."""
    long_steps: dict[str, Tensor] = field(default_factory=dict)
    """By level, `[b, L, D]`: the long clips for L_ret."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The named terms of a step, on the device."""

    total: Tensor
    """Weighted sum; the mean over ranks is the loss of the global batch."""
    terms: dict[str, Tensor]
    """Each term before its weight, detached."""
    health: dict[str, Tensor]
    """Health of the representation, if requested."""


@cache
def _mean_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Constants, cached on the device: a copy in every step would wait each time."""
    mean = torch.tensor(IMAGENET_MEAN, device=device) * 255
    return mean, 1 / (torch.tensor(IMAGENET_STD, device=device) * 255)


def normalise(clips: Tensor, in_channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert decoded clips to the input of the first convolution.

    Args:
        clips: `[N, T, H, W, 3]`, uint8.
        in_channels: 3, or 4 to add a plane of zeros.
        dtype: The dtype of the result.

    Returns:
        `[N, in_channels, T, H, W]`, normalised by ImageNet's mean and deviation; channels stay last
        in memory, so nothing is transposed.
    """
    mean, scale = _mean_and_scale(clips.device)
    values = ((clips - mean) * scale).to(dtype)
    if in_channels > 3:
        values = nn.functional.pad(values, (0, in_channels - 3))
    return values.permute(0, 4, 1, 2, 3)


class VideoModel(nn.Module):
    """Backbone, motion excitation, heads, prototypes and the queue of scores.

    Args:
        backbone: Settings of the encoder.
        config: Settings of the loss terms.
        clip_frames: Frames of a short clip; enough for the alterations, which is checked.

    Raises:
        ConfigError: The clips are too short for the shuffle.
    """

    def __init__(self, backbone: BackboneConfig, config: MethodConfig, clip_frames: int) -> None:
        super().__init__()
        self.config = config
        self.in_channels = backbone.in_channels
        self.time_strides = backbone.time_strides
        self.both_inputs = backbone.input == "both"
        self.backbone = build_backbone(backbone)
        widths, size = self.backbone.widths, config.embedding_size
        self.instance_head = StepHead(widths.high, size, average_steps=True)
        self.global_head = GlobalHead(widths.high, size)
        self.prototypes = Prototypes(config.num_prototypes, size)
        self.queue = ScoreQueue(config.queue_length, config.num_prototypes)
        self.motion = nn.ModuleDict()
        self.augmentation_heads = nn.ModuleDict()
        self.retrieval_heads = nn.ModuleDict()
        self.graph_heads = nn.ModuleDict()
        for level in _LEVELS:
            width = getattr(widths, level)
            used = False
            for term, heads, average in (
                ("augmentation", self.augmentation_heads, True),
                ("retrieval", self.retrieval_heads, False),
                ("graph", self.graph_heads, True),
            ):
                if config.uses(term, level):
                    heads[level] = StepHead(width, size, average_steps=average)
                    used = True
            if used and (level != "high" or config.uses("augmentation", level)):
                self.motion[level] = MotionExcitation(width)
            num_steps = -(-clip_frames // getattr(self.time_strides, level))
            if config.shuffle and config.uses("augmentation", level) and num_steps < 3:
                raise ConfigError(
                    f"data.clips.clip_frames {clip_frames} leaves {num_steps} time steps at the "
                    f"{level} level, too few to shuffle; use more frames, method.shuffle false, or "
                    f"method.weights.augmentation_{level} 0"
                )

    def groups(self) -> list[ParameterGroup]:
        """The groups of parameters that are frozen together."""

        def group(name: str, *modules: nn.Module) -> ParameterGroup:
            return ParameterGroup(name, [p for m in modules for p in m.parameters()])

        groups = [
            group("backbone", self.backbone),
            group("instance", self.instance_head),
            group("global", self.global_head),
            group("prototypes", self.prototypes),
            *(group(f"motion_{level}", module) for level, module in self.motion.items()),
            group("temporal", self.augmentation_heads, self.retrieval_heads),
            group("graph", self.graph_heads),
        ]
        return [g for g in groups if g.parameters]

    def frozen_groups(self, phase: Phase) -> set[str]:
        """The groups that a phase freezes, because none of its terms uses them."""
        active = self.config.active(phase.stage)
        moving = {"backbone"}
        if "instance" in active:
            moving.add("instance")
        if "prototype" in active:
            moving |= {"global"} if phase.prototypes_frozen else {"global", "prototypes"}
        for name in active:
            term, _, level = name.partition("_")
            if level:
                moving |= {"graph" if term == "graph" else "temporal", f"motion_{level}"}
        return {g.name for g in self.groups()} - moving

    def orders(self, samples: np.ndarray, epoch: int, seed: int, clip_frames: int) -> list[Tensor]:
        """Draw the orders of time steps of each level, by sample and view.

        The long sequence has an order too: if it is encoded together with the short clips, its
        altered copies contribute to the statistics of motion excitation.

        Args:
            samples: `[b]`, sample indices.
            epoch: The epoch.
            seed: The run's seed.
            clip_frames: Frames of a short clip.

        Returns:
            For each level: `[1 + A, b (V + 1), T]`, int64, on the CPU: the identity first.
        """
        result = []
        for number, level in enumerate(_LEVELS):
            num_steps = -(-clip_frames // getattr(self.time_strides, level))
            shuffled = None
            if self.config.shuffle and self.config.uses("augmentation", level):
                # Counters of low and mid alternate by view; those of the high level follow.
                counters = [2 * view + number for view in range(_NUM_VIEWS)]
                if level == "high":
                    counters = [2 * _NUM_VIEWS + view for view in range(_NUM_VIEWS)]
                draws = [uniforms(seed, Stream.TIME_ORDER, epoch, samples, c, 2) for c in counters]
                both = torch.from_numpy(np.stack(draws, axis=1).reshape(-1, 2))
                shuffled = draw_permutations(both, num_steps)
            result.append(
                time_orders(
                    _NUM_VIEWS * len(samples), num_steps, reverse=True, permutations_NT=shuffled
                )
            )
        return result

    def forward(
        self,
        short: Tensor,
        long: Tensor | None,
        orders_low: Tensor,
        orders_mid: Tensor,
        orders_high: Tensor,
        phase: Phase,
    ) -> Embeddings:
        """Compute the embeddings of a rank's videos that a phase needs.

        A long sequence of as many frames as a short clip (data.clips.long_stride 2) is encoded in
        one pass with the short clips, as the release does: one set of batch statistics for all
        three, also in the heads and in motion excitation. A longer one has a separate pass.

        Args:
            short: `[b, V, T, S, S, 3]`, uint8.
            long: `[b, L, S, S, 3]`, uint8, or None.
            orders_low: See `orders`.
            orders_mid: See `orders`.
            orders_high: See `orders`.
            phase: Phase of the epoch.

        Returns:
            Embeddings; only the scores are normalised.
        """
        num_videos = short.shape[0]
        active = self.config.active(phase.stage)
        if not self.config.wants_long(phase.stage):
            long = None
        if long is not None and long.shape[1] == short.shape[2]:
            short, long = torch.cat([short, long[:, None]], dim=1), None
        split = (num_videos, short.shape[1])
        maps = self._encode(short.flatten(0, 1), second_of=split[1] if self.both_inputs else 0)
        long_maps = None if long is None else self._encode(long)

        high_steps = pool_space(maps.high)
        scores = self.prototypes(self.global_head(high_steps), frozen=phase.prototypes_frozen)
        result = Embeddings(
            instance=self.instance_head(high_steps).unflatten(0, split)[:, :2],
            scores=scores.unflatten(0, split)[:, :2],
        )
        orders: dict[str, Tensor] = {
            level: order.unflatten(1, (num_videos, _NUM_VIEWS))[:, :, : split[1]].flatten(1, 2)
            for level, order in zip(_LEVELS, (orders_low, orders_mid, orders_high), strict=True)
        }
        for level in _LEVELS:
            terms = {t for t in ("augmentation", "retrieval", "graph") if f"{t}_{level}" in active}
            if not terms:
                continue
            altered = orders[level] if "augmentation" in terms else None
            # [1 + A, b, V or V + 1, T, C], the originals first
            steps = self._steps(level, getattr(maps, level), altered).unflatten(1, split)
            if "augmentation" in terms:
                excited = steps
                if level == "high":
                    # The other terms of this level read its steps without motion excitation.
                    excited = self.motion[level](maps.high, altered).unflatten(1, split)
                embedded = self.augmentation_heads[level](excited[:, :, :2])
                result.clips[level] = embedded[0]
                result.altered[level] = embedded[1:].transpose(0, 1)
            if "graph" in terms:
                result.graph[level] = self.graph_heads[level](steps[0, :, :2])
            if "retrieval" in terms:
                if long_maps is None:
                    long_steps = steps[0, :, 2]
                else:
                    long_steps = self._steps(level, getattr(long_maps, level), None)[0]
                result.steps[level] = self.retrieval_heads[level](steps[0, :, :2])
                result.long_steps[level] = self.retrieval_heads[level](long_steps)
        return result

    def _encode(self, clips: Tensor, second_of: int = 0) -> Levels:
        return self.backbone(self._seen(clips, second_of))

    def _seen(self, clips: Tensor, second_of: int) -> Tensor:
        """Input `[N, T, S, S, 3]` of the encoder; every second of `second_of` as differences."""
        weight = self.backbone.input_conv().weight
        seen = normalise(clips, self.in_channels, weight.dtype)
        if second_of:
            seen[1::second_of] = frame_differences(seen[1::second_of])
        return seen

    def _steps(self, level: Level, maps: Tensor, orders: Tensor | None) -> Tensor:
        """Averages over space, `[A', N, T, C]`; the high level has no motion excitation."""
        if level == "high":
            return pool_space(maps)[None]
        return self.motion[level](maps, orders)


class Method:
    """Computes the loss terms over the global batch from embeddings.

    Args:
        model: The model, which has the queue.
        config: Settings of the method.
        world: This rank and the world size.
    """

    def __init__(self, model: VideoModel, config: MethodConfig, world: World) -> None:
        self._model, self._config, self._world = model, config, world
        self._gather = gather_with_grad if config.gather_with_grad else gather_keeping_own_grad

    def losses(self, out: Embeddings, phase: Phase, *, with_health: bool) -> LossTerms:
        """Compute all terms of a step, outside autocast.

        The queue takes the global batch's scores before the assignment, as in the release.

        Args:
            out: This rank's embeddings.
            phase: Phase of the epoch.
            with_health: Whether to measure the health of the representation too.

        Returns:
            The terms; every rank must call this at every step.
        """
        config = self._config
        num_local = out.instance.shape[0]
        own = slice(self._world.rank * num_local, (self._world.rank + 1) * num_local)
        instance = self._gather(widen(out.instance))

        self._model.queue.push(gather(widen(out.scores)))
        num_rows = len(self._model.queue) if phase.queue else num_local * self._world.size
        rows = self._model.queue.rows()[-num_rows:]
        assignments = sinkhorn(rows, epsilon=config.sinkhorn_epsilon)
        batch_assignments = assignments[-num_local * self._world.size :]

        terms = {
            "instance": instance_loss(instance, temperature=config.temperature, anchors=own),
            "prototype": prototype_loss(
                out.scores, batch_assignments[own], temperature=config.prototype_temperature
            ),
        }
        health: dict[str, Tensor] = {}
        if out.graph or with_health:
            graphs = distribution_graphs(
                instance.detach(),
                hard_labels(batch_assignments),
                temperature=config.temperature,
                threshold=config.graph_threshold,
            )
            for level, embedded in out.graph.items():
                terms[f"graph_{level}"] = graph_loss(
                    self._gather(widen(embedded)),
                    graphs.target_BB,
                    temperature=config.temperature,
                    anchors=own,
                    divide_by_batch=config.graph_divides_by_batch,
                )
            if with_health:
                health |= graph_health(graphs) | prototype_health(rows, assignments)
                health |= embedding_health(instance.detach().flatten(0, 1))
        for level, clips in out.clips.items():
            terms[f"augmentation_{level}"] = augmentation_loss(
                self._gather(widen(clips)),
                out.altered[level],
                temperature=config.temperature,
                anchors=own,
            )
            if with_health:
                cosines = alteration_health(clips.detach(), out.altered[level].detach())
                health |= {f"{name}_{level}": value for name, value in cosines.items()}
        for level, long_steps in out.long_steps.items():
            terms[f"retrieval_{level}"] = retrieval_loss(
                out.steps[level], long_steps, temperature=config.temperature
            )
        weights = {name: w for name, w in vars(config.weights).items() if w > 0}
        terms = {name: value for name, value in terms.items() if name in weights}
        weighted = [weights[name] * value for name, value in terms.items()]
        return LossTerms(
            total=torch.stack(weighted).sum(),
            terms={name: value.detach() for name, value in terms.items()},
            health=health,
        )

    def chance(self, num_videos: int, clip_frames: int, long_frames: int) -> dict[str, float]:
        """Value of each term at chance, in nats, by name."""
        by_kind = chance_levels(
            num_videos=num_videos,
            num_prototypes=self._config.num_prototypes,
            num_alterations=2 if self._config.shuffle else 1,
            num_long_steps={
                v: -(-long_frames // getattr(self._model.time_strides, v)) for v in _LEVELS
            },
            divide_by_batch=self._config.graph_divides_by_batch,
        )
        chance = {"instance": by_kind["instance"], "prototype": by_kind["prototype"]}
        for level in _LEVELS:
            chance[f"graph_{level}"] = by_kind["graph"]
            chance[f"augmentation_{level}"] = by_kind["augmentation"]
            chance[f"retrieval_{level}"] = by_kind[f"retrieval_{level}"]
        return {k: v for k, v in chance.items() if getattr(self._config.weights, k, 0.0) > 0}

    @staticmethod
    def averaged(values: dict[str, Tensor]) -> dict[str, float]:
        """Mean over ranks of named scalars, on the host, by one transfer. All ranks call it."""
        if not values:
            return {}
        mean = mean_over_ranks(torch.stack([v.float() for v in values.values()])).tolist()
        return dict(zip(values, mean, strict=True))
