"""Export the encoder of a checkpoint for use elsewhere: weights, config and a model card.

    model.safetensors   weights and buffers; or
    encoder.pt2         the same as a program of torch.export
    config.json         architecture, input, training
    README.md           the model card, with the code that loads it

Nothing in `model.safetensors` and `config.json` can be executed. A `.pt2` may contain pickled
parts: use `torch.export.load` only for files from trusted sources. The card states this.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import strata
from strata.errors import CheckpointError, ConfigError
from strata.files import open_atomic
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone
from strata.train.models.inputs import DIFFERENCE_SCALE, IMAGENET_MEAN, IMAGENET_STD, InputChoice
from strata.train.run.checkpoint import (
    backbone_config,
    build_for_file,
    find_checkpoint,
    load_backbone,
    read_state,
    trained_clips,
)
from strata.train.weights import export_backbone, load_torchvision
from strata.untrusted import decode_json

__all__ = ["ExportCommand", "example_code", "load_export", "write_export"]

_FORMAT = 1
_WEIGHTS = "model.safetensors"
_PROGRAM = "encoder.pt2"
_CONFIG = "config.json"
_CARD = "README.md"
_PUBLISHED_WIDTH = 64
_NUM_COLOURS = 3


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Settings of an export: checkpoint, output folder, names and format."""

    checkpoint: Path
    """A run's folder, or one of its checkpoints."""
    out: Path
    """The output folder, which must not exist."""
    names: Literal["torchvision", "strata"] = "torchvision"
    """torchvision: weights that torchvision's r3d_18 or s3d can load, RGB input, width 64 only.
    strata: the encoder's own weights, any width, with a fourth input plane if it has one."""
    format: Literal["safetensors", "torch_export"] = "safetensors"
    """safetensors: weights. torch_export: a program for torch.export.load, RGB input, any number of
    clips, of the size and frames that the encoder was trained on."""


class _Exported(msgspec.Struct, frozen=True):
    """The part of config.json that `load_export` reads."""

    format: Literal[1]
    backbone: dict[str, Any]


class _CardMethod(msgspec.Struct, frozen=True):
    weights: dict[str, float]


class _CardData(msgspec.Struct, frozen=True):
    shards: str
    batch_size: int


class _CardFacts(msgspec.Struct, frozen=True):
    """The part of a training's config that the model card shows."""

    method: _CardMethod
    data: _CardData
    seed: int


class _ThreeLevels(nn.Module):
    """Wrapper that returns levels as a plain tuple, since exported programs lack our class."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, mid, high = self.backbone(clips)
        return low, mid, high


def write_export(command: ExportCommand) -> Path:
    """Write an export atomically.

    Returns:
        `command.out`.

    Raises:
        CheckpointError: There is no complete checkpoint, or it is damaged.
        ConfigError: The folder exists, or torchvision has no network of this width.
    """
    if command.out.exists():
        raise ConfigError(f"{command.out} exists; choose another --out, or remove it")
    found = find_checkpoint(command.checkpoint)
    if found is None:
        raise CheckpointError(
            f"{command.checkpoint} holds no complete checkpoint; give the folder of a run"
        )
    state = read_state(found)
    encoder = load_backbone(found).eval()
    trained = backbone_config(state.config)
    as_trained = command.names == "strata" and command.format == "safetensors"
    in_channels = trained.in_channels if as_trained else _NUM_COLOURS
    described = _describe(command, trained, state.config, in_channels=in_channels)
    described["training"] = _training(state.config, found) | {
        "step": state.step,
        "epoch": state.epoch,
        "manifest_digest": state.manifest_digest,
        "plan_digest": state.plan_digest,
    }
    if command.format == "safetensors" and not as_trained and trained.width != _PUBLISHED_WIDTH:
        raise ConfigError(
            f"the encoder's width is {trained.width}, torchvision's networks have "
            f"{_PUBLISHED_WIDTH}; use --names strata"
        )
    if command.format == "safetensors" and not as_trained and trained.is_variant:
        raise ConfigError(
            "the encoder's stem or last stage is not that of TEXT, and the card's code for "
            "torchvision builds that one; use --names strata"
        )
    writing = command.out.with_name(f".{command.out.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        if command.format == "torch_export":
            clips = described["input"]
            program = _program(encoder, trained, frames=clips["frames"], size=clips["size"])
            torch.export.save(program, writing / _PROGRAM)
        else:
            weights = (
                {k: v.detach().contiguous() for k, v in encoder.state_dict().items()}
                if as_trained
                else export_backbone(encoder)
            )
            with open_atomic(writing / _WEIGHTS) as out:
                save_file(weights, out.name, metadata={"format": "pt"})
        text = json.dumps(described, indent=2)
        (writing / _CONFIG).write_text(text + "\n", encoding="utf-8")
        (writing / _CARD).write_text(_card(described), encoding="utf-8")
        writing.rename(command.out)
    except OSError as error:
        raise CheckpointError(f"{command.out} could not be written: {error}; free space") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return command.out


def load_export(folder: str | Path) -> Backbone:
    """Load the encoder of an export with weights, in evaluation mode, without executing code.

    Args:
        folder: The export's folder.

    Raises:
        CheckpointError: A file is missing, damaged, or of another architecture.
    """
    folder = Path(folder)
    try:
        content, path = (folder / _CONFIG).read_bytes(), folder / _CONFIG
        described = decode_json(content, _Exported, path, CheckpointError, max_bytes=1 << 24)
        config = backbone_config({"model": described.backbone})
        backbone = build_for_file(config, folder / _WEIGHTS)
        load_torchvision(backbone, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, CheckpointError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} is not an export with weights: {error}") from error
    return backbone.eval()


def _describe(
    command: ExportCommand, trained: BackboneConfig, config: dict[str, Any], *, in_channels: int
) -> dict[str, Any]:
    """Content of config.json without the training's settings."""
    clips = trained_clips(config)
    return {
        "format": _FORMAT,
        "strata": strata.__version__,
        "file": _PROGRAM if command.format == "torch_export" else _WEIGHTS,
        "names": command.names,
        "backbone": dataclasses.asdict(
            dataclasses.replace(trained, in_channels=in_channels, input=_input(trained))  # type: ignore[arg-type]
        ),
        "input": {
            "layout": "NCTHW",
            "frames": clips.frames,
            "size": clips.size,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
    }


def _input(trained: BackboneConfig) -> InputChoice:
    """Kind of input of the trained encoder."""
    return "difference" if trained.input == "difference" else "rgb"


def _training(config: dict[str, Any], found: Path) -> dict[str, Any]:
    """The run's settings without paths of the machine on which it ran.

    Raises:
        CheckpointError: The config lacks a setting that the card shows.
    """
    try:
        msgspec.convert(config, _CardFacts)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{found}: the config is not a training's: {error}") from error
    kept = {k: v for k, v in config.items() if k in ("method", "schedule", "engine", "seed")}
    data = dict(config["data"])
    data["shards"] = Path(data["shards"]).name
    return {"settings": kept | {"data": data}}


def _program(
    encoder: Backbone, trained: BackboneConfig, *, frames: int, size: int
) -> torch.export.ExportedProgram:
    """Export the encoder as a program with RGB input for any number of clips."""
    rgb = dataclasses.replace(trained, in_channels=_NUM_COLOURS, input=_input(trained))
    plain = build_backbone(rgb).eval()
    load_torchvision(plain, export_backbone(encoder))
    clips = torch.zeros(2, _NUM_COLOURS, frames, size, size)
    number = torch.export.Dim("clips", min=1)
    return torch.export.export(_ThreeLevels(plain), (clips,), dynamic_shapes=({0: number},))


_TORCHVISION_CODE = {
    "r3d18": """\
from safetensors.torch import load_file
from torch import nn
from torchvision.models.video import r3d_18

model = r3d_18()
model.stem = nn.Sequential(  # Hara's stem instead of torchvision's: 7x7x7, then a max-pool
    nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False),
    nn.BatchNorm3d(64),
    nn.ReLU(inplace=True),
    nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
)
model.fc = nn.Identity()
model.load_state_dict(load_file("{folder}/model.safetensors"))
features = model.eval()(clips)
""",
    "s3d": """\
from safetensors.torch import load_file
from torch import nn
from torchvision.models.video import s3d

model = s3d()
model.features[13] = nn.MaxPool3d(2, stride=2, ceil_mode=True)  # keeps an odd last row and column
model.avgpool = model.classifier = nn.Identity()
model.load_state_dict(load_file("{folder}/model.safetensors"))
features = model.eval()(clips)
""",
}

_DIFFERENCES_CODE = f"""\
import torch

change = {DIFFERENCE_SCALE:g} * clips.diff(dim=2)  # it was trained on differences of frames
clips = torch.cat([change, change[:, :, -1:]], dim=2)
"""

_STRATA_CODE = """\
from strata.train.export import load_export

model = load_export("{folder}")
features = model(clips).high.mean(dim=(2, 3, 4))
"""

_PROGRAM_CODE = """\
import torch

model = torch.export.load("{folder}/encoder.pt2").module()
low, mid, high = model(clips)
features = high.mean(dim=(2, 3, 4))
"""


def example_code(described: dict[str, Any], folder: str) -> str:
    """Python code that loads an export and turns `clips` into `features`.

    Args:
        described: Content of config.json.
        folder: Folder of the export.
    """
    if described["file"] == _PROGRAM:
        code = _PROGRAM_CODE
    elif described["names"] == "strata":
        code = _STRATA_CODE
    else:
        code = _TORCHVISION_CODE[described["backbone"]["name"]]
        if described["backbone"].get("input", "rgb") == "difference":
            code = _DIFFERENCES_CODE + code
    return code.replace("{folder}", folder)


def _card(described: dict[str, Any]) -> str:
    """Text of the model card."""
    backbone, clips, training = described["backbone"], described["input"], described["training"]
    settings = training["settings"]
    terms = {k: v for k, v in settings["method"]["weights"].items() if v > 0}
    name = {"r3d18": "R3D-18", "s3d": "S3D"}[backbone["name"]]
    size = clips["size"]
    shape = f"[N, {backbone['in_channels']}, {clips['frames']}, {size}, {size}]"
    length = backbone["width"] * _FEATURES[backbone["name"]]
    planes = "" if backbone["in_channels"] == _NUM_COLOURS else ", then a plane of zeros"
    seen = (
        f"\n| sees | differences of neighbouring frames, times {DIFFERENCE_SCALE:g}, the last one "
        "repeated; the code below has them computed from these clips |"
        if backbone["input"] == "difference"
        else ""
    )
    trust = (
        "A `.pt2` may hold pickled parts, which run code when they are loaded: load it only if you "
        "trust its source."
        if described["file"] == _PROGRAM
        else "Loading executes nothing from the file."
    )
    return f"""\
# {name} pretrained without labels on {settings["data"]["shards"]}

A video encoder, pretrained by multi-level feature optimization (Qian et al., ICCV 2021) with Strata
{described["strata"]}. It turns a clip into a vector of {length} numbers; it has no classifier.

| | |
|---|---|
| architecture | {name}, width {backbone["width"]} |
| input | `{shape}`: clips of RGB frames in [0, 1], minus the mean {list(clips["mean"])}, divided \
by {list(clips["std"])}{planes} |{seen}
| data | `{settings["data"]["shards"]}`, manifest {training["manifest_digest"]} |
| trained | {training["step"]} steps of {settings["data"]["batch_size"]} videos, \
{training["epoch"]} epochs, seed {settings["seed"]} |
| terms of the loss | {", ".join(f"{weight:g} {term}" for term, weight in terms.items())} |
| file | `{described["file"]}`, names of {described["names"]} |

All settings are in `config.json`.

## Use

`clips` is a batch as described above; `features` becomes one vector a clip.

```python
{example_code(described, ".").rstrip()}
```

{trust}

## Limits

The encoder reflects the content and the biases of its training videos. Its quality was measured
only by the evaluation of the run. The rights in the videos are their owners'.
"""


_FEATURES = {"r3d18": 8, "s3d": 16}
"""Length of a feature vector relative to the width."""
