"""A complete checkpoint of a random encoder."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from strata.config import plain
from strata.dataload.clips import ClipSpec
from strata.dataload.config import DataConfig
from strata.train.config import TrainConfig
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.run.checkpoint import RunState


def checkpoint(folder: Path, model: BackboneConfig, clip_frames: int = 16) -> Path:
    """Write a complete checkpoint of a random encoder, as `train/run/checkpoint.py` does."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    backbone = build_backbone(model)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.1)
    backbone.channels_last()
    weights = {f"backbone.{k}": v.contiguous() for k, v in backbone.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    save_file({"random.cpu": torch.get_rng_state()}, folder / "training.safetensors")
    clips = ClipSpec(clip_frames=clip_frames)
    config = TrainConfig(
        run=Path("/home/somebody/runs/a"),
        data=DataConfig(shards=Path("/home/somebody/shards/set"), size=32, clips=clips),
        model=model,
    )
    state = RunState(
        step=7,
        epoch=1,
        epoch_step=1,
        manifest_digest="m",
        plan_digest="p",
        world_size=1,
        config=plain(config),
    )
    (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps(hashes))
    return folder
