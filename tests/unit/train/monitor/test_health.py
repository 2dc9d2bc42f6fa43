import math

import pytest
import torch
from torch.nn import functional

from strata.train.losses.distillation import distillation_loss
from strata.train.losses.graph import distribution_graphs
from strata.train.losses.instance import instance_loss
from strata.train.losses.prototypical import prototype_loss, sinkhorn
from strata.train.losses.temporal import augmentation_loss, retrieval_loss
from strata.train.monitor import health


def test_graph_of_separate_videos_is_the_identity():
    z = torch.eye(4)[:, None].expand(-1, 2, -1)
    found = health.graph_health(distribution_graphs(z, torch.tensor([0, 0, 1, 2])))
    assert found["graph_off_diagonal_mass"].item() == pytest.approx(0, abs=1e-4)
    assert found["graph_semantic_partners"].item() == pytest.approx(0.5)
    assert found["graph_instance_partners"].item() == 0


def test_graph_of_similar_videos():
    z = torch.ones(4, 2, 8)
    found = health.graph_health(distribution_graphs(z, torch.tensor([0, 0, 1, 1])))
    assert found["graph_off_diagonal_mass"].item() == pytest.approx(0.5)
    assert found["graph_semantic_partners"].item() == pytest.approx(1)
    assert found["graph_instance_partners"].item() == pytest.approx(3)


def test_collapse_shows_before_sinkhorn():
    torch.manual_seed(0)
    # All samples nearest to prototype 2; what distinguishes them is small.
    scores = 0.01 * torch.randn(64, 2, 8)
    scores[..., 2] += 0.5
    found = health.prototype_health(scores, sinkhorn(scores))
    assert found["prototypes_in_use"].item() == 1
    assert found["prototype_entropy_nats"].item() == pytest.approx(0, abs=1e-6)
    assert found["assigned_prototypes_in_use"].item() == 8
    assert found["assigned_prototype_entropy_nats"].item() > 0.9 * math.log(8)


def test_prototypes_used_alike_have_entropy_log_k():
    scores = torch.eye(5)[:, None].expand(-1, 2, -1)
    found = health.prototype_health(scores, scores)
    assert found["prototypes_in_use"].item() == 5
    assert found["prototype_entropy_nats"].item() == pytest.approx(math.log(5))


def test_alteration_cosine_is_of_the_same_clip():
    a = torch.randn(6, 2, 4)
    altered = torch.stack([3 * a, -a], dim=1)
    found = health.alteration_health(a, altered)
    assert list(found) == ["cosine_altered_0", "cosine_altered_1"]
    assert found["cosine_altered_0"].item() == pytest.approx(1)
    assert found["cosine_altered_1"].item() == pytest.approx(-1)


def test_embeddings_uniform_on_the_sphere():
    torch.manual_seed(0)
    found = health.embedding_health(torch.randn(20_000, 16))
    assert found["embedding_std"].item() == pytest.approx(1, rel=0.01)
    assert found["embedding_effective_rank"].item() == pytest.approx(16, rel=0.01)


def test_embeddings_on_a_line_and_on_a_plane():
    line = torch.randn(50, 1).sign() * torch.ones(1, 8)
    found = health.embedding_health(line)
    assert found["embedding_effective_rank"].item() == pytest.approx(1, abs=1e-3)
    angle = torch.arange(100) / 100 * 2 * math.pi
    plane = functional.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, 6))
    found = health.embedding_health(plane)
    assert found["embedding_effective_rank"].item() == pytest.approx(2, abs=1e-3)
    assert found["embedding_std"].item() == pytest.approx(2 * 8**0.5 / 8 / 2**0.5, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_collapsed_embeddings_have_neither_spread_nor_rank(value: float):
    found = health.embedding_health(torch.full((32, 16), value))
    assert found["embedding_std"].item() == pytest.approx(0, abs=1e-5)
    assert found["embedding_effective_rank"].item() == 0


def test_values_are_scalars_without_gradient_in_float32_under_autocast():
    z = torch.randn(8, 2, 16, requires_grad=True)
    scores = torch.randn(8, 2, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        values = (
            health.embedding_health(z.flatten(0, 1))
            | health.alteration_health(z, z[:, None])
            | health.prototype_health(scores, scores)
            | health.graph_health(distribution_graphs(z, torch.arange(8)))
        )
    assert len(values) == 10
    for name, value in values.items():
        assert value.shape == (), name
        assert value.dtype == torch.float32, name
        assert not value.requires_grad, name
        assert value.isfinite(), name


def test_chance_levels_are_what_indifferent_features_reach():
    levels = health.chance_levels(
        num_videos=6, num_prototypes=9, num_alterations=2, num_long_steps={"low": 16, "high": 4}
    )
    same = torch.ones(6, 2, 4)
    measured = {
        "instance": instance_loss(same),
        "prototype": prototype_loss(torch.zeros(6, 2, 9), sinkhorn(torch.zeros(6, 2, 9))),
        "augmentation": augmentation_loss(same, same[:, None].expand(6, 2, 2, 4)),
        "graph": torch.tensor(math.log(6)),
        "distillation": distillation_loss(same, same),
        "retrieval_low": retrieval_loss(torch.ones(1, 2, 8, 4), torch.ones(1, 16, 4)),
        "retrieval_high": retrieval_loss(torch.ones(1, 2, 2, 4), torch.ones(1, 4, 4)),
    }
    assert {k: v.item() for k, v in measured.items()} == pytest.approx(levels, rel=1e-5)
    released = health.chance_levels(
        num_videos=256,
        num_prototypes=1000,
        num_alterations=1,
        num_long_steps={},
        divide_by_batch=True,
    )
    # The values that the specification measured at initialisation.
    assert released["instance"] == pytest.approx(6.24, abs=0.01)
    assert released["augmentation"] == pytest.approx(6.24, abs=0.01)
    assert released["graph"] == pytest.approx(0.022, abs=1e-3)
