"""What a run survives: signals, kills at any moment, a full disk; and what it says of the rest."""

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.commands import TINY, records
from tests.forked import ForkServer, Rank


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("outputs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def arguments(tiny: Path, shards: Path, tmp_path: Path) -> list[str | Path]:
    """Of a run of 18 steps: queue and second stage from step 7, lower rate from step 13."""
    return ["--config", tiny, "--data.shards", shards / "train", "--run", tmp_path / "run"]


@pytest.fixture(scope="module")
def whole(
    server: ForkServer, tiny: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Runs never stopped, by the number of ranks."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = tmp_path_factory.mktemp("whole") / "run"
        words = ["--config", tiny, "--data.shards", shards / "train", "--run", runs[ranks]]
        server.finish(*words, ranks=ranks)
    return runs


def step_of(run: Path) -> int:
    """How far a run says it is."""
    log = run / "log.jsonl"
    if not log.is_file():
        return 0
    lines = [json.loads(x) for x in log.read_text().splitlines(keepends=True) if x.endswith("\n")]
    return max((r["step"] for r in lines if r["kind"] == "step"), default=0)


def wait_for_step(run: Path, step: int, group: list[Rank]) -> None:
    deadline = time.monotonic() + 120
    while step_of(run) < step:
        assert time.monotonic() < deadline
        assert not any(rank.over.is_set() for rank in group), group[0].text()
        time.sleep(0.01)


def last(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, buffers and Adam's state, to the bit."""
    for name in ("model.safetensors", "training.safetensors"):
        mine, theirs = load_file(last(run) / name), load_file(last(other) / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on(
    number: signal.Signals,
    ranks: int,
    server: ForkServer,
    arguments: list[str | Path],
    whole: dict[int, Path],
    tmp_path: Path,
):
    run = tmp_path / "run"
    group = server.start(*arguments, ranks=ranks)
    wait_for_step(run, 3, group)
    group[-1].kill(number)
    assert [rank.wait() for rank in group] == [75] * ranks
    assert f"{number.name}: saving at the end of this step" in group[-1].text()
    (stopped,) = records(run, "stopped")
    assert last(run).name == f"step-{stopped['step']:09d}"
    assert "go on with --resume auto" in group[0].text()
    server.finish(*arguments, "--resume", "auto", ranks=ranks)
    assert_same_end(run, whole[ranks])


# After a checkpoint of any step: within an epoch, at the switch of stages with the queue's first
# use, at the drop of the learning rate, one before and one after them.
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 12, 13])
def test_resume_is_exact_after_any_step(
    stop: int,
    server: ForkServer,
    arguments: list[str | Path],
    whole: dict[int, Path],
    tmp_path: Path,
):
    ranks = 1 + stop % 2
    server.finish(*arguments, "--stop_after_steps", str(stop), ranks=ranks)
    server.finish(*arguments, "--resume", "auto", ranks=ranks)
    assert_same_end(tmp_path / "run", whole[ranks])


def test_killed_at_20_moments_and_the_end_is_the_same(
    server: ForkServer,
    arguments: list[str | Path],
    whole: dict[int, Path],
    tmp_path: Path,
):
    run, chance = tmp_path / "run", random.Random(0)
    often = (*arguments, "--resume", "auto", "--checkpoint.every_steps", "1")
    kills, found = 0, []
    while kills < 20:
        before = step_of(run)
        (rank,) = server.start(*often)
        if kills % 2:
            # Right after a step was told of: its checkpoint is being written.
            deadline = time.monotonic() + 60
            while step_of(run) <= before and not rank.over.is_set():
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.05))
        else:
            time.sleep(chance.uniform(0, 2.0))
        rank.kill()
        status = rank.wait()
        if status == 0:
            # It was done before the kill came; begin again, the kills so far are counted.
            assert_same_end(run, whole[1])
            shutil.rmtree(run)
            continue
        assert status == -signal.SIGKILL, rank.text()
        kills += 1
        root = run / "checkpoints"
        found += [p.name for p in root.glob(".writing-*")] if root.is_dir() else []
    server.finish(*often)
    assert_same_end(run, whole[1])
    assert found, "no kill came while a checkpoint was being written"
