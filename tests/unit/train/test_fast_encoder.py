"""Which form the encoder gets on a device, and that a compiled one is the same."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from strata.errors import CheckpointError
from strata.train import fast_encoder
from strata.train.engine_config import EngineConfig
from strata.train.fast_encoder import arrange_encoder, choose_fold, compiles
from strata.train.method.model import VideoModel
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig
from strata.train.run.encoder import backbone_config
from tests.support.synthetic_clips import smooth_videos

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = MethodConfig(num_prototypes=6, queue_length=8, embedding_size=8)


def model_of(name: str = "r3d18", width: int = 8) -> VideoModel:
    torch.manual_seed(0)
    backbone = BackboneConfig(width=width, input="both", name=name)  # type: ignore[arg-type]
    return VideoModel(backbone, SMALL, clip_frames=16)


@pytest.mark.parametrize(
    ("name", "width", "device", "precision", "amx", "memory", "fold"),
    [
        ("r3d18", 8, GPU, "bf16", False, 80e9, "frames"),
        ("r3d18", 8, GPU, "bf16", False, 40e9, "pixels"),
        ("r3d18", 8, GPU, "fp32", False, 80e9, "pixels"),
        ("r3d18", 32, CPU, "bf16", True, 0, "frames"),
        ("r3d18", 24, CPU, "bf16", True, 0, "off"),
        ("r3d18", 32, CPU, "bf16", False, 0, "off"),
        ("r3d18", 32, CPU, "auto", True, 0, "off"),
        ("s3d", 8, GPU, "bf16", False, 80e9, "off"),
    ],
)
def test_the_stem_is_folded_where_that_is_faster(
    monkeypatch, name: str, width: int, device, precision, amx: bool, memory: float, fold: str
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    # 256 videos of two clips of 16 and one of 32 frames: 11.7 GB in 16 bits.
    chosen = choose_fold(
        model_of(name, width),
        EngineConfig(precision=precision),
        device,
        num_frames=256 * 64,
        size=112,
    )
    assert chosen == fold


def test_r3d18_is_compiled_on_gpus_that_have_a_compiler(monkeypatch, caplog):
    found = {"cc": "/usr/bin/cc"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fast_encoder.shutil, "which", found.get)
    monkeypatch.setattr(fast_encoder.importlib.util, "find_spec", lambda _: object())
    auto, r3d18 = EngineConfig(), model_of()
    assert compiles(r3d18, auto, GPU)
    assert not compiles(model_of("s3d"), auto, GPU)
    assert not compiles(r3d18, auto, CPU)
    assert compiles(r3d18, EngineConfig(compile="on"), CPU)
    assert not compiles(r3d18, EngineConfig(compile="off"), GPU)
    found.clear()
    with caplog.at_level(logging.WARNING):
        assert not compiles(r3d18, auto, GPU)
    assert "the C compiler cc not found" in caplog.text


def test_a_compiled_encoder_is_the_same_and_says_when_it_is_compiled(monkeypatch, caplog):
    """As one graph with the normalisation, by the eager backend; the first step of each shape."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: original(f, backend="eager", fullgraph=True, **kw)
    )
    window = smooth_videos(2, size=32)
    phase = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)
    found = []
    for compile in ("off", "on"):
        model = model_of()
        settings = EngineConfig(compile=compile, fold_stem="frames")  # type: ignore[arg-type]
        arrange_encoder(model, settings, CPU, num_frames=128, size=32)
        orders = model.orders(np.arange(2), 0, 0, 16)
        with caplog.at_level(logging.INFO):
            steps = [model(window.unflatten(1, (2, 16)), window, *orders, phase) for _ in range(3)]
        found.append((steps[-1].instance, steps[-1].long_steps["low"]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert caplog.text.count("compiling the encoder for clips of 4x16x32x32x3") == 1
    assert caplog.text.count("compiling the encoder for clips of 2x32x32x32x3") == 1
    assert caplog.text.count("the step that compiled it for") == 2


def test_a_checkpoint_from_before_the_setting_moved_is_read():
    assert backbone_config({"model": {"width": 8, "fold_stem": True}}) == BackboneConfig(width=8)
    with pytest.raises(CheckpointError, match="unknown settings"):
        backbone_config({"model": {"width": 8, "fold": True}})
