import torch
from torch.nn import functional

from strata.train.models.prototypes import Prototypes


def embeddings(num_clips: int = 6, size: int = 8) -> torch.Tensor:
    return functional.normalize(torch.randn(num_clips, 2, size), dim=-1)


def test_scores_are_cosines_whatever_the_length_of_rows():
    torch.manual_seed(0)
    prototypes = Prototypes(10, 8)
    e = embeddings()
    scores = prototypes(e)
    expected = functional.cosine_similarity(e[:, :, None], prototypes.weight, dim=-1)
    torch.testing.assert_close(scores, expected)
    with torch.no_grad():
        prototypes.weight.mul_(torch.rand(10, 1) * 5 + 0.1)
    torch.testing.assert_close(prototypes(e), scores)


def test_rows_start_at_unit_length():
    torch.testing.assert_close(Prototypes(10, 8).weight.norm(dim=1), torch.ones(10))


def test_gradient_lies_across_the_rows():
    prototypes = Prototypes(5, 8).double()
    prototypes(embeddings().double()).square().sum().backward()
    gradient = prototypes.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    along = (gradient * prototypes.weight).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along))


def test_frozen_prototypes_get_no_gradient_but_pass_it_on():
    prototypes, e = Prototypes(5, 8), embeddings().requires_grad_()
    scores = prototypes(e, frozen=True)
    torch.testing.assert_close(scores, prototypes(e))
    scores.square().sum().backward()
    assert prototypes.weight.grad is None
    assert e.grad is not None


def test_autocast_is_ignored():
    prototypes, e = Prototypes(5, 8), embeddings()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prototypes(e), prototypes(e.clone()))
        assert prototypes(e).dtype == torch.float32
        assert prototypes(e.bfloat16()).dtype == torch.float32
