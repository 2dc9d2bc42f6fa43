"""Who this process is, and what a world that cannot form says."""

import os
import socket

import pytest
import torch

from strata.distributed import (
    World,
    current_world,
    join_world,
    leave_world,
)
from strata.errors import WorldError
from strata.launch import LaunchError, slurm_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# As `srun` sets them for the last task of a step of two nodes with two tasks and one.
SRUN = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in (*NAMES, *SRUN, "LOCAL_SIZE"):
        # Set first, so that what a failing test leaves behind is taken back at the end.
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def test_without_a_launcher_this_is_the_only_rank():
    assert current_world() == World(rank=0, size=1, local_rank=0)


def test_the_launcher_gives_the_rank(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert current_world() == World(rank=5, size=8, local_rank=1)


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2")])
def test_a_contradiction_is_refused(rank: str, size: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(WorldError, match="RANK"):
        current_world()


def test_a_world_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WorldError, match="a world of 2 needs MASTER_ADDR"):
        join_world(torch.device("cpu"))


def test_one_process_needs_no_address_and_leaves_none_to_its_children(
    monkeypatch: pytest.MonkeyPatch,
):
    leave_world()
    monkeypatch.setenv("LOCAL_RANK", "0")
    world = join_world(torch.device("cpu"))
    try:
        assert world == World(rank=0, size=1, local_rank=0)
        assert not os.environ.keys() & {"MASTER_ADDR", "MASTER_PORT"}
        assert os.environ["RANK"] == "0"
    finally:
        leave_world()
    # What was set for the world is gone with it; what the launcher set stays.
    assert not os.environ.keys() & {"RANK", "WORLD_SIZE"}
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(WorldError, match=rf"did not form at 127\.0\.0\.1:{port}"):
            join_world(torch.device("cpu"), timeout_s=5)


def test_a_missing_peer_ends_the_run_after_the_time_limit(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(WorldError, match="the world of 2 did not form"):
        join_world(torch.device("cpu"), timeout_s=3)


def test_srun_alone_gives_the_rank(monkeypatch: pytest.MonkeyPatch):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert current_world() == World(rank=2, size=3, local_rank=0)
    # For those that read the environment themselves.
    assert os.environ["LOCAL_WORLD_SIZE"] == "1"
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert os.environ["MASTER_PORT"] == str(15_000 + 70_004 % 15_000)


def test_a_launcher_inside_srun_wins(monkeypatch: pytest.MonkeyPatch):
    for name, value in (SRUN | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert current_world() == World(rank=5, size=8, local_rank=1)


def test_a_plain_command_in_a_batch_script_is_alone(monkeypatch: pytest.MonkeyPatch):
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    for name, value in batch.items():
        monkeypatch.setenv(name, value)
    assert current_world() == World()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("rack[2,4]n[10-12]-ib,x", "rack2n10-ib"),
        ("login-1", "login-1"),
    ],
)
def test_rank_0_is_on_the_first_node(nodes: str, first: str):
    assert slurm_environment(SRUN | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


@pytest.mark.parametrize(("node", "tasks"), [("0", "4"), ("1", "4"), ("2", "1")])
def test_tasks_of_a_node(node: str, tasks: str):
    step = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": node}
    assert slurm_environment(step)["LOCAL_WORLD_SIZE"] == tasks


def test_an_address_that_was_set_wins():
    mine = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert not slurm_environment(SRUN | mine).keys() & mine.keys()


def test_an_environment_not_understood_is_refused():
    with pytest.raises(LaunchError, match="ValueError"):
        slurm_environment(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"})


def test_deepspeeds_name_for_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch):
    ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    current_world()
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
