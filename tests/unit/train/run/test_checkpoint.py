"""Loading a checkpoint never executes code from it; see also tests/security."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from strata.errors import CheckpointError
from strata.train.engine_state import Snapshot
from strata.train.models.backbones import BackboneConfig
from strata.train.run.checkpoint import CheckpointConfig, RunState, write
from strata.train.run.encoder import load_backbone

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
    # An attacker who can write the file can also write its hash.
    marker = folder / "complete.json"
    hashes = json.loads(marker.read_text())
    hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    marker.write_text(json.dumps(hashes))
    with pytest.raises(CheckpointError, match="does not hold this encoder"):
        load_backbone(folder)
    assert not ran.exists()
