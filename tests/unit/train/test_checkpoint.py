"""Folders of checkpoints: which are kept, which are read, and that nothing in them is executed."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from strata.errors import CheckpointError
from strata.train.checkpoint import (
    CheckpointConfig,
    RunState,
    find_checkpoint,
    load_backbone,
    read_state,
    write,
)
from strata.train.engine import Snapshot
from strata.train.models.backbones import BackboneConfig

SNAPSHOT = Snapshot(
    model={"w": torch.ones(3)}, training={"random.cpu": torch.get_rng_state()}, loss_scale={}
)


def save(run: Path, step: int, **config: Any) -> Path:
    state = RunState(
        step=step,
        epoch=0,
        epoch_step=step,
        manifest_digest="m",
        plan_digest="p",
        world_size=1,
        config={"model": vars(BackboneConfig(width=8))},
    )
    return write(SNAPSHOT, state, run, CheckpointConfig(**config))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_are_kept_and_every_nth_for_good(tmp_path: Path):
    (tmp_path / "checkpoints" / ".writing-000000002").mkdir(parents=True)  # A kill left it.
    for step in range(1, 9):
        save(tmp_path, step, keep=2, keep_every=3)
    steps = [f"step-00000000{step}" for step in (3, 6, 7, 8)]
    assert names(tmp_path) == ["latest", *steps]
    save(tmp_path, 9, keep=1)
    assert names(tmp_path) == ["latest", "step-000000009"]


def test_only_a_whole_checkpoint_is_found(tmp_path: Path):
    assert find_checkpoint(tmp_path) is None
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    assert find_checkpoint(tmp_path) == third
    # A kill before the pointer moved: it names an older one that is whole.
    (tmp_path / "checkpoints" / "latest").write_text(f"{second.name}\n")
    assert find_checkpoint(tmp_path) == second
    # What it names is gone, or a kill came while it was removed.
    shutil.rmtree(second)
    assert find_checkpoint(tmp_path) == third
    (third / "complete.json").unlink()
    assert find_checkpoint(tmp_path) == first
    assert read_state(first).step == 1


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("by", ["pickle", "torch"])
def test_pickled_code_in_a_checkpoint_is_not_run(by: str, tmp_path: Path):
    folder, ran = save(tmp_path, 1), tmp_path / "ran"
    path = folder / "model.safetensors"
    if by == "pickle":
        path.write_bytes(pickle.dumps(Code(ran)))
    else:
        torch.save({"backbone.w": Code(ran)}, path)
    # Whoever can write the file can write its hash.
    marker = folder / "complete.json"
    hashes = json.loads(marker.read_text())
    hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    marker.write_text(json.dumps(hashes))
    with pytest.raises(CheckpointError, match="does not hold this encoder"):
        load_backbone(folder)
    assert not ran.exists()
