import pytest
import torch

from strata.errors import ConfigError
from strata.train.models.alteration import time_orders
from strata.train.models.motion import MotionExcitation
from tests.support import reference_losses


def branch(width: int = 32, reduction: int = 8, **settings: bool) -> MotionExcitation:
    """In float64, with batch norms away from their initial values."""
    torch.manual_seed(0)
    module = MotionExcitation(width, reduction=reduction, **settings).double()
    for parameter in (*module.squeeze_norm.parameters(), *module.expand_norm.parameters()):
        torch.nn.init.normal_(parameter, 0.5)
    return module


def maps(num_clips: int = 3, width: int = 32, num_steps: int = 4, side: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_clips, width, num_steps, side, side + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def literal(module: MotionExcitation, x: torch.Tensor) -> torch.Tensor:
    return reference_losses.motion_excitation(
        x,
        module.squeeze.weight,
        module.squeeze_norm,
        module.depthwise_weight,
        module.expand.weight,
        module.expand_norm,
    )


def orders_of(num_clips: int, num_steps: int) -> torch.Tensor:
    shuffled = torch.stack(
        [torch.arange(num_steps).roll(1 + i % (num_steps - 1)) for i in range(num_clips)]
    )
    return time_orders(num_clips, num_steps, shuffled)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_equals_the_equations_frame_by_frame_with_gradients(side: int):
    module, x = branch(), maps(side=side).requires_grad_()
    y = module(x)
    expected = literal(module, x)
    torch.testing.assert_close(y, expected[None])
    weights = torch.randn_like(expected)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad((y[0] * weights).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    torch.testing.assert_close(found, wanted)


def test_orders_equal_altered_copies_of_the_maps_with_gradients():
    # The release's way: copies along the batch, everything computed on all of them.
    module, x = branch(), maps().requires_grad_()
    orders = orders_of(3, 4)
    copies = torch.cat(
        [
            torch.stack([clip[:, steps] for clip, steps in zip(x, order, strict=True)])
            for order in orders
        ]
    )
    expected = literal(module, copies).unflatten(0, (3, 3))
    y = module(x, orders)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(expected)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad((y * weights).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    torch.testing.assert_close(found, wanted)


def test_running_statistics_follow_and_evaluation_uses_them():
    module, x = branch(), maps(num_clips=8)
    orders = orders_of(8, 4)
    for _ in range(300):
        module(x, orders)
    trained = module(x, orders)
    module.eval()
    # In the limit running statistics are the batch's, up to n / (n - 1).
    torch.testing.assert_close(module(x, orders), trained, rtol=5e-2, atol=5e-2)
    assert torch.equal(module(x[:2], orders[:, :2]), module(x, orders)[:, :2])


def test_without_excitation_reversed_and_shuffled_clips_are_the_same_on_average():
    x, orders = maps(), orders_of(3, 4)
    still = branch(excite=False)(x, orders).mean(2)
    torch.testing.assert_close(still[1], still[0])
    torch.testing.assert_close(still[2], still[0])
    moving = branch()(x, orders).mean(2)
    assert (moving[1] - moving[0]).abs().max() > 1e-3
    torch.testing.assert_close(branch(excite=False)(x)[0], x.mean((3, 4)).transpose(1, 2))


def test_the_difference_is_not_antisymmetric():
    # Else reversal would only change signs: w of the reversed clip is not -w read backwards.
    module, x = branch(), maps()
    y = module(x, time_orders(3, 4))
    weight = y / torch.stack([x.mean((3, 4)).mT, x.flip(2).mean((3, 4)).mT]) - 1
    assert (weight[1].flip(1) + weight[0]).abs().max() > 1e-2


def test_published_parameter_counts():
    def count(width: int) -> int:
        return sum(p.numel() for p in MotionExcitation(width).parameters())

    assert count(128) == 2_392
    assert count(256) == 8_880
    assert MotionExcitation(480).squeeze.out_channels == 30
    assert MotionExcitation(832).squeeze.out_channels == 52
    assert MotionExcitation(8).squeeze.out_channels == 1


def test_one_step_and_channels_last_and_autocast():
    module = branch().float()
    x = maps().float()
    assert module(x[:, :, :1]).shape == (1, 3, 1, 32)
    exact = module(x)
    last = x.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(module(last), exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(x)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)


def test_identical_frames_stay_finite():
    module = MotionExcitation(16)
    x = torch.ones(2, 16, 4, 3, 3, requires_grad=True)
    module(x, orders_of(2, 4)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_reduction_below_one_is_refused():
    with pytest.raises(ConfigError, match="reduction is 0; use 1 or more"):
        MotionExcitation(16, reduction=0)
