"""An exported encoder, loaded by the card's code, equals the checkpoint's encoder."""

import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from strata.errors import CheckpointError, ConfigError
from strata.tools.export import main
from strata.train.export import ExportCommand, load_export, write_export
from strata.train.model_card import example_code
from strata.train.models.backbones import BackboneConfig
from strata.train.run.encoder import load_backbone
from tests.support.checkpoints import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def code_in(markdown: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", markdown, flags=re.DOTALL)
    return code


def features_by(code: str, folder: Path, clips: Tensor) -> Tensor:
    """Run the code in the folder of the export."""
    script = folder / "shown.py"
    script.write_text(code)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with torch.no_grad():
            return runpy.run_path(str(script), {"clips": clips})["features"]
    finally:
        os.chdir(before)


def expected(folder: Path, clips: Tensor) -> Tensor:
    encoder = load_backbone(folder).eval()
    extra = encoder.input_conv().in_channels - clips.shape[1]
    with torch.no_grad():
        padded = nn.functional.pad(clips, (0, 0) * 3 + (0, extra))
        return encoder(padded).high.mean(dim=(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "planes", "seen"),
    [("r3d18", 3, "rgb"), ("r3d18", 3, "both"), ("s3d", 3, "rgb"), ("s3d", 4, "difference")],
)
def test_the_cards_code_gives_the_features(name: Any, planes: Any, seen: Any, tmp_path: Path):
    model = BackboneConfig(name=name, in_channels=planes, input=seen)
    made = checkpoint(tmp_path / "step-1", model)
    out = write_export(ExportCommand(checkpoint=made, out=tmp_path / "out"))
    # 112 pixels end in an odd map, where torchvision's own S3D would drop a row and a column.
    clips = torch.randn(1, 3, 8, 112, 112)
    card = (out / "README.md").read_text()
    features = features_by(code_in(card), out, clips)
    assert features.shape == (1, {"r3d18": 512, "s3d": 1024}[name])
    assert f"a vector of {features.shape[1]}" in " ".join(card.split())
    torch.testing.assert_close(features, expected(made, clips), rtol=1e-5, atol=1e-6)
    assert "Loading executes nothing" in card
    assert ("differences of neighbouring frames" in card) == (seen == "difference")


def test_the_readmes_code_is_the_cards(tmp_path: Path):
    """The test above runs this code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("in torchvision, for")[2]
    readme = readme.partition("\nShards in plain")[0]
    shown = {"file": "model.safetensors", "names": "torchvision", "backbone": {"name": "r3d18"}}
    assert code_in(readme) == example_code(shown, "exported")


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
@pytest.mark.parametrize("seen", ["rgb", "difference"])
def test_our_own_names_keep_everything(name: Any, seen: Any, tmp_path: Path):
    model = BackboneConfig(name=name, width=8, in_channels=4, input=seen)
    made = checkpoint(tmp_path / "step-1", model)
    command = ExportCommand(checkpoint=made, out=tmp_path / "out", names="strata")
    out = write_export(command)
    mine, theirs = load_file(out / "model.safetensors"), load_backbone(made).state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    clips = torch.randn(2, 4, 8, 32, 32) * torch.tensor([1.0, 1, 1, 0]).view(4, 1, 1, 1)
    features = features_by(code_in((out / "README.md").read_text()), out, clips)
    torch.testing.assert_close(features, expected(made, clips))
    assert not load_export(out).training


def test_another_stem_or_last_stage_is_kept_and_not_called_torchvision_s(tmp_path: Path):
    model = BackboneConfig(stem_pool=False, last_temporal_stride=1)
    made = checkpoint(tmp_path / "step-1", model)
    with pytest.raises(ConfigError, match="the card's code for torchvision builds that one"):
        write_export(ExportCommand(checkpoint=made, out=tmp_path / "out"))
    out = write_export(ExportCommand(checkpoint=made, out=tmp_path / "out", names="strata"))
    clips = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        features = load_export(out)(clips).high.mean(dim=(2, 3, 4))
    torch.testing.assert_close(features, expected(made, clips))


@pytest.mark.parametrize(("name", "seen"), [("r3d18", "rgb"), ("s3d", "difference")])
def test_a_program_takes_any_number_of_clips(name: Any, seen: Any, tmp_path: Path):
    model = BackboneConfig(name=name, width=8, in_channels=4, input=seen)
    made = checkpoint(tmp_path / "step-1", model)
    command = ExportCommand(checkpoint=made, out=tmp_path / "out", format="torch_export")
    out = write_export(command)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "encoder.pt2"]
    card = (out / "README.md").read_text()
    assert "run code when they are loaded" in card
    for number in (1, 5):
        clips = torch.randn(number, 3, 16, 32, 32)
        features = features_by(code_in(card), out, clips)
        torch.testing.assert_close(features, expected(made, clips), rtol=1e-5, atol=1e-6)


def test_an_export_contains_no_local_path(tmp_path: Path):
    made = checkpoint(tmp_path / "step-1", BackboneConfig(width=8))
    out = write_export(ExportCommand(checkpoint=made, out=tmp_path / "out", names="strata"))
    for name in ("config.json", "README.md"):
        text = (out / name).read_text()
        assert "somebody" not in text
        assert "set" in text
    described = json.loads((out / "config.json").read_text())
    assert described["training"]["step"] == 7
    assert described["input"]["size"] == 32


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = checkpoint(tmp_path / "step-1", BackboneConfig(width=8))
    words = ["--checkpoint", str(made), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="width is 8, torchvision's networks have 64"):
        main(words)
    assert not (tmp_path / "out").exists()
    main([*words, "--names", "strata"])
    assert "config.json, model.safetensors" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists; choose another --out"):
        main([*words, "--names", "strata"])
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "other")])


def test_a_damaged_export_is_refused(tmp_path: Path):
    made = checkpoint(tmp_path / "step-1", BackboneConfig(width=8))
    out = write_export(ExportCommand(checkpoint=made, out=tmp_path / "out", names="strata"))
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # a value of the last tensor: the file is still valid
    (out / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is damaged: its hash"):
        load_export(out)
