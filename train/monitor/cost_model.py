"""Cost model of a step: operations and memory, counted on torch's meta device before a run.

Nothing is allocated or computed: the encoder is run forward and backward on shapes only, so this
works for every batch, size and machine. Heads, losses and optimizer are not counted: they add less
than 0.1 % to the operations of an encoder of the published width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from strata.train.config import TrainConfig
from strata.train.method.model import VideoModel
from strata.train.models.backbones import Backbone

__all__ = ["MemoryEstimate", "StepCost", "memory_estimate", "step_cost"]

_FP32 = 4
_ADAM_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of the encoder in one step on one rank."""

    forward_flops: int
    """Additions and multiplications of convolutions and matrix products."""
    backward_flops: int
    saved_floats: int
    """Floating-point numbers that the forward pass stores for the backward pass."""
    saved_bytes: int
    """Bytes of everything else that it stores: positions of maxima, orders."""
    parameters: int
    """Number of parameters of the model, including those frozen in the stage."""

    @property
    def flops(self) -> int:
        """Operations of forward and backward together."""
        return self.forward_flops + self.backward_flops


@functools.cache
def step_cost(config: TrainConfig, *, videos: int, stage: int) -> StepCost:
    """Count the cost of a step; counted once for the run plan and the metrics.

    Args:
        config: The run's settings.
        videos: Number of videos of this rank.
        stage: 1 or 2.
    """
    clips = config.data.clips
    passes = [(2 * videos, clips.clip_frames)]
    if config.method.wants_long(stage):
        passes.append((videos, clips.long_frames))
    # The random state is restored, even if initialisation draws numbers.
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = VideoModel(config.model, config.method, clips.clip_frames).train()
    torch.set_rng_state(state)
    counts = [_count(model.backbone, number, frames, config) for number, frames in passes]
    forward, backward, floats, others = (sum(column) for column in zip(*counts, strict=True))
    if config.method.teacher is not None:
        forward += counts[0][0]  # of the short clips, by an encoder that is taken to be like this
    return StepCost(
        forward_flops=forward,
        backward_flops=backward,
        saved_floats=floats,
        saved_bytes=others,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _count(
    backbone: Backbone, number: int, frames: int, config: TrainConfig
) -> tuple[int, int, int, int]:
    """Operations of forward and backward, and the stored floats and other bytes, of clips."""
    size, planes = config.data.size, config.model.in_channels
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The reference keeps the storage's address from being reused.
        saved[storage._cdata] = (storage, tensor.dtype)
        return tensor

    clips = torch.empty(number, planes, frames, size, size, device="meta")
    with FlopCounterMode(display=False) as forward:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = torch.stack([level.sum() for level in backbone(clips)]).sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    for parameter in backbone.parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    floats = sum(s.nbytes() // d.itemsize for s, d in saved.values() if d.is_floating_point)
    others = sum(s.nbytes() for s, d in saved.values() if not d.is_floating_point)
    return forward.get_total_flops(), backward.get_total_flops(), floats, others


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory of a rank in bytes, by purpose."""

    weights: int
    gradients: int
    adam: int
    activations: int
    batches: int
    """Clips as uint8: the prefetched batches, the one being made and the one in use."""

    @property
    def total(self) -> int:
        """Total without the work space of libraries."""
        return sum(vars(self).values())


def memory_estimate(
    config: TrainConfig, cost: StepCost, *, videos: int, ranks: int, stage: int, autocast: bool
) -> MemoryEstimate:
    """Estimate the memory of a rank by purpose.

    Weights, gradients and Adam's two moments are float32. Activations have the size of autocast's
    dtype; with autocast there is also a 16-bit copy of the weights.

    Args:
        config: The run's settings.
        cost: Cost of a step of this stage and number of videos.
        videos: Number of videos of this rank.
        ranks: Number of ranks.
        stage: 1 or 2.
        autocast: Whether the backbone computes in 16 bits.
    """
    clips, parameters = config.data.clips, cost.parameters
    shards = ranks if config.engine.zero else 1
    frames = 2 * clips.clip_frames
    frames += clips.long_frames if config.method.wants_long(stage) else 0
    copies = config.data.prefetch + 2
    return MemoryEstimate(
        weights=parameters * (_FP32 + (2 if autocast else 0)),
        # Averaging over ranks makes a flat copy of the gradients.
        gradients=parameters * _FP32 * (2 if ranks > 1 else 1),
        adam=_ADAM_MOMENTS * parameters * _FP32 // shards,
        activations=cost.saved_floats * (2 if autocast else _FP32) + cost.saved_bytes,
        batches=copies * videos * frames * config.data.size**2 * 3,
    )
