import math

import pytest
import torch
from torch.nn import functional

from strata.errors import ConfigError
from strata.train.losses.graph import distribution_graphs, graph_loss
from tests.support import reference_losses


def clips(num_videos: int = 6, size: int = 5, seed: int = 0, noise: float = 1.0) -> torch.Tensor:
    """`[B, 2, C]`; views of a video alike if `noise` is small."""
    generator = torch.Generator().manual_seed(seed)
    videos = torch.randn(num_videos, 1, size, generator=generator, dtype=torch.float64)
    views = torch.randn(num_videos, 2, size, generator=generator, dtype=torch.float64)
    return videos + noise * views


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("eta", [0.0, 0.05, 0.3, 1.0])
def test_graphs_equal_the_loops(tau: float, eta: float):
    z, labels = clips(8), torch.tensor([0, 1, 0, 2, 1, 0, 3, 0])
    found = distribution_graphs(z, labels, temperature=tau, threshold=eta)
    instance, semantic, target = reference_losses.graphs(z, labels, tau, eta)
    torch.testing.assert_close(found.instance_RB, torch.tensor(instance, dtype=torch.float64))
    assert found.semantic_RB.tolist() == semantic
    torch.testing.assert_close(found.target_RB, torch.tensor(target, dtype=torch.float64))


def test_rows_of_e_sum_to_one_with_a_positive_diagonal():
    target = distribution_graphs(clips(32).float(), torch.arange(32) % 3).target_RB
    torch.testing.assert_close(target.sum(1), torch.ones(32))
    assert (target.diagonal() > 0).all()
    assert not torch.equal(target, target.T)


def test_eta_leaves_at_most_its_inverse_in_a_row():
    graphs = distribution_graphs(torch.ones(64, 2, 4), torch.zeros(64, dtype=torch.long))
    assert (graphs.instance_RB > 0).sum(1).tolist() == [1] * 64  # 1/64 < eta: diagonal alone
    graphs = distribution_graphs(torch.ones(20, 2, 4), torch.zeros(20, dtype=torch.long))
    assert (graphs.instance_RB > 0).sum(1).max() <= 20


def test_e_is_the_identity_when_all_labels_differ():
    target = distribution_graphs(clips(6), torch.arange(6), threshold=0.0).target_RB
    assert torch.equal(target, torch.eye(6, dtype=target.dtype))


def test_a_diagonal_that_underflows_is_not_zero_by_zero():
    # The positive pair is opposite, another is equal: W_ii = e^-200.
    z = torch.zeros(2, 2, 2)
    z[:, 0, 0] = 1
    z[0, 1, 0], z[1, 1, 0] = -1, 1
    target = distribution_graphs(z, torch.arange(2), temperature=0.01).target_RB
    assert torch.equal(target, torch.eye(2))


def test_no_gradient_reaches_the_embeddings_through_e():
    z = clips().requires_grad_()
    graphs = distribution_graphs(z, torch.zeros(6, dtype=torch.long))
    assert not any(g.requires_grad for g in graphs)
    target = torch.full((6, 6), 1 / 6, dtype=torch.float64, requires_grad=True)
    graph_loss(z, target).backward()
    assert target.grad is None


def test_loss_equals_the_loops_and_the_release_divides_by_b():
    g, target = clips(seed=3), torch.rand(6, 6, dtype=torch.float64).softmax(1)
    expected = reference_losses.graph_loss(g, target, 0.07)
    assert graph_loss(g, target).item() == pytest.approx(expected, rel=1e-10)
    released = graph_loss(g, target, divide_by_batch=True).item()
    assert expected / released == pytest.approx(6, rel=1e-10)


def test_with_the_identity_as_e_the_loss_is_one_way_infonce():
    g = functional.normalize(clips(), dim=-1)
    logits = g[:, 0] @ g[:, 1].T / 0.07
    expected = functional.cross_entropy(logits, torch.arange(6))
    torch.testing.assert_close(graph_loss(g, torch.eye(6, dtype=g.dtype)), expected)


def test_identical_clips_are_at_chance():
    target = torch.rand(8, 8).softmax(1)
    loss = graph_loss(torch.ones(8, 2, 4), target)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_gradcheck():
    g = clips(3, 4).requires_grad_()
    target = torch.rand(3, 3, dtype=torch.float64).softmax(1)
    assert torch.autograd.gradcheck(lambda x: graph_loss(x, target, temperature=0.3), (g,))


def test_mean_over_slices_of_anchors_equals_the_full_loss_and_gradient():
    g = clips(6).requires_grad_()
    target = torch.rand(6, 6, dtype=torch.float64).softmax(1)
    for divide in (False, True):
        full = graph_loss(g, target, divide_by_batch=divide)
        parts = [
            graph_loss(g, target[rows], anchors=rows, divide_by_batch=divide)
            for rows in (slice(0, 3), slice(3, 6))
        ]
        mean = torch.stack(parts).mean()
        torch.testing.assert_close(mean, full)
        torch.testing.assert_close(torch.autograd.grad(mean, g), torch.autograd.grad(full, g))


@pytest.mark.parametrize("kind", ["identical", "zero", "opposite"])
def test_adversarial_input_stays_finite(kind: str):
    z = {
        "identical": torch.ones(2, 2, 4),
        "zero": torch.zeros(2, 2, 4),
        "opposite": torch.tensor([1.0, -1.0])[None, :, None].expand(2, 2, 4).clone(),
    }[kind].requires_grad_()
    graphs = distribution_graphs(z, torch.zeros(2, dtype=torch.long), temperature=0.01)
    assert all(g.isfinite().all() for g in graphs)
    loss = graph_loss(z, graphs.target_RB, temperature=0.01)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_one_video_is_refused():
    with pytest.raises(ConfigError, match="the graph contrasts"):
        distribution_graphs(torch.ones(1, 2, 4), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ConfigError, match="the graph constraint contrasts"):
        graph_loss(torch.ones(1, 2, 4), torch.ones(1, 1))


def test_autocast_changes_nothing_but_the_rounding_of_the_input():
    z = clips(16, 128).float()
    labels = torch.arange(16) % 4
    exact = distribution_graphs(z, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = distribution_graphs(z, labels)
        loss = graph_loss(z, exact.target_RB)
        rounded = graph_loss(z.bfloat16(), exact.target_RB)
    assert all(torch.equal(a, b) for a, b in zip(inside, exact, strict=True))
    assert torch.equal(loss, graph_loss(z, exact.target_RB))
    assert torch.equal(rounded, graph_loss(z.bfloat16().float(), exact.target_RB))
    torch.testing.assert_close(rounded, loss, rtol=5e-3, atol=0)
