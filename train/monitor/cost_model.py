"""What a step costs, counted before it is run: operations and memory, on torch's meta device.

Nothing is allocated or computed: the encoder is run forward and backward on shapes alone, so the
counts hold for every batch, size and machine. Heads, losses and optimizer are left out: they add
less than 0.1 % to the operations of an encoder of the published width.
"""

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
    """One rank's share of one step of the encoder."""

    forward_flops: int
    """Additions and multiplications of convolutions and matrix products."""
    backward_flops: int
    saved_floats: int
    """Floating-point numbers that the forward pass leaves behind for the backward pass."""
    saved_bytes: int
    """Bytes of everything else that it leaves: places of maxima, orders."""
    parameters: int
    """Of the model, with those that the stage leaves alone."""

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops


def step_cost(config: TrainConfig, *, videos: int, stage: int) -> StepCost:
    """Count a step.

    Args:
        config: The run's settings.
        videos: Of this rank.
        stage: 1 or 2.
    """
    clips = config.data.clips
    passes = [(2 * videos, clips.clip_frames)]
    if config.method.wants_long(stage):
        passes.append((videos, clips.long_frames))
    # Initialisation on the meta device draws nothing, but this must not rest on it.
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = VideoModel(config.model, config.method, clips.clip_frames).train()
    torch.set_rng_state(state)
    counts = [_count(model.backbone, number, frames, config) for number, frames in passes]
    forward, backward, floats, others = (sum(column) for column in zip(*counts, strict=True))
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
    """Operations forward and backward, and floats and other bytes kept between, of some clips."""
    size, planes = config.data.size, config.model.in_channels
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held, so that no other storage takes its place.
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
    """Bytes of a rank, by what they are for."""

    weights: int
    gradients: int
    adam: int
    activations: int
    batches: int
    """Clips, as uint8: those made ahead, the one being made and the one in use."""

    @property
    def total(self) -> int:
        """All of it, without the libraries' own work space."""
        return sum(vars(self).values())


def memory_estimate(
    config: TrainConfig, cost: StepCost, *, videos: int, ranks: int, stage: int, autocast: bool
) -> MemoryEstimate:
    """Where a rank's memory goes.

    Weights, gradients and Adam's two moments are float32. Activations are as many bytes as autocast
    makes them; with it the weights are there once more in 16 bits.

    Args:
        config: The run's settings.
        cost: Of a step of this stage and number of videos.
        videos: Of this rank.
        ranks: In the world.
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
        # Averaging over ranks flattens the gradients into a copy.
        gradients=parameters * _FP32 * (2 if ranks > 1 else 1),
        adam=_ADAM_MOMENTS * parameters * _FP32 // shards,
        activations=cost.saved_floats * (2 if autocast else _FP32) + cost.saved_bytes,
        batches=copies * videos * frames * config.data.size**2 * 3,
    )
