import io
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.video import r3d_18
from torchvision.models.video import s3d as torchvision_s3d

from strata.errors import CheckpointError
from strata.train.method.model import VideoModel
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone
from strata.train.weights import (
    export_backbone,
    load_release,
    load_torchvision,
    read_weights,
)
from tests.support.fuzzing import budget, byte_edits, edited, outcome


def encoder(name: str, *, width: int = 8, in_channels: int = 3, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    config = BackboneConfig(name=name, width=width, in_channels=in_channels)  # pyright: ignore[reportArgumentType]
    backbone = build_backbone(config).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.running_var, 0.5, 2)  # pyright: ignore[reportArgumentType]
    return backbone


def same_features(one: Backbone, other: Backbone) -> bool:
    """Whether features are equal on RGB clips, with zeros in a fourth plane."""
    clips = torch.randn(1, 3, 8, 32, 32)
    outputs = []
    for backbone in (one, other):
        extra = backbone.input_conv().in_channels - 3
        with torch.no_grad():
            outputs.append(backbone(nn.functional.pad(clips, (0, 0) * 3 + (0, extra))))
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", ["r3d18", "s3d"])
@pytest.mark.parametrize(("planes", "into"), [(3, 3), (4, 3), (3, 4), (4, 4)])
def test_exported_weights_load_and_compute_the_same(name: str, planes: int, into: int):
    source = encoder(name, in_channels=planes)
    source.channels_last()
    weights = export_backbone(source)
    assert all(v.is_contiguous() and not v.requires_grad for v in weights.values())
    target = encoder(name, in_channels=into, seed=1)
    assert not same_features(source, target)
    loaded = load_torchvision(target, weights)
    assert same_features(source, target)
    assert not loaded.kept
    assert not loaded.left
    # The weights are copies: changing the source has no effect.
    before = source.input_conv().weight.clone()
    next(iter(weights.values())).zero_()
    assert torch.equal(source.input_conv().weight, before)


def test_s3d_goes_to_and_from_torchvision_s():
    theirs = torchvision_s3d()
    ours = encoder("s3d", width=64, in_channels=4)
    loaded = load_torchvision(ours, theirs.state_dict())
    assert loaded.left == ("classifier.1.bias", "classifier.1.weight")
    assert not loaded.kept
    missing, unexpected = torchvision_s3d().load_state_dict(export_backbone(ours), strict=False)
    assert not unexpected
    assert set(missing) == set(loaded.left)
    for name, value in export_backbone(ours).items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_r3d18_shares_its_stages_with_torchvision_s_but_not_the_stem():
    theirs, ours = r3d_18(), encoder("r3d18", width=64)
    stem = ours.input_conv().weight.detach().clone()
    loaded = load_torchvision(ours, theirs.state_dict())
    assert {n.partition(".")[0] for n in loaded.kept} == {"stem"}
    assert {n.partition(".")[0] for n in loaded.left} == {"stem", "fc"}
    assert torch.equal(ours.input_conv().weight, stem)
    stages = {k: v for k, v in export_backbone(ours).items() if not k.startswith("stem.")}
    assert stages.keys() == {n for n in theirs.state_dict() if n.startswith("layer")}
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in stages.items())
    # torchvision rejects the stem by its shape.
    with pytest.raises(RuntimeError, match=r"stem\.0\.weight"):
        theirs.load_state_dict(export_backbone(ours), strict=False)


class Release(nn.Module):
    """Modules of the release as method.md 2 and 3 describe them, under its names; width 8."""

    def __init__(self, width: int = 8, size: int = 6, num_prototypes: int = 5) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Conv3d(3, width, 7, bias=False)
        self.backbone.bn1 = nn.BatchNorm3d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(1, 5):
            blocks = []
            for number in range(2):
                block = nn.Module()
                before = widths[stage - 1] if number == 0 else widths[stage]
                block.conv1 = nn.Conv3d(before, widths[stage], 3, bias=False)
                block.bn1 = nn.BatchNorm3d(widths[stage])
                block.conv2 = nn.Conv3d(widths[stage], widths[stage], 3, bias=False)
                block.bn2 = nn.BatchNorm3d(widths[stage])
                if number == 0 and stage > 1:
                    conv = nn.Conv3d(before, widths[stage], 1, bias=False)
                    block.downsample = nn.Sequential(conv, nn.BatchNorm3d(widths[stage]))
                blocks.append(block)
            setattr(self.backbone, f"layer{stage}", nn.Sequential(*blocks))
        self.backbone.fc = nn.Linear(8 * width, 400)
        levels = {"low": 2 * width, "mid": 4 * width}
        for level, channels in levels.items():
            block = nn.Module()
            squeezed = channels // 16
            block.conv1 = nn.Conv2d(channels, squeezed, 1, bias=False)
            block.bn1 = nn.BatchNorm2d(squeezed)
            block.conv2 = nn.Conv2d(squeezed, squeezed, 3, groups=squeezed, bias=False)
            block.conv3 = nn.Conv2d(squeezed, channels, 1, bias=False)
            block.bn3 = nn.BatchNorm2d(channels)
            setattr(self.backbone, f"me{level}", nn.Sequential(block))
        for level, channels in {"": 8 * width, **{f"_{k}": v for k, v in levels.items()}}.items():
            for use in ("", "_graph", "_fine"):
                head = nn.Sequential(
                    nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, size, 1)
                )
                setattr(self, f"project{level}{use}", head)
        self.project_global = nn.Sequential(
            nn.Linear(8 * width, 8 * width),
            nn.BatchNorm1d(8 * width),
            nn.ReLU(),
            nn.Linear(8 * width, size),
        )
        self.prototype = nn.Linear(size, num_prototypes, bias=False)


def video_model(weights: TermWeights | None = None) -> VideoModel:
    torch.manual_seed(1)
    config = MethodConfig(
        weights=weights or TermWeights(graph_high=1.0),
        num_prototypes=5,
        embedding_size=6,
        queue_length=8,
        shuffle=False,
    )
    return VideoModel(BackboneConfig(width=8, in_channels=4), config, clip_frames=16)


def release_weights() -> dict[str, Tensor]:
    """Weights with all elements different, so that an exchange is detected."""
    torch.manual_seed(0)
    state = Release().state_dict()
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = value + 7
        else:
            # Small, so that features are finite; variances are positive.
            drawn = 0.2 * torch.randn_like(value)
            weights[name] = 1 + drawn.abs() if name.endswith("running_var") else drawn
    return weights


def test_every_weight_of_the_release_finds_its_place():
    model, weights = video_model(), release_weights()
    loaded = load_release(model, weights)
    assert loaded.left == ("backbone.fc.bias", "backbone.fc.weight")
    assert loaded.kept == ("queue.filled", "queue.scores")
    state = model.state_dict()
    pairs = {
        "backbone.conv1.weight": "backbone.stem.0.weight",
        "backbone.layer3.0.bn2.running_var": "backbone.layer3.0.conv2.1.running_var",
        "backbone.layer3.0.downsample.1.weight": "backbone.layer3.0.downsample.1.weight",
        "backbone.layer4.1.conv1.weight": "backbone.layer4.1.conv1.0.weight",
        "backbone.melow.0.conv1.weight": "motion.low.squeeze.weight",
        "backbone.memid.0.conv2.weight": "motion.mid.depthwise_weight",
        "backbone.memid.0.bn3.running_mean": "motion.mid.expand_norm.running_mean",
        "project.2.weight": "instance_head.project.weight",
        "project_fine.0.bias": "retrieval_heads.high.hidden.bias",
        "project_graph.2.bias": "graph_heads.high.project.bias",
        "project_low.0.weight": "augmentation_heads.low.hidden.weight",
        "project_mid_fine.2.weight": "retrieval_heads.mid.project.weight",
        "project_mid_graph.0.weight": "graph_heads.mid.hidden.weight",
        "project_global.1.weight": "global_head.norm.weight",
        "project_global.3.bias": "global_head.project.bias",
        "prototype.weight": "prototypes.weight",
    }
    for theirs, ours in pairs.items():
        found = state[ours][:, :3] if ours == "backbone.stem.0.weight" else state[ours]
        assert torch.equal(found.flatten(), weights[theirs].flatten()), theirs
    # Every weight of the release is used once, and the zero plane is still zero.
    assert len(loaded.taken) == len(weights) - len(loaded.left)
    assert not state["backbone.stem.0.weight"][:, 3].any()


def test_the_encoder_alone_and_recipes_with_fewer_heads_take_their_part():
    weights = release_weights()
    alone, model = encoder("r3d18"), video_model(TermWeights(augmentation_low=0, graph_mid=0))
    load_release(alone, weights)
    loaded = load_release(model, weights)
    assert same_features(alone, model.backbone.eval())
    assert {n.partition(".")[0] for n in loaded.left if not n.startswith("backbone")} == {
        "project_low",
        "project_mid_graph",
        "project_graph",
    }


def test_files_are_read_without_running_them(tmp_path: Path):
    weights = release_weights()
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}},
        tmp_path / "a.pth.tar",
    )
    read = read_weights(tmp_path / "a.pth.tar")
    assert read.keys() == weights.keys()
    torch.save(Release(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"whole\.pth is not readable as weights"):
        read_weights(tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_weights(tmp_path / "list.pth")
    for name in ("absent.pth", "absent.safetensors"):
        with pytest.raises(CheckpointError, match="not readable"):
            read_weights(tmp_path / name)


def test_weights_that_do_not_fit_are_rejected_and_change_nothing():
    target = encoder("r3d18")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape("layer1.0.conv1.0.weight is (16, 16, 3")):
        load_torchvision(target, export_backbone(encoder("r3d18", width=16)))
    with pytest.raises(CheckpointError, match=r"lacks .* of the encoder's .* another architecture"):
        load_torchvision(target, export_backbone(encoder("s3d")))
    incomplete = export_backbone(encoder("r3d18", seed=1))
    del incomplete["layer4.1.conv1.0.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 1 of .* first layer4\.1\.conv1\.0\.weight"):
        load_torchvision(target, incomplete)
    with pytest.raises(CheckpointError, match="lacks"):
        load_release(target, export_backbone(encoder("s3d")))
    with pytest.raises(CheckpointError, match=r"an R3D-18 only; set model\.name r3d18"):
        load_release(encoder("s3d"), release_weights())
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_compressed_weights_are_refused_before_they_are_unpacked(tmp_path: Path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    assert read_weights(tmp_path / "plain.pt")["a"].shape == (1 << 20,)
    with pytest.raises(CheckpointError, match=r"bomb\.pt .* is compressed, to 4\d{6} bytes"):
        read_weights(tmp_path / "bomb.pt")


@pytest.fixture(scope="module")
def weight_files() -> dict[str, bytes]:
    """A file of each format by its suffix."""
    tensors = {f"layer.{k}.weight": torch.randn(3, 4) for k in range(3)}
    found = {".safetensors": safetensors.torch.save(tensors)}
    for suffix, is_zip in ((".pt", True), (".pth", False)):
        file = io.BytesIO()
        torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=is_zip)
        found[suffix] = file.getvalue()
    return found


@budget(300)
@given(st.sampled_from([".safetensors", ".pt", ".pth"]), byte_edits())
def test_edited_weights_are_read_or_refused_in_one_line(
    weight_files: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    edits: Any,
):
    """Other values are not found: these files have no hash."""
    path = tmp_path_factory.getbasetemp() / f"edited{suffix}"
    path.write_bytes(edited(weight_files[suffix], edits))
    found = outcome(lambda: read_weights(path))
    assert found is None or all(isinstance(value, Tensor) for value in found.values())
