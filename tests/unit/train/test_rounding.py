"""Half-precision autocast after the encoder: terms and gradients compared with float32.

The encoder's own rounding is measured in test_method.py, on the complete model.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from strata.distributed import World
from strata.train.method.model import VideoModel
from strata.train.method.objective import Method
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.models.backbones import BackboneConfig, Levels
from tests.support.synthetic_clips import smooth_videos

PHASE = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)
VIDEOS = 12
CONFIG = MethodConfig(
    weights=TermWeights(graph_high=1.0), num_prototypes=16, queue_length=48, embedding_size=32
)


class FixedMaps(nn.Module):
    """Feature maps in place of an encoder: those of the short clips, then those of the long."""

    def __init__(self, passes: list[Levels]) -> None:
        super().__init__()
        self.leaves = nn.ParameterList([m for levels in passes for m in levels])
        self.conv = nn.Conv3d(3, 1, 1)
        self._calls = 0
        self.dtype = torch.float32

    def input_conv(self) -> nn.Conv3d:
        return self.conv

    def forward(self, _: Tensor) -> Levels:
        first = 3 * self._calls
        self._calls += 1
        # Rounded as an autocast encoder's output is; the gradient arrives in float32.
        return Levels(*(leaf.to(self.dtype) for leaf in self.leaves[first : first + 3]))


def run(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms, and gradients by group of parameters and by map."""
    torch.manual_seed(0)
    model = VideoModel(BackboneConfig(width=8), CONFIG, clip_frames=16)
    window = smooth_videos(VIDEOS, size=32)
    orders = model.orders(np.arange(VIDEOS), 0, 0, 16)
    passes: list[Levels] = []
    model.backbone.register_forward_hook(lambda _m, _a, out: passes.append(Levels(*out)))
    with torch.no_grad():
        model(window.unflatten(1, (2, 16)), window, *orders, PHASE)
    maps = FixedMaps([Levels(*(m.detach().clone() for m in levels)) for levels in passes])
    maps.dtype = dtype
    model.backbone = maps  # pyright: ignore[reportAttributeAccessIssue]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(window.unflatten(1, (2, 16)), window, *orders, PHASE)
    result = Method(model, CONFIG, World()).losses(out, PHASE, with_health=False)
    result.total.backward()
    gradients = {
        g.name: torch.cat([p.grad.flatten() for p in g.parameters if p.grad is not None])
        for g in model.groups()
        if g.name != "backbone"
    }
    for name, leaf in zip(("low", "mid", "high") * 2, maps.leaves, strict=True):
        assert leaf.grad is not None
        view = "short" if f"short {name}" not in gradients else "long"
        gradients[f"{view} {name}"] = leaf.grad.flatten()
    return result.terms, gradients


@pytest.fixture(scope="module")
def exact() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return run(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "of_terms", "of_gradients"),
    [(torch.bfloat16, 0.005, 0.12), (torch.float16, 0.001, 0.04)],
    ids=["bf16", "fp16"],
)
def test_terms_and_gradients_after_the_encoder_are_close_to_float32(
    exact, dtype: torch.dtype, of_terms: float, of_gradients: float
):
    """Largest relative errors measured: bf16 0.15 % and 6.2 %, fp16 0.025 % and 1.4 %.

    Of a gradient, the norm of the error over its own, for each group and each feature map.
    """
    terms, gradients = run(dtype)
    assert set(terms) == {name for name, weight in vars(CONFIG.weights).items() if weight}
    for name, value in exact[0].items():
        assert float(terms[name]) == pytest.approx(float(value), rel=of_terms), name
    assert len(gradients) == 7 + 6
    for name, value in exact[1].items():
        error = float((gradients[name] - value).norm() / value.norm())
        # Not zero, which shows that the half-precision path was used.
        assert 1e-5 < error < of_gradients, name
