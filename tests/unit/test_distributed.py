"""Who this process is, and what a world that cannot form says."""

import socket

import pytest
import torch

from strata.distributed import World, current_world, join_world
from strata.errors import WorldError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        # Set first, so that what join_world leaves behind is taken back at the end.
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def test_without_a_launcher_this_is_the_only_rank():
    assert current_world() == World(rank=0, size=1, local_rank=0)


def test_the_launcher_says_who_this_is(monkeypatch: pytest.MonkeyPatch):
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


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(WorldError, match=rf"did not form at 127\.0\.0\.1:{port}"):
            join_world(torch.device("cpu"), timeout_s=5)


def test_a_peer_that_does_not_come_is_fatal_in_time(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(WorldError, match="the world of 2 did not form"):
        join_world(torch.device("cpu"), timeout_s=3)
