"""Fuzzed checkpoints: an error of one line, or the same weights; 400 edits."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strata.train.engine_state import Snapshot
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.run.checkpoint import (
    CheckpointConfig,
    RunState,
    find_checkpoint,
    read_state,
    write,
)
from strata.train.run.encoder import load_backbone
from tests.support.fuzzing import ODD_VALUES, budget, byte_edits, edited, json_edited, outcome

STATE = RunState(
    step=12,
    epoch=1,
    epoch_step=2,
    manifest_digest="a" * 64,
    plan_digest="b" * 64,
    world_size=1,
    config={"model": vars(BackboneConfig(width=8))},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; `latest` names the second."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=8))
    weights = {f"backbone.{name}": value.clone() for name, value in backbone.state_dict().items()}
    for step in (6, 12):
        weights = {
            name: value + step if value.is_floating_point() else value
            for name, value in weights.items()
        }
        snapshot = Snapshot(model=weights, training={"step.a": torch.tensor(1.0)}, loss_scale={})
        state = RunState(**{**vars(STATE), "step": step})
        write(snapshot, state, folder, CheckpointConfig())
    return folder


@contextmanager
def kept(path: Path) -> Iterator[None]:
    before = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(before)


def load(run: Path) -> tuple[int, dict[str, Tensor]] | None:
    """The position and weights that evaluation would load; None if there are none."""
    folder = find_checkpoint(run)
    if folder is None:
        return None
    backbone = load_backbone(folder)
    return read_state(folder).step, backbone.state_dict()


def same(found: tuple[int, dict[str, Tensor]] | None, run: Path, steps: set[int]) -> bool:
    """Whether nothing was loaded, or the weights of one of `steps`."""
    if found is None:
        return True
    step, weights = found
    assert step in steps
    expected = load(run / "checkpoints" / f"step-{step:09d}")
    assert expected is not None
    return all(torch.equal(weights[name], value) for name, value in expected[1].items())


FILES = ["latest", "complete.json", "state.json", "model.safetensors", "training.safetensors"]


@budget(250)
@given(st.sampled_from(FILES), byte_edits())
def test_bytes_of_any_file(run: Path, name: str, edits: Any):
    root = run / "checkpoints"
    path = root / name if name == "latest" else root / "step-000000012" / name
    with kept(path):
        path.write_bytes(edited(path.read_bytes(), edits))
        found = outcome(lambda: load(run))
    # Without a valid pointer the newest is loaded; the pointer may name the other one.
    assert same(found, run, {6, 12} if name == "latest" else {12})


@st.composite
def odd_edits(draw: st.DrawFn) -> tuple[float, str, Any]:
    """As `json_edits`, without numbers that give models of several gigabytes."""
    what = draw(st.sampled_from(["set", "set", "delete"]))
    return draw(st.floats(0, 1, exclude_max=True)), what, draw(st.sampled_from(ODD_VALUES))


@budget(150)
@given(st.sampled_from(["state.json", "complete.json"]), odd_edits())
def test_values_with_the_right_hashes(run: Path, name: str, edit: Any):
    folder = run / "checkpoints" / "step-000000012"
    state, complete = folder / "state.json", folder / "complete.json"
    with kept(state), kept(complete):
        path = folder / name
        path.write_text(json.dumps(json_edited(json.loads(path.read_bytes()), edit)))
        if name == "state.json":
            hashes = json.loads(complete.read_bytes())
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            complete.write_text(json.dumps(hashes))
        found = outcome(lambda: load(run))
        state_found = outcome(lambda: read_state(folder))
    if found is not None:
        expected = load(folder)
        assert expected is not None
        assert all(torch.equal(found[1][n], value) for n, value in expected[1].items())
    if state_found is not None:
        numbers = (state_found.step, state_found.epoch, state_found.epoch_step)
        assert all(type(n) is int and n >= 0 for n in numbers)
        assert type(state_found.config) is dict


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc", ".", "step-000000012/../..", "x" * 5000, "\0"]
)
def test_the_pointer_names_only_a_checkpoint_beside_it(run: Path, tmp_path: Path, name: str):
    copy = Path(shutil.copytree(run, tmp_path / "a" / "run"))
    shutil.copytree(run / "checkpoints" / "step-000000006", tmp_path / "a" / "evil")
    (copy / "checkpoints" / "latest").write_text(name)
    found = outcome(lambda: find_checkpoint(copy))
    assert found is None or found == copy / "checkpoints" / "step-000000012"


@pytest.mark.parametrize("lost", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_marker_without_all_hashes_is_no_marker(run: Path, tmp_path: Path, lost: str):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    complete = copy / "checkpoints" / "step-000000012" / "complete.json"
    hashes = json.loads(complete.read_bytes())
    del hashes[lost]
    complete.write_text(json.dumps(hashes))
    assert same(outcome(lambda: load(copy)), run, {6})
