"""Which checkpoints stay and which is resumed: by the run's history, never by names alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from strata.errors import CheckpointError, NotSavedError
from strata.train.engine_state import Snapshot
from strata.train.run import checkpoint, history
from strata.train.run.checkpoint import CheckpointConfig, RunState, find_checkpoint, write

SNAPSHOT = Snapshot(
    model={"w": torch.ones(3)}, training={"random.cpu": torch.get_rng_state()}, loss_scale={}
)


def save(run: Path, *steps: int, **config: Any) -> Path:
    path = run
    for step in steps:
        state = RunState(
            step=step,
            epoch=0,
            epoch_step=step,
            manifest_digest="m",
            plan_digest="p",
            world_size=1,
            config={},
        )
        path = write(SNAPSHOT, state, run, CheckpointConfig(**config))
    return path


def move_latest(run: Path, step: int) -> None:
    (run / "checkpoints" / "latest").write_text(f"step-{step:09d}\n")


def steps(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def resumed(run: Path) -> int:
    found = find_checkpoint(run)
    assert found is not None
    return int(found.name[5:])


def test_the_newest_are_kept_and_every_nth_for_good(tmp_path: Path):
    (tmp_path / "checkpoints" / ".writing-000000002").mkdir(parents=True)  # A kill left it.
    save(tmp_path, *range(1, 9), keep=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7, 8]
    save(tmp_path, 9, keep=1)
    assert steps(tmp_path) == [9]
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["history.json", "latest", "step-000000009"]


def test_after_a_rollback_the_checkpoint_just_written_stays_and_is_resumed(tmp_path: Path):
    save(tmp_path, 2, 4, 6, 8, 10, keep=5)
    move_latest(tmp_path, 4)
    assert resumed(tmp_path) == 4
    # By their names 6, 8 and 10 are newer than 5.
    save(tmp_path, 5, keep=3)
    assert resumed(tmp_path) == 5
    assert steps(tmp_path) == [2, 4, 5]
    save(tmp_path, 6, 7, keep=3)
    assert steps(tmp_path) == [5, 6, 7]


def test_an_abandoned_branch_that_is_kept_for_good_is_never_resumed_by_itself(tmp_path: Path):
    save(tmp_path, 2, 4, 6, 8, keep=1, keep_every=4)
    assert steps(tmp_path) == [4, 8]
    move_latest(tmp_path, 4)
    save(tmp_path, 5, keep=1, keep_every=4)
    assert steps(tmp_path) == [4, 5, 8]
    # Even where what was written last is lost.
    shutil.rmtree(tmp_path / "checkpoints" / "step-000000005")
    assert resumed(tmp_path) == 4
    (tmp_path / "checkpoints" / "latest").unlink()
    assert resumed(tmp_path) in (4, 8)
    # By the user's word it is.
    move_latest(tmp_path, 8)
    assert resumed(tmp_path) == 8
    save(tmp_path, 9, keep=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9]


def test_a_step_that_the_abandoned_branch_had_is_written_again(tmp_path: Path):
    save(tmp_path, 2, 4, 6, keep=5)
    old = json.loads((tmp_path / "checkpoints/step-000000004/state.json").read_text())
    move_latest(tmp_path, 2)
    save(tmp_path, 4, keep=5)
    assert steps(tmp_path) == [2, 4]
    assert json.loads((tmp_path / "checkpoints/step-000000004/state.json").read_text()) == old
    assert resumed(tmp_path) == 4


def test_folders_that_the_run_did_not_write_stay_and_are_not_resumed(tmp_path: Path):
    save(tmp_path, 2, keep=1)
    root = tmp_path / "checkpoints"
    for name in ("step-000000099", "step-best", "step-000000001-copy"):
        shutil.copytree(root / "step-000000002", root / name)
    save(tmp_path, 4, 6, keep=1)
    assert {p.name for p in root.glob("step-*")} == {
        *("step-000000099", "step-best", "step-000000001-copy", "step-000000006"),
    }
    shutil.rmtree(root / "step-000000006")
    with pytest.raises(CheckpointError, match="neither it nor an older one is complete"):
        find_checkpoint(tmp_path)


def test_the_checkpoint_that_latest_names_survives_a_kill_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each step of writing fails once; the pointer never dangles and the run resumes."""
    moments = [
        (checkpoint, "_seal"),
        (history.History, "add"),
        (checkpoint, "_give_name"),
        (history.History, "point_to"),
        (history.History, "drop"),
        (history, "rmtree"),
    ]
    for number, (owner, name) in enumerate(moments):
        run = tmp_path / str(number)
        save(run, 1, 2, keep=1)

        def kill(*args: object, **more: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, kill)
            with pytest.raises(KeyboardInterrupt):
                save(run, 3, keep=1)
        assert resumed(run) == (3 if name in ("drop", "rmtree") else 2)
        save(run, 4, keep=1)
        assert resumed(run) == 4
        assert steps(run) == [4]
        assert not list((run / "checkpoints").glob(".*"))


def test_only_a_complete_checkpoint_is_found(tmp_path: Path):
    assert find_checkpoint(tmp_path) is None
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    assert find_checkpoint(tmp_path) == third
    # A kill before the pointer moved: it names an older one that is complete.
    move_latest(tmp_path, 2)
    assert find_checkpoint(tmp_path) == second
    # What it names is gone: the one before, not one of another branch.
    shutil.rmtree(second)
    assert find_checkpoint(tmp_path) == first
    assert find_checkpoint(first) == first


def test_a_run_of_an_older_version_has_no_list(tmp_path: Path):
    save(tmp_path, 2, 4, 6, keep=5)
    root = tmp_path / "checkpoints"
    (root / "history.json").unlink()
    assert resumed(tmp_path) == 6
    move_latest(tmp_path, 4)
    save(tmp_path, 5, keep=5)
    assert steps(tmp_path) == [2, 4, 5]
    (root / "history.json").unlink()
    (root / "latest").unlink()
    assert resumed(tmp_path) == 5


@pytest.mark.parametrize(
    "text", ["../../etc", "/etc", "", ".hidden", "step-000000001/../..", "x" * 5000, "\0"]
)
def test_a_pointer_that_is_no_name_is_refused(text: str, tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").write_text(text)
    with pytest.raises(CheckpointError, match="contains the checkpoint name"):
        find_checkpoint(tmp_path)
    with pytest.raises(NotSavedError, match="contains the checkpoint name"):
        save(tmp_path, 2)


def test_a_pointer_to_what_was_never_written_is_refused(tmp_path: Path):
    save(tmp_path, 1)
    move_latest(tmp_path, 7)
    with pytest.raises(CheckpointError, match="names step-000000007, which the run did not write"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[" * 100_000,
        '[{"name": "../../x", "continues": null}]',
        '[{"name": "step-000000001", "continues": "/etc"}]',
        '[{"name": "step-000000001"}]',
    ],
)
def test_a_damaged_list_is_one_line(text: str, tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "history.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"history\.json is not valid"):
        find_checkpoint(tmp_path)


def test_a_list_that_runs_in_a_circle_ends(tmp_path: Path):
    save(tmp_path, 1, 2)
    circle = [
        {"name": "step-000000001", "continues": "step-000000002"},
        {"name": "step-000000002", "continues": "step-000000001"},
    ]
    (tmp_path / "checkpoints" / "history.json").write_text(json.dumps(circle))
    save(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3]
