"""A grid of settings and seeds: killed and started again, failures, what is refused."""

import contextlib
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from strata.errors import ConfigError, StrataError
from strata.files import FolderLock
from strata.tools.ablation import main
from tests.support.commands import ROOT, TINY
from tests.support.forked import ForkServer
from tests.support.shard_folders import make_shards

RETRIEVAL = {"protocol": "retrieval", "set": {"device": "cpu", "features.num_clips": 2}}
PRETRAIN = {
    "schedule": {"epochs": 2, "second_stage_epoch": 1, "queue_epoch": 1, "lr_drop_epochs": []},
    "checkpoint": {"every_steps": 2, "keep": 9},
}


@pytest.fixture
def grid(server: ForkServer, tmp_path: Path, shards: Path) -> dict[str, Any]:
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(TINY | PRETRAIN))
    return {
        "title": "A trial",
        "pretrain": str(tiny),
        "shards": str(shards / "train"),
        "test": str(shards / "test"),
        "out": str(tmp_path / "out"),
        "seeds": [0, 1],
        "rows": {"one": {}, "same": {"set": {"method.temperature": 0.07}}},
        "evaluations": {"retrieval": RETRIEVAL},
        "launcher": str(server.write_launcher(tmp_path / "forked")),
    }


def written(grid: dict[str, Any], **changes: Any) -> list[str]:
    """Arguments for a grid with some settings replaced."""
    path = Path(grid["out"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(grid | changes))
    return ["--config", str(path)]


def result(grid: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(grid["out"]) / "ablation.json").read_text())


def processes_with(text: str) -> list[int]:
    """Processes whose command line has a text."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and text in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_killed_and_started_again_it_ends_with_the_same_table(
    grid: dict[str, Any], capfd: pytest.CaptureFixture[str]
):
    """The two rows have the same settings: one is interrupted, the other is not."""
    run = Path(grid["out"]) / "rows" / "one" / "seed-0" / "run"
    argv = written(grid, launcher="deepspeed")
    process = subprocess.Popen(
        [sys.executable, "tools/ablate.py", *argv],
        cwd=ROOT,
        # As all others have: another number of threads gives other bits.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    limit = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*/complete.json")):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.01)
    # As if the machine had gone: the launcher, the rank and the grid itself.
    for pid in [process.pid, *processes_with(str(run))]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    # The rest two at a time, which changes nothing.
    assert main(written(grid, side_by_side=2)) == 0
    said = capfd.readouterr().out
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] > 0 for r in log if r["kind"] == "start"] == [False, True]
    found = result(grid)
    by_run = {(r["row"], r["seed"]): r for r in found["runs"]}
    assert {r["status"] for r in by_run.values()} == {"complete"}
    for seed in (0, 1):
        first, second = (by_run[row, seed] for row in ("one", "same"))
        mine, theirs = (r["evaluations"]["retrieval"] for r in (first, second))
        assert mine["figures"] == theirs["figures"]
        health = first["pretraining"]["health"]
        assert health == second["pretraining"]["health"]
        assert {"graph_off_diagonal_mass", "prototypes_in_use", "cosine_altered_0_low"} <= set(
            health
        )
        assert first["pretraining"]["steps"] == 12
        assert first["pretraining"]["pretraining_s"] > 0
    values = [
        by_run["same", seed]["evaluations"]["retrieval"]["figures"]["made"]["R@1"]
        for seed in (0, 1)
    ]
    for row in ("one", "same"):
        recall = found["rows"][row]["figures"]["retrieval"]["made"]["R@1"]
        assert recall["mean"] == pytest.approx(statistics.fmean(values))
        assert recall["deviation"] == pytest.approx(statistics.stdev(values))
        assert recall["num_runs"] == 2
        assert recall["error"] == pytest.approx(recall["deviation"] / 2**0.5)
    mean, deviation = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
    page = (Path(grid["out"]) / "ablation.md").read_text()
    assert f"| one | 2 | {mean:.1f} ± {deviation:.1f} |" in page
    assert "test videos query the training set" in page
    assert "| chance |  | 25.0 |" in page
    page = (Path(grid["out"]) / "ablation.html").read_text()
    assert f'<td class="number">{mean:.1f} ± {deviation:.1f}</td>' in page
    assert "test videos query the training set" in page
    assert said.count("forked train/main.py") == 4
    # Complete: nothing is run again.
    assert main(written(grid, launcher="false")) == 0
    assert "$ false" not in capfd.readouterr().out
    # A row that is no longer the same may not stand beside what was measured before.
    with pytest.raises(
        ConfigError, match=r"row same having method.temperature 0.07, now it is 0.2"
    ):
        main(written(grid, rows={"one": {}, "same": {"set": {"method.temperature": 0.2}}}))
    wider = {"protocol": "retrieval", "set": {"device": "cpu", "features.num_clips": 3}}
    with pytest.raises(ConfigError, match=r"evaluation retrieval having features.num_clips 2"):
        main(written(grid, evaluations={"retrieval": wider}))
    # New rows and seeds may; one that fails is named, and the others stay.
    rows = grid["rows"] | {"new": {"set": {"method.temperature": 0.2}}}
    assert main(written(grid, rows=rows, launcher="false")) == 1
    page = (Path(grid["out"]) / "ablation.md").read_text()
    assert f"| one | 2 | {mean:.1f} ± {deviation:.1f} |" in page
    assert "| new | 0 of 2 complete | not measured |" in page
    assert "- new, seed 1: pretraining failed with exit code 1; see " in page
    # Figures of other data may not stand beside these.
    report = Path(grid["out"]) / "rows" / "same" / "seed-1" / "retrieval.json"
    text = report.read_text()
    digest = json.loads(text)["results"][0]["sets"]["test"]["manifest_digest"]
    report.write_text(text.replace(digest, "0" * 64))
    with pytest.raises(ConfigError, match="used other data for one, seed 0 than for same, seed 1"):
        main(written(grid, launcher="false"))


def test_splits_have_their_own_sets_and_the_table_standard_errors(
    grid: dict[str, Any], tmp_path: Path
):
    for split in (1, 2):
        for name, videos in (("train", 16), ("test", 9)):
            folder = tmp_path / "sets" / f"{name}0{split}"
            seed = 2 * split + (name == "test")
            make_shards(folder, num_videos=videos, num_classes=4, shard_size=16, seed=seed)
    del grid["test"]
    rows = {"one": {}, "motion": {"untrained": "one", "pixels": "motion"}}
    changes = {"shards": str(tmp_path / "sets"), "splits": [1, 2], "seeds": [0], "rows": rows}
    assert main(written(grid, **changes)) == 0
    found = result(grid)
    runs = {(r["row"], r["split"]): r for r in found["runs"]}
    assert set(runs) == {(row, split) for row in rows for split in (1, 2)}
    for row in rows:
        recalls = []
        for split in (1, 2):
            report = json.loads(
                (Path(grid["out"]) / f"rows/{row}/split-{split}/seed-0/retrieval.json").read_text()
            )
            (sets,) = (each["sets"] for each in report["results"])
            assert sets["test"]["folder"].endswith(f"sets/test0{split}")
            assert report["pretraining"]["data"]["shards"].endswith(f"sets/train0{split}")
            assert ("without a network" in report["protocol"]) == (row == "motion")
            recalls.append(report["figures"]["measured"]["R@1"])
        summary = found["rows"][row]["figures"]["retrieval"]["made"]["R@1"]
        assert summary["mean"] == pytest.approx(statistics.fmean(recalls))
        assert summary["error"] == pytest.approx(statistics.stdev(recalls) / 2**0.5)
        shown = f"{100 * summary['mean']:.1f} ± {100 * summary['error']:.1f}"
        page = (Path(grid["out"]) / "ablation.md").read_text()
        assert f"| {row} | 2 | {shown} |" in page
        assert "Mean ± standard error over splits 1, 2 and seeds" in page
    chances = [
        runs["one", split]["evaluations"]["retrieval"]["chance"]["made"]["R@1"] for split in (1, 2)
    ]
    assert found["chance"]["retrieval"]["made"]["R@1"] == pytest.approx(statistics.fmean(chances))


def script(folder: Path, text: str) -> str:
    """A launcher that is no launcher: for what a grid makes of exit codes and signals."""
    path = folder / "launcher"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failed_run_is_named_and_the_others_continue(
    grid: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    words = "case \"$*\" in *rows/same/*) echo 'error: no space'; exit 4;; esac; exit 3"
    assert main(written(grid, launcher=script(tmp_path, words))) == 1
    said = capfd.readouterr()
    assert said.out.count("failed with exit code") == 4
    assert "error: no space" in said.out
    log = Path(grid["out"]) / "rows" / "same" / "seed-1" / "pretraining.log"
    assert f"same, seed 1: pretraining failed with exit code 4; see {log}" in said.err
    assert [r["status"] for r in result(grid)["runs"]] == ["failed"] * 4
    assert (
        "| same | 0 of 2 complete | not measured |"
        in (Path(grid["out"]) / "ablation.md").read_text()
    )


def test_on_failure_stop_ends_the_grid(grid: dict[str, Any], capfd: pytest.CaptureFixture[str]):
    assert main(written(grid, launcher="false", on_failure="stop")) == 1
    assert capfd.readouterr().out.count("$ false") == 1
    statuses = {(r["row"], r["seed"]): r["status"] for r in result(grid)["runs"]}
    assert statuses.pop(("one", 0)) == "failed"
    assert set(statuses.values()) == {"not run"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_training_save(
    number: signal.Signals, grid: dict[str, Any], tmp_path: Path
):
    words = "trap 'echo saved; exit 75' TERM; echo working; while :; do sleep 0.05; done"
    log = Path(grid["out"]) / "rows" / "one" / "seed-0" / "pretraining.log"

    def interrupt() -> None:
        while not (log.exists() and "working" in log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(StrataError, match=f"stopped by {number.name}; the same command") as stopped:
        main(written(grid, launcher=script(tmp_path, words)))
    assert stopped.value.exit_code == 75
    assert "\nsaved\n" in log.read_text()


def test_runs_side_by_side(
    grid: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Each waits until another has begun; an untrained row waits for its pretraining."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    meet = (
        f"echo GPU $CUDA_VISIBLE_DEVICES; touch {tmp_path}/$$.begun; "
        f"until [ $(ls {tmp_path}/*.begun | wc -l) -gt 1 ]; do sleep 0.02; done; sleep 0.3; exit 5"
    )
    rows = grid["rows"] | {"late": {"untrained": "one"}}
    changes = {"rows": rows, "seeds": [0], "side_by_side": 3, "set": {"monitor.port": 9700}}
    assert main(written(grid, **changes, launcher=script(tmp_path, meet))) == 1
    found = {r["row"]: r for r in result(grid)["runs"]}
    assert {found[row]["pretraining"]["exit_code"] for row in grid["rows"]} == {5}
    # Each has a GPU and a port of its own.
    logs = [Path(found[row]["pretraining"]["log"]).read_text() for row in grid["rows"]]
    assert "\nGPU 0\n" in logs[0]
    assert "\nGPU 1\n" in logs[1]
    assert ["--monitor.port 9716\n" in log for log in logs] == [False, True]
    assert found["late"]["status"] == "not run"
    said = capfd.readouterr().out
    left_out = said.index("late, seed 0: retrieval: left out, its pretraining is not complete")
    assert left_out > said.index("one, seed 0: pretraining failed with exit code 5")


@pytest.mark.parametrize("by", ["a signal to the grid", "a signal to one run"])
def test_all_runs_side_by_side_save(by: str, grid: dict[str, Any], tmp_path: Path):
    works = "trap 'echo saved; exit 75' TERM; echo working; while :; do sleep 0.05; done"
    logs = [Path(grid["out"]) / "rows" / r / "seed-0" / "pretraining.log" for r in ("one", "same")]
    if by == "a signal to one run":
        other = f"until grep -q working {logs[0]}; do sleep 0.05; done; echo saved; exit 75"
        works = f'case "$*" in *rows/same/*) {other};; esac; {works}'

    def interrupt() -> None:
        while not all(log.exists() and "working" in log.read_text() for log in logs):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if by == "a signal to the grid":
        threading.Thread(target=interrupt).start()
    with pytest.raises(StrataError, match="the same command resumes it") as stopped:
        main(written(grid, launcher=script(tmp_path, works), side_by_side=2))
    assert stopped.value.exit_code == 75
    assert all("\nsaved\n" in log.read_text() for log in logs)


def test_a_training_that_another_signalled_ends_the_grid(grid: dict[str, Any], tmp_path: Path):
    with pytest.raises(StrataError, match="one, seed 0: pretraining was stopped") as stopped:
        main(written(grid, launcher=script(tmp_path, "exit 75")))
    assert stopped.value.exit_code == 75


def test_processes_of_a_killed_grid_are_waited_for(grid: dict[str, Any], tmp_path: Path):
    said = tmp_path / "said"
    log = Path(grid["out"]) / "rows" / "one" / "seed-0" / "pretraining.log"
    log.parent.mkdir(parents=True)
    with log.open("ab") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        # It ends when another process has been refused the lock.
        waits = f"until grep -q 'waiting for it' {said}; do sleep 0.05; done; echo late"
        left = subprocess.Popen(["sh", "-c", waits], stdout=output)
    with said.open("w") as stdout, contextlib.redirect_stdout(stdout):
        main(written(grid, launcher="false", on_failure="stop"))
    assert left.poll() == 0
    assert "a process of a former start still works" in said.read_text()
    assert log.read_text().startswith("late\n$ false")


def test_two_grids_do_not_share_a_folder(grid: dict[str, Any]):
    folder = Path(grid["out"])
    folder.mkdir()
    with FolderLock(folder, "running a grid", ConfigError, "wait"):
        with pytest.raises(ConfigError, match=r"is in use: .* is running a grid there.*--out"):
            main(written(grid, launcher="false"))
