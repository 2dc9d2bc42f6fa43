"""Where the sense of time comes from: short training on generated videos."""

import math

import numpy as np
import pytest
import torch

from strata.distributed import World
from strata.train.method import LossTerms, Method, MethodConfig, TermWeights, VideoModel
from strata.train.models.backbones import BackboneConfig
from strata.train.schedules import Phase
from tests.clips import slowing_videos

BATCH = 12
PHASE = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)
# The terms of one level that show it, and what keeps the features apart: a third of the work.
WEIGHTS = TermWeights(
    graph_low=0,
    graph_mid=0,
    augmentation_low=0,
    augmentation_mid=1,
    retrieval_low=0,
    retrieval_mid=0,
    retrieval_high=0,
)


def train(num_steps: int, *, excite: bool, shuffle: bool) -> list[LossTerms]:
    """Each step's terms, with the health of the representation."""
    torch.manual_seed(0)
    config = MethodConfig(
        weights=WEIGHTS,
        num_prototypes=16,
        queue_length=4 * BATCH,
        embedding_size=32,
        shuffle=shuffle,
    )
    model = VideoModel(BackboneConfig(width=8), config, clip_frames=16)
    model.motion["mid"].excite = excite  # pyright: ignore[reportArgumentType]
    method = Method(model, config, World())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history: list[LossTerms] = []
    for step in range(num_steps):
        clips, _ = slowing_videos(BATCH, seed=step)
        orders = model.orders(np.arange(BATCH) + BATCH * step, 0, 0, 16)
        out = model(clips.unflatten(1, (2, 16)), None, *orders, PHASE)
        terms = method.losses(out, PHASE, with_health=True)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append(terms)
    return history


@pytest.mark.parametrize(("shuffle", "candidates"), [(False, 3), (True, 5)])
def test_without_motion_excitation_l_aug_cannot_fall_below_the_alterations(
    shuffle: bool, candidates: int
):
    for step in train(20, excite=False, shuffle=shuffle):
        assert float(step.terms["augmentation_mid"]) >= math.log(candidates) - 1e-4
        assert float(step.health["cosine_altered_0_mid"]) == pytest.approx(1, abs=1e-5)


def test_with_it_the_features_learn_the_order_of_time():
    last = train(56, excite=True, shuffle=True)[-8:]

    def mean(name: str) -> float:
        return float(np.mean([float({**step.terms, **step.health}[name]) for step in last]))

    assert mean("augmentation_mid") < math.log(3)
    assert mean("cosine_altered_0_mid") < 0.8
    assert mean("cosine_altered_1_mid") < 0.9
