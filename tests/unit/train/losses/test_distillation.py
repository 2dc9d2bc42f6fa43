"""L_dis against loops, and what a student has to do with it."""

import math

import pytest
import torch

from strata.errors import ConfigError
from strata.train.losses.distillation import distillation_loss
from tests.support import reference_losses


def vectors(num_videos: int = 5, size: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_videos, 2, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_videos", [2, 3, 7])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_equals_the_loops(num_videos: int, tau: float):
    student, teacher = vectors(num_videos), vectors(num_videos, seed=1)
    expected = reference_losses.distillation_loss(student, teacher, tau)
    loss = distillation_loss(student, teacher, temperature=tau)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_equal_features_are_at_chance_and_orthogonal_ones_reach_the_closed_form():
    assert distillation_loss(torch.ones(8, 2, 4), torch.ones(8, 2, 4)).item() == pytest.approx(
        math.log(8), rel=1e-6
    )
    z = torch.eye(4)[:, None].expand(-1, 2, -1)
    expected = math.log(1 + 3 * math.exp(-1 / 0.5))
    assert distillation_loss(z, z, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_gradcheck():
    student = vectors(3, 4).requires_grad_()
    teacher = vectors(3, 4, seed=1)
    loss = torch.autograd.gradcheck(
        lambda x: distillation_loss(x, teacher, temperature=0.3), (student,)
    )
    assert loss


def test_mean_over_slices_of_anchors_equals_the_full_loss():
    student, teacher = vectors(6), vectors(6, seed=1)
    parts = [
        distillation_loss(student[a:b], teacher, anchors=slice(a, b))
        for a, b in ((0, 2), (2, 4), (4, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), distillation_loss(student, teacher))


@pytest.mark.parametrize("student", [torch.zeros(2, 2, 8), torch.full((2, 2, 8), 1e30)])
def test_adversarial_input_stays_finite(student: torch.Tensor):
    student.requires_grad_()
    loss = distillation_loss(student, torch.ones(2, 2, 8), temperature=0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_one_video_is_an_error():
    with pytest.raises(ConfigError, match="L_dis contrasts a video with others"):
        distillation_loss(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
