import pytest
import torch
from torch import nn
from torch.nn import functional

from strata.train.models.heads import GlobalHead, StepHead, pool_space
from strata.train.models.prototypes import Prototypes


@pytest.mark.parametrize("average", [True, False])
def test_step_head_is_two_one_by_one_convolutions(average: bool):
    torch.manual_seed(0)
    head = StepHead(12, 5, average_steps=average).double()
    steps = torch.randn(3, 4, 12, dtype=torch.float64)
    along_time = steps.mT
    hidden = functional.conv1d(along_time, head.hidden.weight[..., None], head.hidden.bias)
    out = functional.conv1d(hidden.relu(), head.project.weight[..., None], head.project.bias)
    expected = out.mean(2) if average else out.mT
    torch.testing.assert_close(head(steps), expected)


def test_step_head_takes_any_leading_dimensions():
    head = StepHead(6, 4, average_steps=True)
    steps = torch.randn(3, 2, 5, 6)
    torch.testing.assert_close(head(steps)[1], head(steps[1]))


def test_global_head_gives_unit_length_whatever_the_autocast():
    torch.manual_seed(0)
    head = GlobalHead(16, 8)
    steps = torch.randn(6, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = head(steps)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(head(steps.mean(1, keepdim=True)), head(steps))


def test_pool_space_sums_in_float32():
    maps = torch.randn(2, 3, 4, 14, 14)
    expected = maps.mean((3, 4)).mT
    torch.testing.assert_close(pool_space(maps), expected)
    pooled = pool_space(maps.bfloat16())
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, maps.bfloat16().float().mean((3, 4)).mT)
    assert pool_space(maps.double()).dtype == torch.float64


def test_heads_and_prototypes_have_the_published_number_of_parameters():
    heads: list[nn.Module] = [GlobalHead(512), Prototypes(1000)]
    for width in (128, 256, 512):
        heads += [StepHead(width, average_steps=average) for average in (True, False, True)]
    assert sum(p.numel() for h in heads for p in h.parameters()) == 1_837_440
