"""Altered files of a checkpoint or an export: one line that says where, never a wrong network."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from strata.distributed import World
from strata.errors import CheckpointError
from strata.files import sha256_of
from strata.train.engine import Engine
from strata.train.engine_config import EngineConfig, ParameterGroup
from strata.train.engine_state import Snapshot
from strata.train.export import ExportCommand, load_export, write_export
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.run.checkpoint import (
    CheckpointConfig,
    RunState,
    read_marker,
    read_state,
    restore,
    write,
)
from strata.train.run.encoder import backbone_config, load_backbone, trained_clips
from tests.support.rank_processes import run_ranks

CONFIG = {
    "model": vars(BackboneConfig(width=8)),
    "data": {"size": 32, "clips": {"clip_frames": 8}},
}
STATE = RunState(
    step=1,
    epoch=0,
    epoch_step=1,
    manifest_digest="m",
    plan_digest="p",
    world_size=1,
    config=CONFIG,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = build_backbone(BackboneConfig(width=8)).state_dict()
    snapshot = Snapshot(
        model={f"backbone.{k}": v for k, v in weights.items()},
        training={"random.cpu": torch.get_rng_state()},
        loss_scale={},
    )
    return write(snapshot, STATE, tmp_path_factory.mktemp("run"), CheckpointConfig())


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def seal(folder: Path) -> None:
    """As somebody does who can write the files."""
    names = ("model.safetensors", "training.safetensors", "state.json")
    hashes = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    (folder / "complete.json").write_text(json.dumps(hashes))


def test_the_original_loads(folder: Path):
    weights = load_backbone(folder).state_dict()
    assert weights.keys() == build_backbone(BackboneConfig(width=8)).state_dict().keys()
    assert trained_clips(read_state(folder).config).frames == 8


@pytest.mark.parametrize("marker", ["{}", "some", "[]", "", "null", "deep", "unknown", "upper"])
def test_a_checkpoint_without_every_hash_is_incomplete(marker: str, folder: Path):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    file = folder / "complete.json"
    hashes = json.loads(file.read_text())
    match marker:
        case "some":
            hashes.pop("model.safetensors")
        case "unknown":
            hashes["../../model.safetensors"] = hashes["model.safetensors"]
        case "upper":
            hashes = {k: v.upper() for k, v in hashes.items()}
    texts = {"deep": "[" * 100_000}
    if marker in ("some", "unknown", "upper"):
        texts[marker] = json.dumps(hashes)
    file.write_text(texts.get(marker, marker))
    with pytest.raises(CheckpointError, match=r"complete\.json"):
        load_backbone(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_flipped_byte_is_found(name: str, folder: Path):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is missing or altered"):
        load_backbone(folder)


EDITS: list[tuple[str, Any]] = [
    ("step", -1),
    ("step", "1"),
    ("step", 1.5),
    ("step", 10**30),
    ("step", None),
    ("epoch", [0]),
    ("world_size", 0),
    ("manifest_digest", 3),
    ("plan_digest", "x" * 1000),
    ("config", []),
    ("config", "x"),
    ("loss_scale", {"scale": "1"}),
    ("num_skipped", True),
]


@pytest.mark.parametrize(("field", "value"), EDITS)
def test_a_state_of_another_kind_is_one_line_with_its_field(field: str, value: Any, folder: Path):
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"state\.json is not valid: .*\$\.{field}"):
        read_state(folder)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[" * 100_000, '{"step": NaN}', "\udcff", "1e999"]
)
def test_a_state_that_is_no_state_is_one_line(text: str, folder: Path):
    (folder / "state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"state\.json is not valid"):
        read_state(folder)


@pytest.mark.parametrize(
    "model",
    [
        None,
        [],
        {"width": "8"},
        {"width": 7},
        {"width": -8},
        {"name": "resnet"},
        {"in_channels": 5},
        {"bn_momentum": "x"},
        {"width": 8, "layers": 4},
    ],
)
def test_an_encoder_that_is_none_is_one_line(model: Any, folder: Path):
    with pytest.raises(CheckpointError, match="does not describe an encoder"):
        backbone_config({"model": model})


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (8192, "does not hold this encoder"),  # allowed, but far larger than the file
        (1 << 20, "does not describe an encoder: backbone: width is 1048576"),
        (1 << 40, "does not describe an encoder: backbone: width is 1099511627776"),
        (1 << 62, "does not describe an encoder: backbone: width is"),
    ],
)
def test_an_encoder_far_larger_than_its_file_is_never_built(width: int, message: str, folder: Path):
    path = folder / "state.json"
    state = json.loads(path.read_text())
    state["config"]["model"]["width"] = width
    path.write_text(json.dumps(state))
    seal(folder)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(folder)


@pytest.mark.parametrize(
    "data", [None, {}, {"size": 0, "clips": {"clip_frames": 8}}, {"size": 32, "clips": 8}]
)
def test_clips_that_are_none_are_one_line(data: Any):
    with pytest.raises(CheckpointError, match="does not describe clips"):
        trained_clips({"data": data})


def test_a_config_that_a_model_card_cannot_state_is_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="the config is not a training's"):
        write_export(ExportCommand(checkpoint=folder, out=tmp_path / "out", names="strata"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[" * 100_000,
        '{"format": 2, "sha256": "HASH", "backbone": {"width": "8"}, "input": CLIPS}',
        '{"format": 2, "sha256": "HASH", "backbone": {"width": 8388608}, "input": CLIPS}',
        '{"format": 2, "sha256": "../..", "backbone": {"width": 8}, "input": CLIPS}',
        '{"format": 9, "sha256": "HASH", "backbone": {"width": 8}, "input": CLIPS}',
    ],
)
def test_a_config_of_an_export_that_is_none_is_one_line(text: str, tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    text = text.replace("HASH", sha256_of(tmp_path / "model.safetensors"))
    text = text.replace("CLIPS", '{"frames": 16, "size": 32}')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_export(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("marker", [b"\xff{}", b'{"model.safetensors": "' + b"A" * 64 + b'"}'])
def test_the_marker_that_identifies_a_checkpoint_is_decoded_first(marker: bytes, folder: Path):
    assert read_marker(folder) == (folder / "complete.json").read_text()
    (folder / "complete.json").write_bytes(marker)
    with pytest.raises(CheckpointError, match=r"complete\.json is not valid"):
        read_marker(folder)


ODD_TRAINING: dict[str, dict[str, torch.Tensor | None]] = {
    "random.cpu": {"random.cpu": torch.zeros(5000)},
    "a short random.cpu": {"random.cpu": torch.zeros(3, dtype=torch.uint8)},
    "exp_avg": {"exp_avg.0.weight": None},
    "step": {"step.0.weight": torch.ones(2)},
    "whole numbers": {"exp_avg_sq.0.weight": torch.ones(2, 3, dtype=torch.int64)},
    "shape": {"exp_avg.0.weight": torch.ones(3, 2)},
    "name": {"exp_avg.other": torch.ones(2, 3)},
    "kind": {"secret.0.weight": torch.ones(2, 3)},
}


def test_a_state_of_training_that_does_not_fit_is_one_line(tmp_path: Path):
    """Checked when it is restored: the first step would fail otherwise, or silently differ."""
    (refused,) = run_ranks(restore_odd, 1, tmp_path)
    assert refused == list(ODD_TRAINING)


def restore_odd(world: World, tmp_path: Path) -> list[str]:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    engine = Engine(
        model,
        [ParameterGroup("all", list(model.parameters()))],
        EngineConfig(device="cpu"),
        batch_size=2,
        world=world,
        device=torch.device("cpu"),
        run=tmp_path,
    )
    engine.step(engine(torch.rand(2, 3)).square().sum(), lr_factor=1.0, frozen=())
    good = engine.state.snapshot()
    folder = write(good, STATE, tmp_path, CheckpointConfig())
    restore(engine, model, folder)
    refused = []
    for name, odd in ODD_TRAINING.items():
        training = {k: v for k, v in {**good.training, **odd}.items() if v is not None}
        save_file(training, folder / "training.safetensors")
        seal(folder)
        try:
            restore(engine, model, folder)
        except CheckpointError as error:
            refused += [name] * (str(folder) in str(error))
    return refused
