import math

import pytest
import torch
from torch.nn import functional

from strata.errors import ConfigError
from strata.train.losses.instance import instance_loss
from strata.train.losses.temporal import augmentation_loss, retrieval_loss
from tests.support import reference_losses


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_alterations", [1, 2, 3])
@pytest.mark.parametrize("num_videos", [2, 5])
def test_augmentation_equals_the_loops(num_videos: int, num_alterations: int):
    a, b = random(num_videos, 2, 6), random(num_videos, num_alterations, 2, 6, seed=1)
    expected = reference_losses.augmentation_loss(a, b, 0.07)
    assert augmentation_loss(a, b).item() == pytest.approx(expected, rel=1e-10)


def test_augmentation_is_the_instance_loss_with_more_columns():
    a, b = functional.normalize(random(5, 2, 6), dim=-1), random(5, 1, 2, 6, seed=1)
    rows = a.flatten(0, 1)
    logits = (rows @ rows.T / 0.07).fill_diagonal_(-torch.inf)
    own = torch.einsum("ivc,iuc->ivu", a, functional.normalize(b[:, 0], dim=-1)) / 0.07
    logits = torch.cat([logits, own.flatten(0, 1)], 1)
    expected = functional.cross_entropy(logits, torch.arange(10) ^ 1)
    torch.testing.assert_close(augmentation_loss(a, b), expected)
    # Altered clips that are infinitely far leave L_ins.
    far = -1e9 * a[:, None]
    assert augmentation_loss(a, far, temperature=0.01) >= instance_loss(a, temperature=0.01)


@pytest.mark.parametrize(("num_alterations", "bound"), [(1, math.log(3)), (2, math.log(5))])
def test_invisible_alterations_bound_the_loss(num_alterations: int, bound: float):
    # Attained in the limit: views alike, other videos opposite.
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[:, None].expand(2, 2, 2)
    loss = augmentation_loss(a, a[:, None].expand(2, num_alterations, 2, 2), temperature=0.07)
    assert loss.item() == pytest.approx(bound, rel=1e-6)
    for seed in range(5):
        a = random(4, 2, 8, seed=seed)
        altered = a[:, None].expand(-1, num_alterations, -1, -1)
        assert augmentation_loss(a, altered).item() >= bound


def test_augmentation_of_identical_clips_is_at_chance():
    loss = augmentation_loss(torch.ones(8, 2, 4), torch.ones(8, 2, 2, 4))
    assert loss.item() == pytest.approx(math.log(2 * 8 - 1 + 4), rel=1e-6)


def test_augmentation_gradcheck_reaches_both_branches():
    a, b = random(3, 2, 4).requires_grad_(), random(3, 2, 2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: augmentation_loss(x, y, temperature=0.3), (a, b))
    augmentation_loss(a, b).backward()
    assert b.grad is not None
    assert b.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("num_steps", "num_long"),
    [(2, 4), (4, 8), (8, 16), (2, 2), (4, 4), (8, 8)],
    ids=lambda n: str(n),
)
def test_retrieval_equals_the_loops(num_steps: int, num_long: int):
    short, long = random(3, 2, num_steps, 5), random(3, num_long, 5, seed=1)
    expected = reference_losses.retrieval_loss(short, long, 0.07)
    assert retrieval_loss(short, long).item() == pytest.approx(expected, rel=1e-10)


def test_retrieval_does_not_depend_on_the_order_of_videos_nor_on_the_batch():
    short, long = random(4, 2, 2, 5), random(4, 4, 5, seed=1)
    order = torch.tensor([2, 0, 3, 1])
    full = retrieval_loss(short, long)
    torch.testing.assert_close(retrieval_loss(short[order], long[order]), full)
    parts = [retrieval_loss(short[i : i + 1], long[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), full)


@pytest.mark.parametrize("num_long", [2, 4, 8])
def test_retrieval_of_identical_steps_is_at_chance(num_long: int):
    loss = retrieval_loss(torch.ones(2, 2, num_long, 4), torch.ones(2, num_long, 4))
    assert loss.item() == pytest.approx(math.log(num_long), rel=1e-6)


@pytest.mark.parametrize("dense", [True, False])
def test_retrieval_of_aligned_orthogonal_steps_vanishes(dense: bool):
    steps = torch.eye(4)
    long = steps.expand(3, 4, 4)
    short = steps.view(2, 2, 4).expand(3, 2, 2, 4)
    if not dense:  # twice as many short steps, neighbours alike
        short = short.repeat_interleave(2, dim=2)
    assert retrieval_loss(short, long, temperature=0.01).item() == pytest.approx(0, abs=1e-6)
    # The other way round, the second clip first, every step is wrong.
    assert retrieval_loss(short.flip(1), long, temperature=0.01).item() > 90


def test_retrieval_gradcheck():
    short, long = random(2, 2, 4, 3).requires_grad_(), random(2, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: retrieval_loss(x, y, temperature=0.3), (short, long)
    )


@pytest.mark.parametrize("num_long", [3, 16, 5])
def test_retrieval_refuses_steps_that_do_not_line_up(num_long: int):
    with pytest.raises(ConfigError, match="2 short clips of 4 steps cannot be lined up"):
        retrieval_loss(torch.ones(2, 2, 4, 3), torch.ones(2, num_long, 3))


@pytest.mark.parametrize("kind", ["ones", "zeros"])
def test_adversarial_input_stays_finite(kind: str):
    make = getattr(torch, kind)
    a, b = make(2, 2, 8).requires_grad_(), make(2, 2, 2, 8).requires_grad_()
    short, long = make(2, 2, 4, 8).requires_grad_(), make(2, 8, 8).requires_grad_()
    loss = augmentation_loss(a, b, temperature=0.01) + retrieval_loss(short, long, temperature=0.01)
    loss.backward()
    assert loss.isfinite()
    for leaf in (a, b, short, long):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_autocast_changes_nothing_but_the_rounding_of_the_input():
    a, b = random(16, 2, 128).float(), random(16, 2, 2, 128, seed=1).float()
    short, long = random(16, 2, 4, 128).float(), random(16, 8, 128, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = augmentation_loss(a, b), retrieval_loss(short, long)
        rounded = (
            augmentation_loss(a.bfloat16(), b.bfloat16()),
            retrieval_loss(short.bfloat16(), long.bfloat16()),
        )
    exact = augmentation_loss(a, b), retrieval_loss(short, long)
    assert all(torch.equal(x, y) for x, y in zip(inside, exact, strict=True))
    assert all(x.dtype == torch.float32 for x in rounded)
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0)


def test_one_video_is_refused_by_augmentation_only():
    with pytest.raises(ConfigError, match="global batch has 1"):
        augmentation_loss(torch.ones(1, 2, 4), torch.ones(1, 1, 2, 4))
    retrieval_loss(torch.ones(1, 2, 2, 4), torch.ones(1, 4, 4))
