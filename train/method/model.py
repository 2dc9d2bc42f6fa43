"""From views to embeddings.

Qian et al., ICCV 2021; docs/method.md states the deviations. Shape suffixes: b videos of this
rank, V = 2 short views, A alterations, T time steps of a level, L those of the long sequence, C
channels, D embedding size, K prototypes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from strata.counter_random import Stream, uniforms
from strata.errors import ConfigError
from strata.train.engine_config import ParameterGroup
from strata.train.method.schedules import Phase
from strata.train.method.score_queue import ScoreQueue
from strata.train.method.settings import MethodConfig
from strata.train.models.alteration import draw_permutations, time_orders
from strata.train.models.backbones import LEVELS, BackboneConfig, Level, Levels, build_backbone
from strata.train.models.heads import GlobalHead, StepHead, pool_space
from strata.train.models.inputs import frame_differences, mean_and_scale, scaled
from strata.train.models.motion import MotionExcitation
from strata.train.models.prototypes import Prototypes

__all__ = ["Embeddings", "VideoModel"]

_NUM_VIEWS = 3
"""Two short clips and the long sequence."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of a rank's videos; those that the stage does not use are absent."""

    instance: Tensor
    """`[b, V, D]`: for L_ins and the graph."""
    scores: Tensor
    """`[b, V, K]`: cosines with the prototypes."""
    scored: Tensor
    """`[b, V, D]`: the unit vectors that have these cosines."""
    taught: Tensor | None = None
    """`[b, V, C]`: for L_dis, as many channels as the high level."""
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
        self.compiled: Callable[[Tensor, Tensor, Tensor, int], Levels] | None = None
        """`encoder` as `fast_encoder` compiled it."""
        widths, size = self.backbone.widths, config.embedding_size
        self.instance_head = StepHead(widths.high, size, average_steps=True)
        self.global_head = GlobalHead(widths.high, size)
        self.prototypes = Prototypes(config.num_prototypes, size)
        self.distillation_head: StepHead | None = None
        if config.weights.distillation:
            self.distillation_head = StepHead(widths.high, widths.high, average_steps=True)
        self.queue = ScoreQueue(config.queue_length, config.num_prototypes)
        self.motion = nn.ModuleDict()
        self.augmentation_heads = nn.ModuleDict()
        self.retrieval_heads = nn.ModuleDict()
        self.graph_heads = nn.ModuleDict()
        for level in LEVELS:
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
            group("distillation", *filter(None, [self.distillation_head])),
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
        moving |= {"distillation"} & active
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
        for number, level in enumerate(LEVELS):
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
            result.append(time_orders(_NUM_VIEWS * len(samples), num_steps, shuffled))
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
        scored = self.global_head(high_steps)
        scores = self.prototypes(scored, frozen=phase.prototypes_frozen)
        head = self.distillation_head
        result = Embeddings(
            instance=self.instance_head(high_steps).unflatten(0, split)[:, :2],
            scores=scores.unflatten(0, split)[:, :2],
            scored=scored.detach().unflatten(0, split)[:, :2],
            taught=None if head is None else head(high_steps).unflatten(0, split)[:, :2],
        )
        orders: dict[str, Tensor] = {
            level: order.unflatten(1, (num_videos, _NUM_VIEWS))[:, :, : split[1]].flatten(1, 2)
            for level, order in zip(LEVELS, (orders_low, orders_mid, orders_high), strict=True)
        }
        for level in LEVELS:
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
        return (self.compiled or self.encoder)(clips, *mean_and_scale(clips.device), second_of)

    def encoder(self, clips: Tensor, mean: Tensor, scale: Tensor, second_of: int) -> Levels:
        """Maps of `[N, T, S, S, 3]`, uint8; every second of `second_of` seen as differences."""
        return self.backbone(self._seen(clips, mean, scale, second_of))

    def _seen(self, clips: Tensor, mean: Tensor, scale: Tensor, second_of: int) -> Tensor:
        """Input of the encoder, `[N, C, T, S, S]`."""
        dtype = self.backbone.input_conv().weight.dtype
        seen = scaled(clips, mean, scale, self.in_channels, dtype)
        if second_of:
            seen[1::second_of] = frame_differences(seen[1::second_of])
        return seen

    def _steps(self, level: Level, maps: Tensor, orders: Tensor | None) -> Tensor:
        """Averages over space, `[A', N, T, C]`; the high level has no motion excitation."""
        if level == "high":
            return pool_space(maps)[None]
        return self.motion[level](maps, orders)
