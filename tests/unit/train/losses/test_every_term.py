"""Tests of all loss terms: memory, and finite values and gradients for any input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from strata.train.losses.distillation import distillation_loss
from strata.train.losses.graph import distribution_graphs, graph_loss
from strata.train.losses.instance import instance_loss
from strata.train.losses.prototypical import hard_labels, prototype_loss, sinkhorn
from strata.train.losses.temporal import augmentation_loss, retrieval_loss

Terms = dict[str, Callable[[], Tensor]]
NUM_PROTOTYPES = 1000


def terms(features: dict[str, Tensor], tau: float) -> Terms:
    """Each loss term by name, computed from features as in `Method.losses`."""
    clips, scores, steps = features["clips"], features["scores"], features["steps"]
    altered = features["altered"]

    def prototype() -> Tensor:
        return prototype_loss(scores, sinkhorn(scores, epsilon=tau), temperature=tau)

    def graph() -> Tensor:
        labels = hard_labels(sinkhorn(scores, epsilon=tau))
        target = distribution_graphs(clips, labels, temperature=tau).target_RB
        return graph_loss(clips, target, temperature=tau)

    return {
        "instance": lambda: instance_loss(clips, temperature=tau),
        "prototype": prototype,
        "graph": graph,
        "augmentation": lambda: augmentation_loss(clips, altered, temperature=tau),
        "retrieval": lambda: retrieval_loss(steps, features["long"], temperature=tau),
        "distillation": lambda: distillation_loss(clips, features["teacher"], temperature=tau),
    }


def random_features(num_videos: int, size: int, num_prototypes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "clips": normal(num_videos, 2, size),
        "altered": normal(num_videos, 2, 2, size),
        "teacher": normal(num_videos, 2, size),
        "scores": normal(num_videos, 2, num_prototypes).clamp(-1, 1),
        "steps": normal(num_videos, 2, 4, size),
        "long": normal(num_videos, 8, size),
    }


# Memory


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak of newly allocated memory, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results = profiled.profiler
    assert results is not None
    assert results.kineto_results is not None
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "name", ["instance", "prototype", "graph", "augmentation", "retrieval", "distillation"]
)
def test_memory_at_batch_1024_is_of_the_order_of_the_logits(name: str):
    """Forward and backward, 128 dimensions, 1000 prototypes, the assignment included.

    The release's pool of negatives is 2.1 GB before its copies. `pytest -rP` shows the figures.
    """
    num_videos, size = 1024, 128
    features = random_features(num_videos, size, NUM_PROTOTYPES)
    for tensor in features.values():
        tensor.requires_grad_()
    logits = 4 * (2 * num_videos) ** 2
    embeddings = 4 * num_videos * 16 * size
    scores = 4 * num_videos * 2 * NUM_PROTOTYPES
    bound = {
        "instance": 3 * logits + embeddings,
        "prototype": 5 * scores + embeddings,
        "graph": 2 * logits + 3 * scores,
        "augmentation": 3 * logits + embeddings,
        "retrieval": 4 * embeddings,
        "distillation": 3 * logits + embeddings,
    }[name]
    work = terms(features, 0.07)[name]
    peak = peak_bytes(lambda: work().backward())
    pool = 4 * (2 * num_videos) * 2 * (num_videos - 1) * size
    print(f"{name}: {peak / 1e6:.1f} MB")
    assert scores / 2 < peak < bound < pool / 25, f"{peak / 1e6:.1f} MB"


# Finite for any input


def _one_zero(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """One video has zero features."""
    return {k: torch.cat([v[:1] * 0, v[1:]]) for k, v in features.items()}


ADVERSARIAL: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "random": lambda f: f,
    "identical": lambda f: {k: v[:1, :1].expand_as(v) for k, v in f.items()},
    "zero": lambda f: {k: torch.zeros_like(v) for k, v in f.items()},
    "one-zero": _one_zero,
    "one-class": lambda f: f | {"scores": torch.eye(5)[2].expand_as(f["scores"]) * 2 - 1},
    "opposite-views": lambda f: f | {"clips": f["clips"][:, :1] * torch.tensor([[1.0], [-1.0]])},
    "altered-the-same": lambda f: f | {"altered": f["clips"][:, None].expand_as(f["altered"])},
    "huge": lambda f: {k: v if k == "scores" else v * 1e4 for k, v in f.items()},
    "tiny": lambda f: {k: v if k == "scores" else v * 1e-7 for k, v in f.items()},
}


@pytest.mark.parametrize("num_videos", [2, 7])
@pytest.mark.parametrize("tau", [0.01, 0.07])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_no_input_makes_a_term_or_its_gradient_not_finite(
    name: str, dtype: torch.dtype, tau: float, num_videos: int
):
    """Features as a backbone under autocast gives them, down to two videos and tau 0.01."""
    made = ADVERSARIAL[name](random_features(num_videos, 8, 5))
    features = {k: v.to(dtype).clone().requires_grad_() for k, v in made.items()}
    autocast = dtype if dtype != torch.float32 else torch.bfloat16
    for term, work in terms(features, tau).items():
        with torch.autocast("cpu", autocast, enabled=dtype != torch.float32):
            loss = work()
        assert loss.dtype == torch.float32
        assert loss.isfinite(), term
        loss.backward()
    for entry, leaf in features.items():
        assert leaf.grad is not None, entry
        # A vector of length near 0 has a gradient of up to 1 / (EPSILON tau): beyond float16,
        # where the loss's scaler skips the step.
        if dtype == torch.float16 and name in ("one-zero", "tiny"):
            continue
        assert leaf.grad.isfinite().all(), entry
