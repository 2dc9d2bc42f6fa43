"""Synchronised batch norm on several processes equals that of one with the global batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strata.distributed import World, mean_over_ranks
from strata.train.models.synced_norm import HostSyncedNorm, synchronise_norms
from tests.support.rank_processes import run_ranks

ROWS, STEPS = 8, 3
SHAPES = {"clips": (ROWS, 4, 3, 5, 5), "vectors": (ROWS, 6)}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    size = SHAPES[kind][1]
    if kind == "vectors":
        layers = [nn.Linear(size, size), nn.BatchNorm1d(size, momentum=0.3), nn.Tanh()]
    else:
        layers = [nn.Conv3d(size, size, 3), nn.BatchNorm3d(size, momentum=0.3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2)).double()


def steps(world: World, kind: str, synced: bool) -> dict[str, Tensor]:
    """Loss, outputs, gradients and statistics after some steps, each rank on its own rows."""
    model: Any = network(kind)
    loss = torch.zeros(())
    batch = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(1)).double() * 3 + 2
    share = ROWS // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    model(batch[:2])  # Sets the lazy layer's size; its statistics are set back below.
    torch.manual_seed(2)
    nn.init.normal_(model[-1].weight)
    model[1].reset_running_stats()
    if synced:
        synchronise_norms(model, torch.device("cpu"))
        assert isinstance(model[1], HostSyncedNorm)
    target = torch.linspace(-1, 1, 2 * ROWS).double().view(ROWS, 2)
    for _ in range(STEPS):
        model.zero_grad()
        out = model(batch[own])
        loss = (out - target[own]).square().mean()
        loss.backward()
    model.eval()
    result = {
        "loss": mean_over_ranks(loss),
        "mean": model[1].running_mean,
        "variance": model[1].running_var,
        "count": model[1].num_batches_tracked,
        "evaluated": model(batch).detach(),
    }
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        result[f"gradient of {name}"] = mean_over_ranks(parameter.grad)
    return result


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_values_gradients_and_statistics_are_those_of_the_global_batch(kind: str, num_ranks: int):
    alone = run_ranks(steps, 1, kind, False)[0]
    for found in run_ranks(steps, num_ranks, kind, True):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_without_synchronisation_each_rank_has_its_own_statistics():
    alone = run_ranks(steps, 1, "clips", False)[0]
    (found, _) = run_ranks(steps, 2, "clips", False)
    assert not torch.allclose(found["mean"], alone["mean"], rtol=1e-6)
