"""What a run survives: signals, kills at any moment, a full disk; and what it says of the rest."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.commands import TINY, records
from tests.support.forked import ForkServer, Rank


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


def losses(run: Path) -> dict[int, dict[str, float]]:
    return {r["step"]: r["losses"] for r in records(run, "step")}


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, buffers and Adam's state, to the bit."""
    for name in ("model.safetensors", "training.safetensors"):
        mine, theirs = load_file(last(run) / name), load_file(last(other) / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_saves_and_the_run_resumes(
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
    assert "resume with --resume auto" in group[0].text()
    server.finish(*arguments, "--resume", "auto", ranks=ranks)
    assert_same_end(run, whole[ranks])


# After a checkpoint of any step: within an epoch, at the switch of stages with the queue's first
# use, one after it, at the drop of the learning rate. Kills at random moments have the others.
@pytest.mark.parametrize("stop", [1, 6, 7, 12])
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
    state = json.loads((last(tmp_path / "run") / "state.json").read_text())
    assert state["world_size"] == ranks
    assert losses(tmp_path / "run") == losses(whole[ranks])


def test_a_student_resumes_with_the_same_teacher_alone(
    server: ForkServer, tiny: Path, shards: Path, whole: dict[int, Path], tmp_path: Path
):
    once, twice = tmp_path / "once", tmp_path / "twice"
    words = ["--config", tiny, "--data.shards", shards / "train", "--method.weights.instance", "0"]
    words += ["--method.weights.distillation", "1", "--schedule.second_stage_epoch", "3"]
    words += ["--resume", "auto", "--stop_after_steps"]
    server.finish(*words, "7", "--method.teacher", whole[1], "--run", once)
    server.finish(*words, "4", "--method.teacher", whole[1], "--run", twice)
    moved = shutil.copytree(whole[1], tmp_path / "moved")
    server.finish(*words, "7", "--method.teacher", moved, "--run", twice)
    assert_same_end(twice, once)
    assert losses(twice) == losses(once)
    assert set(losses(once)[7]) == {"prototype", "distillation", "total"}
    # An encoder of the same form, so it could teach: but it is another one.
    (rank,) = server.start(*words, "9", "--method.teacher", once, "--run", twice, ranks=1)
    assert rank.wait() == 2
    assert "was trained by another teacher" in rank.text()
    assert "use the same method.teacher, or another --run" in rank.text()


def test_another_number_of_ranks_resumes(
    server: ForkServer, arguments: list[str | Path], whole: dict[int, Path], tmp_path: Path
):
    """In the same order; batch norm sees other groups of videos, so the losses are near only."""
    run = tmp_path / "run"
    server.finish(*arguments, "--stop_after_steps", "9", ranks=2)
    said = server.finish(*arguments, "--resume", "auto", ranks=1)
    assert "1 rank on CPU" in said
    mine, theirs = (json.loads((last(r) / "state.json").read_text()) for r in (run, whole[1]))
    assert mine["world_size"] == 1
    assert {**mine, "config": ""} == {**theirs, "config": ""}
    found, exact = losses(run), losses(whole[1])
    assert found.keys() == exact.keys()
    for step in range(10, 19):
        assert found[step]["total"] == pytest.approx(exact[step]["total"], rel=0.2), step


def test_resume_is_exact_in_bf16(
    server: ForkServer,
    arguments: list[str | Path],
    whole: dict[int, Path],
    tmp_path: Path,
):
    ranks, stop = 2, 6  # At the switch of stages.
    bf16 = (*arguments, "--engine.precision", "bf16", "--stop_after_steps")
    never_stopped = tmp_path / "never-stopped"
    said = server.finish(*bf16, "14", "--run", never_stopped, ranks=ranks)
    assert said.count("bfloat16 on a CPU: conv3d has another weight gradient") == 1
    server.finish(*bf16, str(stop), ranks=ranks)
    server.finish(*bf16, "14", "--resume", "auto", ranks=ranks)
    assert_same_end(tmp_path / "run", never_stopped)
    assert losses(tmp_path / "run") == losses(never_stopped)
    # That bf16 was computed: not the same as float32, close to it in the first step, which has the
    # same weights, and on average. Later steps cannot be compared one by one: rounding changes
    # the assignments to prototypes, and the two runs drift apart by up to 41 %.
    low, exact = losses(never_stopped), losses(whole[ranks])
    low_totals = [terms["total"] for terms in low.values()]
    exact_totals = [exact[step]["total"] for step in low]
    assert all(a != b for a, b in zip(low_totals, exact_totals, strict=True))
    assert low_totals[0] == pytest.approx(exact_totals[0], rel=0.05)
    assert sum(low_totals) == pytest.approx(sum(exact_totals), rel=0.1)


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
            # Right after a step was reported: its checkpoint is being written.
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


def test_a_step_that_is_not_finite_ends_the_run_and_is_explained(
    server: ForkServer, arguments: list[str | Path], tmp_path: Path
):
    run = tmp_path / "run"
    hook = "tests.support.faults:nan_at_step_5_on_rank_1"
    dump = (*arguments, "--engine.dump_bad_batch", "true", "--checkpoint.every_steps", "2")
    said = server.finish(*dump, ranks=2, hook=hook, code=3)
    (report,) = records(run, "skipped_step")
    assert report["step"] == 5
    (bad,) = report["samples"]["1"]
    assert report["batches"]["1"][1] == bad
    line = said.splitlines()[-1]
    assert line.startswith("error (rank 0): step 5 (epoch 0, step 4 of it): not finite")
    assert f"terms instance; on rank 1 with samples {bad};" in line
    assert "engine.max_skipped_steps is 0" in line
    (dumped,) = (run / "bad-batches").iterdir()
    assert dumped.name == "step-000000005-rank-1.safetensors"
    assert load_file(dumped)["short"].shape == (2, 2, 16, 32, 32, 3)
    assert last(run).name == "step-000000004"


def test_a_step_within_the_budget_is_left_out_and_counted(
    server: ForkServer, arguments: list[str | Path], tmp_path: Path
):
    run = tmp_path / "run"
    some = (*arguments, "--engine.max_skipped_steps", "1", "--stop_after_steps", "6")
    server.finish(*some, "--checkpoint.every_steps", "1", hook="tests.support.faults:nan_at_step_5")
    four, five, six = (
        load_file(run / "checkpoints" / f"step-{n:09d}" / "model.safetensors") for n in (4, 5, 6)
    )
    assert all(torch.equal(four[k], five[k]) for k in four)
    assert any(not torch.equal(four[k], six[k]) for k in four)
    assert all(torch.isfinite(v).all() for k, v in six.items() if k != "queue.scores")
    assert json.loads((last(run) / "state.json").read_text())["num_skipped"] == 1
    # The budget is the run's, not the process's.
    again = (*arguments, "--engine.max_skipped_steps", "0", "--resume", "auto")
    again = (*again, "--stop_after_steps", "7")
    assert "engine.max_skipped_steps was 1 before" in server.finish(*again)


def test_a_full_disk_ends_the_run_with_its_reason(
    server: ForkServer, arguments: list[str | Path], tmp_path: Path
):
    said = server.finish(*arguments, hook="tests.support.faults:full_disk", code=4)
    assert "step-000000006 could not be written" in said
    assert "File too large" in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_one_save_may_fail(server: ForkServer, arguments: list[str | Path], tmp_path: Path):
    said = server.finish(*arguments, hook="tests.support.faults:disk_full_once")
    (failed,) = records(tmp_path / "run", "checkpoint_failed")
    assert "No space left on device" in failed["reason"]
    assert "tries again at the next checkpoint" in said
    assert [r["step"] for r in records(tmp_path / "run", "checkpoint")] == [6, 18]


def test_a_folder_that_cannot_be_written_is_named(server: ForkServer, arguments: list[str | Path]):
    said = server.finish(*arguments, "--run", "/proc/strata", code=2)
    assert "the folder /proc/strata cannot be written" in said


def test_another_recipe_is_refused(
    server: ForkServer, arguments: list[str | Path], whole: dict[int, Path]
):
    again = (*arguments, "--run", whole[1], "--resume", "auto", "--method.temperature", "0.2")
    said = server.finish(*again, code=2)
    assert "was trained with method.temperature 0.07, now it is 0.2: another recipe" in said


def test_every_file_of_a_checkpoint_is_compared(
    server: ForkServer, arguments: list[str | Path], whole: dict[int, Path], tmp_path: Path
):
    run = Path(shutil.copytree(whole[1], tmp_path / "run"))
    path = last(run) / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    said = server.finish(*arguments, "--resume", "auto", code=2)
    assert "training.safetensors is missing or altered; use an older checkpoint" in said
    # As the message says.
    shutil.rmtree(path.parent)
    server.finish(*arguments, "--resume", "auto")
    assert_same_end(run, whole[1])


def test_ranks_that_disagree_are_reported(
    server: ForkServer, arguments: list[str | Path], shards: Path
):
    group = server.start(*arguments, ranks=2, hook="tests.support.faults:other_code_on_rank_1")
    assert [rank.wait() for rank in group] == [2, 2]
    assert "rank 1 has another code version than rank 0 (other against" in group[0].text()
    first, second = server.start_differing(
        [*arguments], [*arguments, "--engine.learning_rate", "0.5"]
    )
    assert [first.wait(), second.wait()] == [2, 2]
    said = "rank 1 has another setting engine.learning_rate than rank 0 (0.5 against 0.001)"
    assert said in first.text()
    other = [*arguments, "--data.shards", shards / "test"]
    first, second = server.start_differing([*arguments], other)
    assert [first.wait(), second.wait()] == [2, 2]
    assert "rank 1 has another data manifest than rank 0" in first.text()


def test_a_stall_ends_with_stacks(server: ForkServer, arguments: list[str | Path]):
    group = server.start(
        *arguments,
        *("--engine.world_timeout_s", "4"),
        ranks=2,
        hook="tests.support.faults:stall_in_step_4_on_rank_1",
    )
    assert [rank.wait(60) for rank in group] == [5, 5]
    assert "error (rank 1): no progress for 4 s while computing step 4" in group[1].text()
    assert "in fit" in group[1].text()
    assert "faults.py" in group[1].text()


def test_a_rank_that_dies_takes_the_others_along(
    server: ForkServer, arguments: list[str | Path], tmp_path: Path
):
    group = server.start(*arguments, ranks=2)
    wait_for_step(tmp_path / "run", 3, group)
    group[1].kill()
    assert [group[0].wait(), group[1].wait()] == [5, -9]
    assert "another rank was lost in step" in group[0].text()
