"""What is state, and how it is written: whole or not at all.

A checkpoint is a folder `<run>/checkpoints/step-<n>/`:

    engine/            DeepSpeed's files: weights, buffers (queue, prototypes), Adam's state
    model.safetensors  the weights and buffers alone, for evaluation and export: no pickle
    state.json         position, config, digests
    complete.json      SHA-256 of every file; written last

It is written under a temporary name and renamed, then the pointer `latest` is moved, also by a
rename. A folder without `complete.json` is never read.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from strata.distributed import World, barrier
from strata.errors import CheckpointError, ConfigError
from strata.train.engine import Engine
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone

__all__ = [
    "CheckpointConfig",
    "RunState",
    "backbone_config",
    "find_checkpoint",
    "load_backbone",
    "read_state",
    "restore",
    "save",
]

_FOLDER = "checkpoints"
_LATEST = "latest"
_ENGINE = "engine"
_MODEL = "model.safetensors"
_STATE = "state.json"
_COMPLETE = "complete.json"
_TEMPORARY = ".writing-"
_BACKBONE = "backbone."


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints and how many to keep."""

    every_steps: int = 0
    """Steps between checkpoints; 0 writes one at each epoch's end."""
    keep: int = 3
    """How many to keep, the newest."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.every_steps < 0 or self.keep < 1:
            raise ConfigError(
                f"checkpoint.every_steps is {self.every_steps}, checkpoint.keep {self.keep}; "
                "use 0 or more, and 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands; with the weights, all that the future depends on."""

    step: int
    """Optimizer steps done since the run's start."""
    epoch: int
    """Epoch of the next step."""
    epoch_step: int
    """Step of the next step within its epoch."""
    manifest_digest: str
    plan_digest: str
    world_size: int
    config: dict[str, Any]
    """The resolved configuration."""


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def save(
    engine: Engine,
    model: nn.Module,
    state: RunState,
    run: Path,
    world: World,
    config: CheckpointConfig,
) -> Path:
    """Write a checkpoint. All ranks call it; it returns when it is whole.

    Args:
        engine: What holds the optimizer.
        model: The module inside the engine.
        state: The position.
        run: The run's folder.
        world: This rank and its peers.
        config: How many to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk refused.
    """
    root = run / _FOLDER
    final = root / f"step-{state.step:09d}"
    writing = root / f"{_TEMPORARY}{state.step:09d}"
    try:
        if world.is_first:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        barrier()
        engine.save(writing, _ENGINE)
        barrier()
        if world.is_first:
            save_file(_plain_tensors(model), writing / _MODEL)
            text = json.dumps(dataclasses.asdict(state), indent=2)
            (writing / _STATE).write_text(text, encoding="utf-8")
            _seal(writing, final)
            _point_to(root, final)
            _drop_old(root, config.keep)
        barrier()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}; free space or mend the disk, then "
            "go on with --resume auto"
        ) from error
    return final


def _seal(writing: Path, final: Path) -> None:
    """Write the completeness marker and give the folder its name."""
    files = sorted(p for p in writing.rglob("*") if p.is_file())
    hashes = {str(p.relative_to(writing)): _sha256(p) for p in files}
    for path in files:
        _sync(path)
    marker = writing / _COMPLETE
    marker.write_text(json.dumps(hashes, indent=2), encoding="utf-8")
    _sync(marker)
    shutil.rmtree(final, ignore_errors=True)
    writing.rename(final)
    _sync(final.parent)


def _point_to(root: Path, final: Path) -> None:
    temporary = root / f"{_LATEST}.tmp"
    temporary.write_text(final.name + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(root / _LATEST)
    _sync(root)


def _drop_old(root: Path, keep: int) -> None:
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    for torn in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(torn)


def find_checkpoint(path: Path) -> Path | None:
    """The newest whole checkpoint of a run, or the given checkpoint itself.

    Args:
        path: A run's folder, or a checkpoint's.

    Returns:
        A folder with a completeness marker; None where the run has none yet.
    """
    if (path / _COMPLETE).is_file():
        return path
    root = path / _FOLDER
    pointer = root / _LATEST
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8").strip()
        if (named / _COMPLETE).is_file():
            return named
    whole = [p for p in sorted(root.glob("step-*")) if (p / _COMPLETE).is_file()]
    return whole[-1] if whole else None


def _check_hashes(folder: Path) -> None:
    try:
        hashes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _COMPLETE} is not readable: {error}") from error
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != expected:
            raise CheckpointError(
                f"checkpoint file {path} is missing or altered; use an older checkpoint"
            )


def read_state(folder: Path) -> RunState:
    """The position that a checkpoint holds.

    Raises:
        CheckpointError: The file is missing or of another form.
    """
    path = folder / _STATE
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a run's state: {error}; use another") from error


def restore(engine: Engine, model: nn.Module, folder: Path) -> RunState:
    """Load everything from a checkpoint after comparing all its hashes. All ranks call it.

    DeepSpeed's files are pickled: resume only from runs that you trust. Evaluation and export read
    `model.safetensors` instead.

    Args:
        engine: What holds the optimizer.
        model: The module inside the engine.
        folder: A whole checkpoint.

    Raises:
        CheckpointError: A file is missing or altered, or does not fit the model.
    """
    _check_hashes(folder)
    _check_architecture(folder / _MODEL, model)
    engine.load(folder, _ENGINE)
    return read_state(folder)


def load_backbone(folder: Path) -> Backbone:
    """The encoder of a checkpoint, built from its own config; nothing in the file is executed.

    Raises:
        CheckpointError: A file is missing, altered or damaged.
    """
    _check_hashes(folder)
    backbone = build_backbone(backbone_config(read_state(folder).config))
    path = folder / _MODEL
    try:
        with safe_open(path, framework="pt") as tensors:
            names = [k for k in tensors.keys() if k.startswith(_BACKBONE)]
            weights = {k.removeprefix(_BACKBONE): tensors.get_tensor(k) for k in names}
        backbone.load_state_dict(weights, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold this encoder: {error}; use another checkpoint"
        ) from error
    return backbone


def backbone_config(config: dict[str, Any]) -> BackboneConfig:
    """The encoder's part of a run's resolved configuration.

    Raises:
        CheckpointError: The configuration is of another version.
    """
    try:
        return BackboneConfig(**config["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint's config does not describe an encoder: {error}; use another"
        ) from error


def _check_architecture(path: Path, model: nn.Module) -> None:
    """Compare names and shapes, to name the first that differs.

    Raises:
        CheckpointError: The file is not readable, or belongs to another architecture.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            found = {k: tuple(tensors.get_slice(k).get_shape()) for k in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not readable: {error}; use another checkpoint") from error
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if found != wanted:
        raise CheckpointError(_difference(path, found, wanted))


def _difference(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = found.keys() | wanted.keys()
    first = min(n for n in names if found.get(n) != wanted.get(n))
    return (
        f"{path} belongs to another architecture: {first} is {found.get(first, 'absent')} in the "
        f"checkpoint and {wanted.get(first, 'absent')} in the model; use the config of its run"
    )
