"""What is state, and how it is written: whole or not at all.

A checkpoint is a folder `<run>/checkpoints/step-<n>/`:

    model.safetensors     weights and buffers (queue, prototypes, batch norm); enough for evaluation
    training.safetensors  Adam's state and the random state
    state.json            position, loss scale, config, digests
    complete.json         SHA-256 of every file; written last

It is written under a temporary name and renamed, then the pointer `latest` is moved, also by a
rename. A folder without `complete.json` is never read. Nothing in it is pickled, and nothing in it
depends on the number of ranks or ZeRO's stage: DeepSpeed's own format has both faults, and would
write the weights twice.

The state is copied to the host's memory between two steps (all ranks take part), and rank 0 writes
the copy in a thread while training goes on: the copy is nobody else's, so what is written cannot
depend on when.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from strata.errors import CheckpointError, ConfigError, NotSavedError
from strata.train.engine import Engine, Snapshot
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone

__all__ = [
    "CheckpointConfig",
    "RunState",
    "Saver",
    "Written",
    "backbone_config",
    "find_checkpoint",
    "load_backbone",
    "read_state",
    "restore",
    "write",
]

_FOLDER = "checkpoints"
_LATEST = "latest"
_MODEL = "model.safetensors"
_TRAINING = "training.safetensors"
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
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none so."""

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
    num_skipped: int = 0
    """Steps left out since the run's start because something was not finite."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """State of fp16's loss scaling; empty without."""


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


class Saver:
    """Writes checkpoints of one run, one at a time, in a thread of rank 0.

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
        """Start to write; waits for the one before."""
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
        """Let what was begun come to its end; a failure that nobody took is dropped."""
        self._join()

    def finish(self) -> "Written | None":
        """Wait for the writing and take its result.

        Raises:
            NotSavedError: It could not be written.
        """
        self._join()
        return self.take()

    def take(self) -> "Written | None":
        """What was written since the last call, without waiting.

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
    """A checkpoint that is whole."""

    path: Path
    step: int
    took_s: float
    """From the copy in memory to the pointer on the disk."""


def write(snapshot: Snapshot, state: RunState, run: Path, config: CheckpointConfig) -> Path:
    """Write a checkpoint; it is whole when this returns. Only rank 0 calls it.

    Args:
        snapshot: The engine's state.
        state: The position.
        run: The run's folder.
        config: How many to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        NotSavedError: The disk refused; nothing is left of the attempt, and the others stay.
    """
    root = run / _FOLDER
    final = root / f"step-{state.step:09d}"
    writing = root / f"{_TEMPORARY}{state.step:09d}"
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        save_file(dict(snapshot.model), writing / _MODEL)
        save_file(dict(snapshot.training), writing / _TRAINING)
        text = json.dumps(dataclasses.asdict(state), indent=2)
        (writing / _STATE).write_text(text, encoding="utf-8")
        _seal(writing, final)
        _point_to(root, final)
        _drop_old(root, config)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise NotSavedError(
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


def _drop_old(root: Path, config: CheckpointConfig) -> None:
    every = config.keep_every
    for old in sorted(root.glob("step-*"))[: -config.keep]:
        if every == 0 or int(old.name.removeprefix("step-")) % every:
            # A kill while files are removed must not leave a folder that looks whole.
            (old / _COMPLETE).unlink(missing_ok=True)
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
                f"checkpoint file {path} is missing or altered; use an older checkpoint: write its "
                f"folder's name into {folder.parent / _LATEST}, or remove this folder"
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

    Args:
        engine: What holds the optimizer.
        model: The module inside the engine.
        folder: A whole checkpoint.

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
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model: {str(error).splitlines()[0]}; resume "
            "with the run's own config.yaml"
        ) from error
    return state


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
