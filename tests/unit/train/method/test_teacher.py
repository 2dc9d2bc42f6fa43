"""A frozen teacher, and which weights of the student its loss moves."""

from pathlib import Path

import numpy as np
import pytest
import torch

import strata
from strata.distributed import World
from strata.errors import CheckpointError, ConfigError
from strata.train.method.model import VideoModel
from strata.train.method.objective import Method
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.method.teacher import Teacher
from strata.train.models.backbones import BackboneConfig
from strata.train.models.inputs import normalise
from tests.support.checkpoints import checkpoint
from tests.support.synthetic_clips import smooth_videos

FIRST = Phase(stage=1, lr_factor=1.0, queue=False, prototypes_frozen=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = BackboneConfig(width=8, input="difference")
    return checkpoint(tmp_path_factory.mktemp("teacher") / "step-1", model)


def student(folder: Path, width: int = 8) -> VideoModel:
    torch.manual_seed(0)
    config = MethodConfig(
        teacher=folder,
        weights=TermWeights(instance=0.0, distillation=1.0),
        num_prototypes=6,
        queue_length=8,
        embedding_size=8,
    )
    return VideoModel(BackboneConfig(width=width), config, clip_frames=16)


def test_features_are_those_of_the_encoder_and_nothing_moves(folder: Path):
    short = smooth_videos(2, seed=0, size=16).unflatten(1, (2, 16))
    teacher, encoder = Teacher(folder), strata.load_encoder(folder, device="cpu")
    features = teacher.features(short)
    assert features.shape == (2, 2, 64)
    assert not features.requires_grad
    for video in range(2):
        with torch.no_grad():
            expected = encoder(normalise(short[video], 4))
        torch.testing.assert_close(features[video], expected)
    assert Teacher(folder).digest == teacher.digest  # batch statistics did not move either


def test_the_digest_is_of_the_weights(folder: Path, tmp_path: Path):
    other = checkpoint(tmp_path / "step-1", BackboneConfig(width=8, input="rgb", in_channels=3))
    assert Teacher(other).digest != Teacher(folder).digest


def test_the_loss_moves_the_encoder_and_its_own_head_alone(folder: Path):
    model, teacher = student(folder), Teacher(folder)
    teacher.check(model)
    short = smooth_videos(4, seed=0, size=16).unflatten(1, (2, 16))
    out = model(short, None, *model.orders(np.arange(4), 0, 0, 16), FIRST)
    method = Method(model, model.config, World())
    terms = method.losses(out, FIRST, with_health=False, teacher=teacher.features(short))
    assert set(terms.terms) == {"prototype", "distillation"}
    assert method.chance(4, 16, 32)["distillation"] == pytest.approx(np.log(4))
    terms.total.backward()
    moved = {
        g.name
        for g in model.groups()
        if any(p.grad is not None and bool(p.grad.any()) for p in g.parameters)
    }
    assert moved == {"backbone", "global", "prototypes", "distillation"}
    assert model.frozen_groups(FIRST) == {g.name for g in model.groups()} - moved


def test_a_teacher_of_another_width_or_none_is_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="features of 64 channels, this encoder of 128"):
        Teacher(folder).check(student(folder, width=16))
    with pytest.raises(CheckpointError, match="does not exist"):
        Teacher(tmp_path / "none")
