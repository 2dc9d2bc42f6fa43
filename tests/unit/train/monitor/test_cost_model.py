"""The cost model compared with slow counting and with a real step's memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strata.dataload.config import DataConfig
from strata.train.config import TrainConfig
from strata.train.engine_config import EngineConfig
from strata.train.method.model import VideoModel
from strata.train.method.schedules import Phase
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.monitor.cost_model import memory_estimate, step_cost


def settings(model: BackboneConfig, *, size: int, batch: int = 4, **engine: Any) -> TrainConfig:
    data = DataConfig(shards=Path("none"), batch_size=batch, size=size)
    return TrainConfig(run=Path("none"), data=data, model=model, engine=EngineConfig(**engine))


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
def test_operations_are_those_of_every_convolution(name: Any):
    """Two a product; forward once, backward once for the weights and once for the input."""
    config = settings(BackboneConfig(name=name, width=8), size=32)
    backbone = build_backbone(config.model)
    counted: list[int] = []

    def count(conv: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv3d)
        counted.append(2 * conv.weight.numel() * output.numel() // conv.out_channels)

    for module in backbone.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    with torch.no_grad():
        backbone(torch.zeros(2 * 3, 3, 16, 32, 32))
    cost = step_cost(config, videos=3, stage=1)
    assert cost.forward_flops == sum(counted)
    # The clips need no gradient.
    assert cost.backward_flops == 2 * sum(counted) - counted[0]


def test_the_published_encoder():
    """The step that docs/benchmarks.md measures."""
    config = settings(BackboneConfig(), size=112, batch=256)
    assert step_cost(config, videos=256, stage=1).flops == pytest.approx(37.5e12, rel=0.01)
    assert step_cost(config, videos=256, stage=2).flops == pytest.approx(75.0e12, rel=0.01)


def test_counting_draws_no_random_numbers():
    config = settings(BackboneConfig(width=8), size=32)
    before = torch.get_rng_state()
    step_cost(config, videos=2, stage=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stage", [1, 2])
def test_activations_equal_those_of_the_real_forward_pass(stage: Any):
    config = settings(BackboneConfig(width=32), size=64)
    model = VideoModel(config.model, config.method, 16).train()
    phase = Phase(stage=stage, lr_factor=1.0, queue=True, prototypes_frozen=False)
    short = torch.randint(0, 256, (2, 2, 16, 64, 64, 3), dtype=torch.uint8)
    long = torch.randint(0, 256, (2, 32, 64, 64, 3), dtype=torch.uint8)
    orders = model.orders(torch.arange(2).numpy(), 0, 0, 16)
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(short, long if stage == 2 else None, *orders, phase)
    cost = step_cost(config, videos=2, stage=stage)
    memory = memory_estimate(config, cost, videos=2, ranks=1, stage=stage, autocast=False)
    # Low: heads and motion excitation are not counted.
    assert 0.9 * sum(kept.values()) < memory.activations <= sum(kept.values())


def test_memory_by_precision_sharding_and_ranks():
    config = settings(BackboneConfig(width=8), size=32, zero=1)
    cost = step_cost(config, videos=2, stage=2)
    one = memory_estimate(config, cost, videos=2, ranks=1, stage=2, autocast=False)
    assert one.weights == one.gradients == 4 * cost.parameters
    assert one.adam == 8 * cost.parameters
    two = memory_estimate(config, cost, videos=2, ranks=2, stage=2, autocast=True)
    assert two.adam == one.adam // 2
    assert two.gradients == 2 * one.gradients
    assert one.activations / 2 <= two.activations < one.activations
    # Two clips of 16 and one of 32 frames; two ahead, one being made, one in use.
    assert one.batches == 4 * 2 * 64 * 32 * 32 * 3
    assert one.total == sum(vars(one).values())
