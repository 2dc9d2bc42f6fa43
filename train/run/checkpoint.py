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

The state is copied to the host's memory between two steps (all ranks take part), and rank 0 writes
the copy in a thread while training continues. Nothing else uses the copy, so the files do not
depend on when it is written.
"""

import dataclasses
import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from strata.errors import CheckpointError, ConfigError, NotSavedError
from strata.files import open_atomic, sha256_of, sync_path, write_atomic
from strata.train.engine import Engine, Snapshot
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone
from strata.train.run.history import COMPLETE, FOLDER, History, find_checkpoint, name_of
from strata.untrusted import Digest, decode_json

__all__ = [
    "CheckpointConfig",
    "RunState",
    "Saver",
    "TrainedClips",
    "Written",
    "backbone_config",
    "build_for_file",
    "find_checkpoint",
    "load_backbone",
    "read_marker",
    "read_state",
    "restore",
    "trained_clips",
    "write",
]

_MODEL = "model.safetensors"
_TRAINING = "training.safetensors"
_STATE = "state.json"
_FILES = frozenset((_MODEL, _TRAINING, _STATE))
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_BACKBONE = "backbone."
_MAX_JSON_BYTES = 1 << 24
_SPARE_BYTES = 1 << 20

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
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.every_steps < 0 or self.keep_every < 0 or self.keep < 1:
            raise ConfigError(
                f"checkpoint.every_steps is {self.every_steps}, checkpoint.keep {self.keep}, "
                f"checkpoint.keep_every {self.keep_every}; use 0 or more, 1 or more, 0 or more"
            )


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
    num_skipped: _Count = 0
    """Steps skipped since the run's start because a loss or gradient was not finite."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """State of fp16's loss scaling; empty for other precisions."""


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread of rank 0.

    Args:
        run: The run's folder.
        config: How many to keep.
    """

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self._run, self._config = run, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: Written | None = None

    def begin(self, snapshot: Snapshot, state: RunState) -> None:
        """Start to write a checkpoint, after waiting for the previous one."""
        self._join()
        self._thread = threading.Thread(
            target=self._work, args=(snapshot, state), name="strata-saver"
        )
        self._thread.start()

    def _work(self, snapshot: Snapshot, state: RunState) -> None:
        start = time.perf_counter()
        try:
            path = write(snapshot, state, self._run, self._config)
            self._written = Written(path, state.step, time.perf_counter() - start)
        except BaseException as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait for the checkpoint that is being written; its failure is not reported."""
        self._join()

    def finish(self) -> "Written | None":
        """Wait for the checkpoint that is being written and return its result.

        Raises:
            NotSavedError: It could not be written.
        """
        self._join()
        return self.take()

    def take(self) -> "Written | None":
        """The checkpoint written since the last call, if any, without waiting.

        Raises:
            NotSavedError: It could not be written.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        written, self._written = self._written, None
        return written


@dataclass(frozen=True)
class Written:
    """A complete checkpoint."""

    path: Path
    step: int
    took_s: float
    """Seconds from the copy in memory to the pointer on disk."""


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
            "disk, then resume with --resume auto"
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


def _check_hashes(folder: Path) -> None:
    """Compare every file of a checkpoint with its hash.

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
    _check_hashes(folder)
    _check_architecture(folder / _MODEL, model)
    state = read_state(folder)
    try:
        engine.restore(
            Snapshot(
                model=load_file(folder / _MODEL),
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


def load_backbone(folder: Path) -> Backbone:
    """Load the encoder of a checkpoint, built from its own config; no code in it is executed.

    Raises:
        CheckpointError: A file is missing, altered or damaged.
    """
    _check_hashes(folder)
    path = folder / _MODEL
    backbone = build_for_file(backbone_config(read_state(folder).config), path)
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


def build_for_file(config: BackboneConfig, path: Path) -> Backbone:
    """Build the encoder for a weights file; refuse one that is larger than the file.

    Raises:
        CheckpointError: The encoder has far more weights than the file.
    """
    try:
        with torch.device("meta"):
            sketch = build_backbone(config)
        due = sum(t.numel() * t.element_size() for t in sketch.state_dict().values())
        found = path.stat().st_size
    except (OSError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} does not hold this encoder: {error}") from error
    if due > 2 * found + _SPARE_BYTES:
        raise CheckpointError(
            f"{path} does not hold this encoder: it has {found} bytes, an encoder of width "
            f"{config.width} has {due}; use another checkpoint"
        )
    return build_backbone(config)


def backbone_config(config: dict[str, Any]) -> BackboneConfig:
    """Parse the encoder's settings of a run's resolved configuration.

    Raises:
        CheckpointError: The configuration is of another version.
    """
    described = config.get("model")
    known = {f.name for f in dataclasses.fields(BackboneConfig)}
    try:
        if isinstance(described, dict):
            # How the stem is computed was once a setting here; it is no property of the weights.
            described = {k: v for k, v in described.items() if k != "fold_stem"}
        if isinstance(described, dict) and not described.keys() <= known:
            raise ConfigError(f"unknown settings {sorted(map(str, described.keys() - known))[:3]}")
        return msgspec.convert(described, BackboneConfig)
    except (msgspec.ValidationError, ConfigError) as error:
        raise CheckpointError(
            f"the checkpoint's config does not describe an encoder: {error}; use another one"
        ) from error


class _ClipPart(msgspec.Struct, frozen=True):
    clip_frames: Annotated[int, msgspec.Meta(ge=2, le=1 << 12)]


class TrainedClips(msgspec.Struct, frozen=True):
    """Settings of the clips that an encoder was trained on, read from a run's config."""

    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
    """Rows and columns."""
    clips: _ClipPart

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return self.clips.clip_frames


def trained_clips(config: dict[str, Any]) -> TrainedClips:
    """Parse the clip settings of a run's resolved configuration.

    Raises:
        CheckpointError: It has no valid clip settings.
    """
    try:
        return msgspec.convert(config.get("data"), TrainedClips)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint's config does not describe clips: {error}; use another"
        ) from error


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
