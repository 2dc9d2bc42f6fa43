"""Synchronised batch norm in the complete model: torch's on GPUs, ours on CPUs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from strata.train.method.model import VideoModel
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig
from strata.train.models.motion import MotionExcitation
from strata.train.models.synced_norm import HostSyncedNorm, synchronise_norms
from tests.support.synthetic_clips import smooth_videos

PHASE = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)
NORMS = (nn.BatchNorm1d, nn.BatchNorm3d)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("settings", [{}, {"name": "s3d"}], ids=["r3d18", "s3d"])
def test_conversion_keeps_everything_but_the_kind_of_norm(settings: dict, device: str):
    """In evaluation: in training torch's synchronised norm takes CUDA tensors alone."""
    kind = nn.SyncBatchNorm if device == "cuda" else HostSyncedNorm
    torch.manual_seed(0)
    backbone = BackboneConfig(width=8, in_channels=4, **settings)
    config = MethodConfig(num_prototypes=6, queue_length=24, embedding_size=8)
    model = VideoModel(backbone, config, clip_frames=16)
    window = smooth_videos(2, size=32)
    given = (window.unflatten(1, (2, 16)), window, *model.orders(np.arange(2), 0, 0, 16), PHASE)
    with torch.no_grad():
        model(*given)  # Running statistics away from 0 and 1.
        before = copy.deepcopy(model).eval()(*given)
    names, count = list(model.state_dict()), sum(isinstance(m, NORMS) for m in model.modules())
    parameters = {id(p) for g in model.groups() for p in g.parameters}

    synchronise_norms(model, torch.device(device))
    converted = model
    assert list(converted.state_dict()) == names
    assert sum(isinstance(m, kind) for m in converted.modules()) == count
    assert not any(isinstance(m, NORMS) for m in converted.modules())
    # The same tensors, so that parameter groups and optimisers stay valid.
    assert {id(p) for g in converted.groups() for p in g.parameters} == parameters
    momenta = {m.momentum for m in converted.backbone.modules() if isinstance(m, kind)}
    assert momenta == {backbone.bn_momentum}
    for branch in converted.motion.values():
        assert isinstance(branch, MotionExcitation)
        assert isinstance(branch.squeeze_norm, kind)
        assert isinstance(branch.expand_norm, kind)
    with torch.no_grad():
        after = converted.eval()(*given)
    torch.testing.assert_close(after.scores, before.scores, rtol=0, atol=0)
    for level in ("low", "mid"):
        torch.testing.assert_close(after.altered[level], before.altered[level], rtol=0, atol=0)
        torch.testing.assert_close(after.long_steps[level], before.long_steps[level])
