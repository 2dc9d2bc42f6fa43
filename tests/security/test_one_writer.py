"""A folder has one writer: the second ends with one line; what a dead one left is taken over."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import yaml

from strata.errors import ConfigError
from strata.files import FolderLock
from tests.support.commands import ROOT, TINY, fail_with_one_line
from tests.support.forked import ForkServer, Rank

HOLD = """
import sys, time
from pathlib import Path
from strata.errors import ConfigError
from strata.files import FolderLock
with FolderLock(Path(sys.argv[1]), "training", ConfigError, "wait"):
    print("held", flush=True)
    time.sleep(100)
"""


def lock(folder: Path) -> FolderLock:
    return FolderLock(folder, "training", ConfigError, "wait for it, or use another --run")


def hold_elsewhere(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def rewrite(folder: Path, **changes: object) -> None:
    """Change the lock's record, and nothing about when it was renewed."""
    path = folder / ".lock"
    status = path.stat()
    record = msgspec.json.decode(path.read_bytes()) | changes
    path.write_bytes(msgspec.json.encode(record))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderLock, "BEAT_S", 0.05)
    monkeypatch.setattr(FolderLock, "STALE_S", 1.0)


def test_a_second_holder_is_refused_by_name_and_a_later_one_accepted(tmp_path: Path):
    child = hold_elsewhere(tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path} is in use: process {child.pid} on .* is "):
        lock(tmp_path).__enter__()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_one_process_does_not_get_it_twice(tmp_path: Path):
    with lock(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            lock(tmp_path).__enter__()
        assert (tmp_path / ".lock").exists()


def test_a_reused_process_number_is_no_lock_holder(tmp_path: Path):
    with lock(tmp_path):
        rewrite(tmp_path, started=1)
        with lock(tmp_path):
            pass


def test_a_killed_process_that_nobody_has_reaped_is_gone(tmp_path: Path):
    child = hold_elsewhere(tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    while f"{child.pid} (" in Path(f"/proc/{child.pid}/stat").read_text() and (
        " Z " not in Path(f"/proc/{child.pid}/stat").read_text()
    ):
        time.sleep(0.01)
    with lock(tmp_path):
        pass
    child.wait()


@pytest.mark.usefixtures("quick")
def test_a_holder_on_another_machine_lives_as_long_as_it_renews_its_lock(tmp_path: Path):
    first = lock(tmp_path)
    first._record = msgspec.structs.replace(first._record, machine="another", host="node7")
    with first, pytest.raises(ConfigError, match=r"process \d+ on node7 is training"):
        lock(tmp_path).__enter__()
    assert not first.lost


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[" * 100_000, b"\xff\xfe"])
def test_a_lock_that_nobody_renews_is_taken_over(content: bytes | None, tmp_path: Path):
    with lock(tmp_path):
        pass
    path = tmp_path / ".lock"
    if content is None:
        held = lock(tmp_path)
        record = msgspec.structs.replace(held._record, machine="another", pid=1)
        content = msgspec.json.encode(record)
    path.write_bytes(content)
    with lock(tmp_path):
        assert b"another" not in path.read_bytes()
    assert not path.exists()


@pytest.mark.usefixtures("quick")
def test_a_process_that_lost_the_lock_does_not_remove_it(tmp_path: Path):
    first = lock(tmp_path)
    with first:
        rewrite(tmp_path, token="0" * 32)
        while not first.lost:
            time.sleep(0.01)
    assert (tmp_path / ".lock").exists()


def test_one_of_many_gets_a_stale_lock(tmp_path: Path):
    child = hold_elsewhere(tmp_path)
    child.kill()
    child.wait()
    got, refused = [], []

    def enter() -> None:
        try:
            got.append(lock(tmp_path).__enter__())
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)
    got[0].__exit__(None, None, None)


@pytest.fixture
def training(tmp_path: Path, shards: Path) -> list[str | Path]:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return ["--config", path, "--data.shards", shards / "train", "--run", tmp_path / "run"]


def wait_for_first_step(run: Path, group: list[Rank]) -> None:
    while not (run / "log.jsonl").is_file() or '"step", "step"' not in (
        (run / "log.jsonl").read_text()
    ):
        assert not any(rank.over.is_set() for rank in group), group[0].text()
        time.sleep(0.01)


def test_a_second_training_of_a_run_ends_with_code_2_on_every_rank(
    server: ForkServer, training: list[str | Path], tmp_path: Path
):
    first = server.start(*training, "--schedule.epochs", "200")
    wait_for_first_step(tmp_path / "run", first)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    said = server.finish(*training, "--resume", "auto", ranks=2, code=2)
    assert f"is in use: process {first[0].pid} on" in said
    assert "another --run" in said
    assert "Traceback" not in said
    first[0].kill()
    first[0].wait()
    starts = (tmp_path / "run" / "log.jsonl").read_text().count('"kind": "start"')
    assert starts == log.count('"kind": "start"') == 1


def test_a_killed_training_is_resumed_at_once(
    server: ForkServer, training: list[str | Path], tmp_path: Path
):
    often = (*training, "--checkpoint.every_steps", "1", "--resume", "auto")
    (rank,) = server.start(*often)
    wait_for_first_step(tmp_path / "run", [rank])
    rank.kill()
    rank.wait()
    assert (tmp_path / "run" / ".lock").exists()
    server.finish(*often)
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_training_that_lost_its_folder_writes_no_checkpoint_there(
    server: ForkServer, training: list[str | Path], tmp_path: Path
):
    run = tmp_path / "run"
    hook = "tests.support.faults:renew_often"
    group = server.start(*training, "--schedule.epochs", "200", hook=hook)
    wait_for_first_step(run, group)
    rewrite(run, token="0" * 32)
    assert group[0].wait() == 4
    assert "was taken over by another process" in group[0].text()


def test_a_second_index_of_a_folder_is_refused(tmp_path: Path):
    with FolderLock(tmp_path, "indexing", ConfigError, "wait for it", ".index.lock"):
        line = fail_with_one_line("tools/shard.py", "index", tmp_path)
    assert "is in use" in line


def test_a_second_evaluation_with_the_same_report_is_refused(
    server: ForkServer, training: list[str | Path], shards: Path, tmp_path: Path
):
    server.finish(*training, "--stop_after_steps", "1")
    out = tmp_path / "results" / "report.json"
    out.parent.mkdir()
    with FolderLock(out.parent, "evaluating", ConfigError, "wait for it", ".report.json.lock"):
        line = fail_with_one_line(
            *("eval/main.py", "retrieval", "--checkpoint", tmp_path / "run", "--out", out),
            *("--train", shards / "train", "--test", shards / "test"),
        )
    assert "is evaluating there; wait for it, or use another --out" in line
    assert not out.exists()
