import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from strata.errors import ConfigError
from strata.train.losses.instance import instance_loss, pair_contrast
from tests.support import reference_losses


def clips(num_videos: int = 5, size: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_videos, 2, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_videos", [2, 3, 7])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_equals_the_loops(num_videos: int, tau: float):
    z = clips(num_videos)
    expected = reference_losses.instance_loss(z, tau)
    assert instance_loss(z, temperature=tau).item() == pytest.approx(expected, rel=1e-10)


def test_equals_masked_cross_entropy_over_a_2b_matrix():
    # Section 4.1's other form, view-major as SimCLR writes it.
    z = functional.normalize(clips(), dim=-1)
    rows = torch.cat([z[:, 0], z[:, 1]])
    logits = (rows @ rows.T / 0.07).fill_diagonal_(-torch.inf)
    target = torch.arange(10).roll(5)
    torch.testing.assert_close(instance_loss(z), functional.cross_entropy(logits, target))


def test_identical_clips_are_at_chance():
    z = torch.ones(8, 2, 16)
    assert instance_loss(z).item() == pytest.approx(math.log(15), rel=1e-6)


def test_orthogonal_videos_reach_the_closed_form():
    z = torch.eye(4)[:, None].expand(-1, 2, -1)
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))
    assert instance_loss(z, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_length_of_embeddings_does_not_matter():
    z = clips()
    torch.testing.assert_close(instance_loss(z), instance_loss(z * 37))


def test_gradcheck():
    z = clips(3, 4).requires_grad_()
    altered = clips(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: instance_loss(x, temperature=0.3), (z,))
    assert torch.autograd.gradcheck(
        lambda x, a: pair_contrast(x, temperature=0.3, altered_RMC=a), (z, altered)
    )


def test_mean_over_slices_of_anchors_equals_the_full_loss_and_gradient():
    z = clips(6).requires_grad_()
    altered = clips(6, seed=1).requires_grad_()
    full = pair_contrast(z, temperature=0.07, altered_RMC=altered)
    gradients = torch.autograd.grad(full, (z, altered))
    parts = [
        pair_contrast(z, temperature=0.07, altered_RMC=altered[a:b], anchors=slice(a, b))
        for a, b in ((0, 2), (2, 4), (4, 6))
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, full)
    torch.testing.assert_close(torch.autograd.grad(mean, (z, altered)), gradients)


@pytest.mark.parametrize("tau", [0.01, 0.07])
@pytest.mark.parametrize("kind", ["identical", "zero", "opposite", "huge"])
def test_adversarial_input_stays_finite(kind: str, tau: float):
    z = clips(2, 8).float()
    if kind == "identical":
        z = torch.ones(2, 2, 8)
    elif kind == "zero":
        z = torch.zeros(2, 2, 8)
    elif kind == "opposite":
        z[:, 1] = -z[:, 0]
    else:
        z = z * 1e15
    z.requires_grad_()
    loss = instance_loss(z, temperature=tau)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_autocast_changes_nothing_but_the_rounding_of_the_input():
    z = clips(16, 128).float()
    exact = instance_loss(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(instance_loss(z), exact)
        rounded = instance_loss(z.bfloat16())
    assert torch.equal(rounded, instance_loss(z.bfloat16().float()))
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0)


def test_one_video_is_refused():
    with pytest.raises(ConfigError, match="global batch has 1"):
        instance_loss(torch.ones(1, 2, 4))


def test_three_views_are_refused():
    with pytest.raises(ValueError, match="two views"):
        instance_loss(torch.ones(4, 3, 4))


class _LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_pool_of_negatives_is_made():
    # The release's pool: 2B anchors x 2(B - 1) negatives x C.
    num_videos, size, num_altered = 96, 64, 4
    z = torch.randn(num_videos, 2, size, requires_grad=True)
    altered = torch.randn(num_videos, num_altered, size)
    with _LargestTensor() as largest:
        pair_contrast(z, temperature=0.07, altered_RMC=altered).backward()
    assert largest.numel == 2 * num_videos * (2 * num_videos + num_altered)
