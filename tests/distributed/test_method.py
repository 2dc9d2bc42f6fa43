"""The complete objective on several processes equals the objective on one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from strata.dataload.config import DataConfig
from strata.distributed import World, gather, gather_with_grad, mean_over_ranks
from strata.errors import ConfigError
from strata.train.config import TrainConfig
from strata.train.losses.distillation import distillation_loss
from strata.train.losses.graph import distribution_graphs, graph_loss
from strata.train.losses.instance import instance_loss
from strata.train.losses.prototypical import hard_labels, prototype_loss, sinkhorn
from strata.train.losses.temporal import augmentation_loss, retrieval_loss
from strata.train.method.model import Embeddings, VideoModel
from strata.train.method.objective import Method
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.models.backbones import BackboneConfig
from tests.support.rank_processes import run_ranks
from tests.support.synthetic_clips import smooth_videos

BATCH = 8
PHASE = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)


def recipe(*, gather_with_grad: bool = True, threshold: float = 0.05) -> MethodConfig:
    """Settings with every term of the method, also the graph and L_aug at the high level."""
    return MethodConfig(
        weights=TermWeights(graph_high=1.0, augmentation_high=0.7, distillation=0.6),
        teacher=Path("a teacher"),
        num_prototypes=6,
        queue_length=3 * BATCH,
        embedding_size=8,
        gather_with_grad=gather_with_grad,
        graph_threshold=threshold,
    )


def build(config: MethodConfig) -> VideoModel:
    """A float64 model with batch norms in evaluation mode, since statistics differ by rank."""
    torch.manual_seed(0)
    # Four steps at the high level, so that L_aug can shuffle them.
    backbone = BackboneConfig(width=8, last_temporal_stride=1)
    model = VideoModel(backbone, config, clip_frames=16).double().eval()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        noise = torch.randn(BATCH, 2, config.num_prototypes, generator=generator)
        model.queue.push(noise.double() / 3)
    return model


def videos(rows: slice) -> tuple[Tensor, Tensor, np.ndarray]:
    """Short and long clips and indices of the global batch's rows."""
    window = smooth_videos(BATCH)
    samples = np.arange(100, 100 + BATCH)
    return window.unflatten(1, (2, 16))[rows], window[rows], samples[rows]


def features(rows: slice) -> Tensor:
    """Features of a teacher for the global batch's rows."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, 2, 64, generator=generator).double()[rows]


def embed(model: VideoModel, rows: slice) -> Embeddings:
    short, long, samples = videos(rows)
    return model(short, long, *model.orders(samples, 3, 0, 16), PHASE)


@dataclass(frozen=True)
class Step:
    values: dict[str, Tensor]
    grads: dict[str, Tensor]
    """Gradients averaged over ranks, as in the engine."""
    queue: Tensor
    assignments: Tensor
    health: dict[str, Tensor]


def step(world: World, config: MethodConfig) -> Step:
    model = build(config)
    share = BATCH // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    out = embed(model, own)
    result = Method(model, config, world).losses(
        out, PHASE, with_health=True, teacher=features(own)
    )
    result.total.backward()
    values = {**result.terms, "total": result.total}
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return Step(
        values={k: mean_over_ranks(v) for k, v in values.items()},
        grads={k: mean_over_ranks(v) for k, v in grads.items()},
        queue=model.queue.rows(),
        assignments=sinkhorn(model.queue.rows()),
        health=result.health,
    )


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of a tensor relative to its norm."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - e).norm() / e.norm()) for k, e in expected.items())


@pytest.fixture(scope="module")
def alone() -> Step:
    return run_ranks(step, 1, recipe())[0]


@pytest.fixture(scope="module")
def four() -> list[Step]:
    return run_ranks(step, 4, recipe())


def test_two_processes_give_the_values_and_gradients_of_one(alone: Step):
    _assert_equal(run_ranks(step, 2, recipe()), alone)


def test_four_processes_give_the_values_and_gradients_of_one(four: list[Step], alone: Step):
    _assert_equal(four, alone)


def _assert_equal(ranks: list[Step], alone: Step) -> None:
    assert set(alone.values) == {*vars(recipe().weights), "total"}
    # Every parameter has a gradient, so that no comparison is empty.
    assert set(alone.grads) == {k for k, _ in build(recipe()).named_parameters()}
    assert alone.health["graph_off_diagonal_mass"] > 0.1
    graph = [name for name in alone.health if name.startswith("graph_")]
    mean = {k: torch.stack([found.health[k] for found in ranks]).mean() for k in graph}
    assert relative(mean, {k: alone.health[k] for k in graph}) < 1e-9
    for found in ranks:
        assert relative(found.values, alone.values) < 1e-9
        assert relative(found.grads, alone.grads) < 1e-6


def test_queue_and_assignments_are_the_same_on_all_ranks(four: list[Step], alone: Step):
    for found in four:
        assert torch.equal(found.queue, four[0].queue)
        assert torch.equal(found.assignments, four[0].assignments)
        assert torch.equal(found.health["prototypes_in_use"], four[0].health["prototypes_in_use"])
    torch.testing.assert_close(four[0].queue, alone.queue)
    torch.testing.assert_close(four[0].assignments, alone.assignments)


def own_rows(world: World, share: int) -> list[Tensor]:
    """The rows of the graphs that each rank computes from gathered clips, joined."""
    generator = torch.Generator().manual_seed(0)
    videos = torch.randn(share * world.size, 1, 128, generator=generator)
    clips = 0.3 * videos + torch.randn(share * world.size, 2, 128, generator=generator)
    own = slice(world.rank * share, (world.rank + 1) * share)
    (of_all,) = gather_with_grad(clips[own].requires_grad_())
    labels = torch.arange(len(clips)) % 3
    return [gather(rows) for rows in distribution_graphs(of_all, labels, anchors=own)]


def test_the_rows_of_all_ranks_are_the_complete_graphs_to_the_bit():
    complete = run_ranks(own_rows, 1, 32)[0]
    assert (complete[2].diagonal() < 0.99).any()
    for found in run_ranks(own_rows, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(found, complete, strict=True))


def objective(world: World, num_parts: int, with_grad: bool) -> Step:
    """In one process: each part's anchors against all, with or without gradient to others."""
    config = recipe()
    model = build(config)
    out = embed(model, slice(None))
    model.queue.push(out.scores)
    assignments = sinkhorn(model.queue.rows())[-BATCH:]
    target = distribution_graphs(out.instance, hard_labels(assignments)).target_RB
    share = BATCH // num_parts
    total = out.instance.new_zeros(())
    for part in range(num_parts):
        own = slice(part * share, (part + 1) * share)

        def seen(embedded: Tensor, own: slice = own) -> Tensor:
            if with_grad:
                return embedded
            others = embedded.detach()
            return torch.cat([others[: own.start], embedded[own], others[own.stop :]])

        loss = instance_loss(seen(out.instance), anchors=own)
        loss = loss + 0.5 * prototype_loss(out.scores[own], assignments[own])
        assert out.taught is not None
        loss = loss + 0.6 * distillation_loss(out.taught[own], features(slice(None)), anchors=own)
        for level, weight in (("low", 0.3), ("mid", 0.5), ("high", 1.0)):
            loss = loss + weight * graph_loss(seen(out.graph[level]), target[own], anchors=own)
            steps, long = out.steps[level][own], out.long_steps[level][own]
            loss = loss + weight * retrieval_loss(steps, long)
            clips, altered = out.clips[level], out.altered[level][own]
            weight = 0.7 if level == "high" else weight
            loss = loss + weight * augmentation_loss(seen(clips), altered, anchors=own)
        total = total + loss / num_parts
    total.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return Step(
        values={"total": total.detach()},
        grads=grads,
        queue=model.queue.rows(),
        assignments=assignments,
        health={},
    )


def test_the_total_is_the_weighted_sum_of_the_equations(alone: Step):
    written_out = objective(World(), 1, True)
    torch.testing.assert_close(alone.values["total"], written_out.values["total"])
    assert relative(alone.grads, written_out.grads) < 1e-9


def test_without_gradient_from_other_ranks_exactly_that_part_is_missing(alone: Step):
    ranks = run_ranks(step, 4, recipe(gather_with_grad=False))
    expected = objective(World(), 4, False)
    assert relative(ranks[2].values, alone.values) < 1e-9
    assert relative(ranks[2].grads, expected.grads) < 1e-6
    assert relative(ranks[2].grads, alone.grads) > 1e-2


def test_shuffles_do_not_depend_on_the_rank():
    model = build(recipe())
    full = model.orders(np.arange(8), 3, 0, 16)
    for order, low, high in zip(
        full,
        model.orders(np.arange(3), 3, 0, 16),
        model.orders(np.arange(3, 8), 3, 0, 16),
        strict=True,
    ):
        assert torch.equal(order, torch.cat([low, high], dim=1))


def one_video(world: World) -> Any:
    model = build(recipe())
    own = slice(0, 1)
    return Method(model, recipe(), world).losses(
        embed(model, own), PHASE, with_health=True, teacher=features(own)
    )


def test_uneven_and_empty_batches_are_refused():
    config = TrainConfig(run=Path("runs/a"), data=DataConfig(shards=Path("shards"), batch_size=8))
    with pytest.raises(ConfigError, match="batch_size 8 does not divide by 3 ranks"):
        config.check_world(World(size=3))
    with pytest.raises(ConfigError, match="does not divide by 16 ranks"):
        config.check_world(World(size=16))
    with pytest.raises(ConfigError, match="the global batch has 1; use a global batch of at least"):
        one_video(World())
