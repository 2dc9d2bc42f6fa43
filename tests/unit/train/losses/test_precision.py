import pytest
import torch

from strata.errors import ConfigError
from strata.train.losses.precision import full_precision, require_pairs, unit_length


@full_precision
def product(a: torch.Tensor, *, b: torch.Tensor | None = None, power: int = 1) -> torch.Tensor:
    assert b is not None
    return (a @ b) ** power


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_inside(dtype: torch.dtype):
    a, b = torch.randn(4, 4).to(dtype), torch.randn(4, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = product(a, b=b, power=2)
        assert (a.float() @ b.float()).dtype == torch.bfloat16  # autocast is on outside
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (a.float() @ b.float()) ** 2)


def test_float64_passes_through():
    a = torch.randn(3, 3, dtype=torch.float64)
    assert product(a, b=a).dtype == torch.float64


def test_unit_length_of_a_zero_vector_has_a_finite_gradient():
    vectors = torch.zeros(2, 3, requires_grad=True)
    unit_length(vectors).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().max() <= 1e6 * 1.001


def test_one_video_is_refused_with_the_remedy():
    require_pairs(2, "L_ins")
    with pytest.raises(ConfigError, match="global batch has 1; use a global batch of at least 2"):
        require_pairs(1, "L_ins")
