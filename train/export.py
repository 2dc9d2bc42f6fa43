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
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import strata
from strata.errors import CheckpointError, ConfigError
from strata.files import open_atomic, sha256_of
from strata.train.hub import push, require_hub
from strata.train.model_card import PROGRAM, card, figures_of
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone
from strata.train.models.inputs import IMAGENET_MEAN, IMAGENET_STD, InputChoice
from strata.train.run.checkpoint import read_state
from strata.train.run.encoder import backbone_config, build_for_file, load_backbone, trained_clips
from strata.train.run.history import require_checkpoint
from strata.train.weights import export_backbone, load_torchvision
from strata.untrusted import decode_json

__all__ = [
    "ExportCommand",
    "exported_clips",
    "is_export",
    "load_export",
    "write_export",
]

_FORMAT = 2  # 1 had no hash of the weights
_WEIGHTS = "model.safetensors"
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
    licence: str = ""
    """Licence of the weights for the model card, as the hub names it: apache-2.0, cc-by-4.0."""
    reports: tuple[Path, ...] = ()
    """Files report.json of evaluations for the model card, besides those in the run's folder."""
    push_to_hub: str = ""
    """ORG/NAME of a repository on the Hugging Face hub to upload the export to, after `hf auth
    login`; needs strata-video[hub] and --licence."""

    def __post_init__(self) -> None:
        if self.push_to_hub:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
                raise ConfigError(f"push_to_hub is {self.push_to_hub}; use ORG/NAME")
            if not self.licence:
                raise ConfigError("push_to_hub publishes the weights; give their --licence")
            require_hub()


class _ExportedInput(msgspec.Struct, frozen=True):
    frames: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]


class _Exported(msgspec.Struct, frozen=True):
    """The part of config.json that is read again."""

    format: Literal[2]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """Hash of the file with the weights or the program."""
    backbone: dict[str, Any]
    input: _ExportedInput


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
            Or the hub does not take it; the folder is then kept.
        ConfigError: The folder exists, or torchvision has no network of this width.
    """
    if command.out.exists():
        raise ConfigError(f"{command.out} exists; choose another --out, or remove it")
    found = require_checkpoint(command.checkpoint)
    state = read_state(found)
    encoder = load_backbone(found).eval()
    trained = backbone_config(state.config)
    as_trained = command.names == "strata" and command.format == "safetensors"
    in_channels = trained.in_channels if as_trained else _NUM_COLOURS
    described = _describe(command, trained, state.config, in_channels=in_channels)
    figures = figures_of(found, command.reports)
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
            torch.export.save(program, writing / PROGRAM)
        else:
            weights = (
                {k: v.detach().contiguous() for k, v in encoder.state_dict().items()}
                if as_trained
                else export_backbone(encoder)
            )
            with open_atomic(writing / _WEIGHTS) as out:
                save_file(weights, out.name, metadata={"format": "pt"})
        described["sha256"] = sha256_of(writing / described["file"])
        text = json.dumps(described, indent=2)
        (writing / _CONFIG).write_text(text + "\n", encoding="utf-8")
        (writing / _CARD).write_text(
            card(described, figures=figures, licence=command.licence), encoding="utf-8"
        )
        writing.rename(command.out)
    except OSError as error:
        raise CheckpointError(f"{command.out} could not be written: {error}; free space") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    if command.push_to_hub:
        push(command.out, command.push_to_hub)
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
        described = _read_config(folder)
        if sha256_of(folder / _WEIGHTS) != described.sha256:
            raise CheckpointError(f"{_WEIGHTS} is damaged: its hash is not that of {_CONFIG}")
        config = backbone_config({"model": described.backbone})
        backbone = build_for_file(config, folder / _WEIGHTS)
        load_torchvision(backbone, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, CheckpointError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} is not an export with weights: {error}") from error
    return backbone.eval()


def is_export(folder: Path) -> bool:
    """Whether a folder has the files of an export."""
    return (folder / _CONFIG).is_file()


def exported_clips(folder: Path) -> tuple[int, int]:
    """Frames of the clips of an export's encoder, and their rows and columns.

    Raises:
        CheckpointError: The config is damaged.
    """
    clips = _read_config(folder).input
    return clips.frames, clips.size


def _read_config(folder: Path) -> _Exported:
    path = folder / _CONFIG
    return decode_json(path.read_bytes(), _Exported, path, CheckpointError, max_bytes=1 << 24)


def _describe(
    command: ExportCommand, trained: BackboneConfig, config: dict[str, Any], *, in_channels: int
) -> dict[str, Any]:
    """Content of config.json without the training's settings."""
    clips = trained_clips(config)
    return {
        "format": _FORMAT,
        "strata": strata.__version__,
        "file": PROGRAM if command.format == "torch_export" else _WEIGHTS,
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
