"""Checkpoints: what they contain, and how they are written atomically and read.

A checkpoint is a folder `<run>/checkpoints/step-<n>/`:

    model.safetensors     weights and buffers (queue, prototypes, batch norm); enough for evaluation
    training.safetensors  Adam's state and the random state
    state.json            position, loss scale, config, digests
    complete.json         SHA-256 of every file; written last

It is written under a temporary name and renamed, then the pointer `latest` is replaced, also by a
rename, and only then older checkpoints are removed (train/run/history.py). A folder without
`complete.json` is never read, nor one whose `complete.json` lacks a file's hash. Nothing in it is
pickled, and nothing depends on the number of ranks or ZeRO's stage. DeepSpeed's own format is
pickled, depends on both, and would store the weights twice.

train/run/saver.py decides when one is written, train/run/encoder.py reads the encoder out of one.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from strata.errors import CheckpointError, NotSavedError
from strata.files import open_atomic, sha256_of, sync_path, write_atomic
from strata.ranges import check_range
from strata.train.engine import Engine
from strata.train.engine_state import Snapshot
from strata.train.run.history import COMPLETE, FOLDER, History, find_checkpoint, name_of
from strata.untrusted import Digest, decode_json

__all__ = [
    "CheckpointConfig",
    "RunState",
    "find_checkpoint",
    "read_marker",
    "read_state",
    "restore",
    "verified_weights",
    "write",
]

_MODEL = "model.safetensors"
_TRAINING = "training.safetensors"
_STATE = "state.json"
_FILES = frozenset((_MODEL, _TRAINING, _STATE))
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_MAX_JSON_BYTES = 1 << 24

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Text = Annotated[str, msgspec.Meta(max_length=200)]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints and how many to keep."""

    every_steps: int = 0
    """Steps between checkpoints; 0 writes one at each epoch's end."""
    keep: int = 3
    """How many to keep: the newest of `latest` and its ancestors."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are never removed; 0 for none."""

    def __post_init__(self) -> None:
        check_range(self, "every_steps", "keep_every", prefix="checkpoint.", at_least=0)
        check_range(self, "keep", prefix="checkpoint.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Position of a run; with weights and optimizer state, all that its future depends on."""

    step: _Count
    """Optimizer steps done since the run's start."""
    epoch: _Count
    """Epoch of the next step."""
    epoch_step: _Count
    """Step of the next step within its epoch."""
    manifest_digest: _Text
    plan_digest: _Text
    world_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    config: dict[str, Any]
    """The resolved configuration."""
    teacher_digest: _Text = ""
    """Hash of the teacher's weights; empty without a teacher."""
    num_skipped: _Count = 0
    """Steps skipped since the run's start because a loss or gradient was not finite."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """State of fp16's loss scaling; empty for other precisions."""

    def after_step(self, steps_per_epoch: int) -> "RunState":
        """The state when one more step is done."""
        last = self.epoch_step + 1 == steps_per_epoch
        return dataclasses.replace(
            self,
            step=self.step + 1,
            epoch=self.epoch + last,
            epoch_step=0 if last else self.epoch_step + 1,
        )


def write(snapshot: Snapshot, state: RunState, run: Path, config: CheckpointConfig) -> Path:
    """Write a checkpoint; it is complete when this returns. Only rank 0 calls it.

    Args:
        snapshot: The engine's state.
        state: The position of the run.
        run: The run's folder.
        config: How many to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        NotSavedError: The disk failed; partial files are removed, other checkpoints kept.
    """
    root, name = run / FOLDER, name_of(state.step)
    writing = root / f"{_TEMPORARY}{state.step:09d}"
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        for file, tensors in ((_MODEL, snapshot.model), (_TRAINING, snapshot.training)):
            with open_atomic(writing / file, sync=False) as out:
                save_file(dict(tensors), out.name)
        text = json.dumps(dataclasses.asdict(state), indent=2)
        (writing / _STATE).write_text(text, encoding="utf-8")
        _seal(writing)
        history = History(root)
        history.add(name)
        _give_name(writing, root / name)
        history.point_to(name)
        history.drop(config.keep, config.keep_every)
        for left in (*root.glob(f"{_TEMPORARY}*"), *root.glob(f"{_REPLACED}*")):
            shutil.rmtree(left)
    except (OSError, SafetensorError, CheckpointError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise NotSavedError(
            f"checkpoint {root / name} could not be written: {error}; free space or repair the "
            "disk, then start the same command again, train/main.py with --resume auto"
        ) from error
    return root / name


def _seal(writing: Path) -> None:
    """Write the completeness marker."""
    for file in _FILES:
        sync_path(writing / file)
    hashes = {file: sha256_of(writing / file) for file in sorted(_FILES)}
    write_atomic(writing / COMPLETE, json.dumps(hashes, indent=2))


def _give_name(writing: Path, final: Path) -> None:
    """Rename; a checkpoint that has this name is moved aside first and removed later."""
    if final.exists():
        aside = final.with_name(f"{_REPLACED}{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    writing.rename(final)
    sync_path(final.parent)


def _hashes(folder: Path) -> dict[str, str]:
    """The hash that a checkpoint's completeness marker gives each file."""
    marker = folder / COMPLETE
    kind = dict[str, Annotated[str, Digest]]
    return decode_json(_read(marker), kind, marker, CheckpointError, max_bytes=_MAX_JSON_BYTES)


def read_marker(folder: Path) -> str:
    """The text of a checkpoint's completeness marker, which identifies its content.

    Raises:
        CheckpointError: It is missing or of another form.
    """
    _hashes(folder)
    return _read(folder / COMPLETE).decode("utf-8")


def verified_weights(folder: Path) -> Path:
    """The file of a checkpoint's weights, after every file was compared with its hash.

    Raises:
        CheckpointError: A hash or a file is missing, or a file is altered.
    """
    marker, hashes = folder / COMPLETE, _hashes(folder)
    advice = (
        f"use an older checkpoint: write its folder's name into {folder.parent / 'latest'}, or "
        "remove this folder"
    )
    if hashes.keys() != _FILES:
        lacking = sorted(_FILES - hashes.keys())
        wrong = "lacks the hash of" if lacking else "names the unknown file"
        name = [*lacking, *sorted(hashes.keys() - _FILES)][0]
        raise CheckpointError(f"{marker} {wrong} {name[:80]!r}; {advice}")
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != expected:
            raise CheckpointError(f"checkpoint file {path} is missing or altered; {advice}")
    return folder / _MODEL


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} is not readable: {error}; use another checkpoint") from error


def read_state(folder: Path) -> RunState:
    """Read the position of a run from a checkpoint.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = folder / _STATE
    content = _read(path)
    return decode_json(content, RunState, path, CheckpointError, max_bytes=_MAX_JSON_BYTES)


def restore(engine: Engine, model: nn.Module, folder: Path) -> RunState:
    """Load weights, optimizer and random state after checking all hashes. All ranks call it.

    Args:
        engine: The engine with the optimizer.
        model: The module inside the engine.
        folder: A complete checkpoint.

    Raises:
        CheckpointError: A file is missing or altered, or does not fit the model.
    """
    weights = verified_weights(folder)
    _check_architecture(weights, model)
    state = read_state(folder)
    try:
        engine.state.restore(
            Snapshot(
                model=load_file(weights),
                training=load_file(folder / _TRAINING),
                loss_scale=state.loss_scale,
            )
        )
    except (OSError, SafetensorError, RuntimeError, KeyError, CheckpointError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model: {str(error).splitlines()[0]}; resume "
            "with the run's own config.yaml"
        ) from error
    return state


def _check_architecture(path: Path, model: nn.Module) -> None:
    """Compare the names and shapes of a file and a model, and report the first difference.

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
