"""An export goes to the hub and comes back; the card has figures, protocol, data and licence."""

import hashlib
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import strata
from strata.errors import CheckpointError, ConfigError
from strata.tools.export import main
from strata.train.export import ExportCommand
from strata.train.models.backbones import BackboneConfig
from tests.support.checkpoints import checkpoint
from tests.support.hub_server import hub_server

TOKEN = "hf_" + "s" * 34
NAME = "somebody/encoder"


def write_report(path: Path, made: Path, name: str = "retrieval") -> None:
    path.parent.mkdir(parents=True)
    figures = {"measured": {"R@1": 0.25}, "chance": {"R@1": 0.125}}
    results = [{"data": "ucf101", "split": "1", "figures": figures, "more": 1}]
    digest = hashlib.sha256((made / "complete.json").read_bytes()).hexdigest()
    report = {"evaluation": name, "protocol": "cosine", "checkpoint_digest": digest}
    path.write_text(json.dumps(report | {"results": results}))


def test_an_export_goes_to_the_hub_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made = checkpoint(tmp_path / "run" / "checkpoints" / "step-1", BackboneConfig(width=8))
    write_report(tmp_path / "run" / "eval" / "retrieval-1" / "report.json", made)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        for name in ("ENDPOINT", "HF_HUB_CACHE"):
            value = server.url if name == "ENDPOINT" else str(tmp_path / "cache")
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        words = ["--checkpoint", str(made), "--out", str(tmp_path / "out"), "--names", "strata"]
        main([*words, "--push_to_hub", NAME, "--licence", "cc-by-4.0"])
        pushed = server.repositories[NAME]
        encoder = strata.load_encoder(NAME, device="cpu")
        with pytest.raises(CheckpointError, match=r"somebody/other cannot be fetched .*Not Found"):
            strata.load_encoder("somebody/other")
        # The client sends the token, and nothing else holds it.
        assert f"Bearer {TOKEN}" in server.tokens
    assert pushed.keys() == {"README.md", "config.json", "model.safetensors"}
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == pushed[path.name]
        assert TOKEN.encode() not in pushed[path.name]
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert f'strata.load_encoder("{NAME}")' in said.out
    clips = torch.randn(1, 3, 16, 32, 32)
    with torch.inference_mode():
        assert torch.equal(encoder(clips), strata.load_encoder(made, device="cpu")(clips))
    card = pushed["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "retrieval: cosine\n\n| ucf101, 1 | R@1 |\n|---|---|\n| measured | 25.0% |" in card
    assert "| data | `set`, manifest m |" in card


def test_what_an_upload_needs_is_asked_for_first(tmp_path: Path):
    for name, message in (("a", "use ORG/NAME"), (NAME, "give their --licence")):
        with pytest.raises(ConfigError, match=message):
            ExportCommand(checkpoint=tmp_path, out=tmp_path / "out", push_to_hub=name)


def test_the_report_of_another_checkpoint_is_refused(tmp_path: Path):
    runs = [tmp_path / name / "checkpoints" / "step-1" for name in "ab"]
    made = checkpoint(runs[0], BackboneConfig(width=8))
    other = checkpoint(runs[1], BackboneConfig(width=16))
    write_report(tmp_path / "elsewhere" / "report.json", other)
    words = ["--checkpoint", str(made), "--out", str(tmp_path / "out"), "--names", "strata"]
    with pytest.raises(CheckpointError, match="the report of another checkpoint"):
        main([*words, "--reports", str(tmp_path / "elsewhere" / "report.json")])
