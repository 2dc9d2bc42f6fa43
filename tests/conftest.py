"""What tests share: small shard folders, made once a session; the real data where they are."""

import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from strata import logs
from tests.support.forked import ForkServer, fork_server
from tests.support.session import longest_first, marks, not_proven
from tests.support.shard_folders import make_shards

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder and by the fixture `real_data`, before -m selects; sort files."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        for mark in marks(folder, getattr(item, "fixturenames", ())):
            item.add_marker(mark)
    items.sort(key=lambda item: longest_first(item.path.relative_to(ROOT / "tests").as_posix()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what this run did not prove, and why."""
    stats = terminalreporter.stats
    terminalreporter.section("not proven by this run")
    for line in not_proven(stats.get("skipped", ()), len(stats.get("deselected", ()))):
        terminalreporter.line(line)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Several tests start processes; torch's threads would fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _process_is_restored():
    """What a test changes in its process, as a command would, it changes for no other test.

    A test that joins a world leaves it itself; else the commands that it starts would be in it.
    """
    logger = logging.getLogger("strata")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    environment, folder = dict(os.environ), Path.cwd()
    signals = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    logs._warned.clear()
    torch.manual_seed(0)
    random.seed(0)
    yield
    assert not distributed.is_initialized()
    assert not os.environ.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
    for name in os.environ.keys() | environment.keys():
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
    os.chdir(folder)
    for number, handler in signals.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Starts scripts in processes forked from one that has imported everything."""
    yield fork_server()
    fork_server().kill_all()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` with 24 videos of 4 classes in 3 shards and `test` with 12 in one."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder / "train", num_videos=24, num_classes=4, shard_size=9, seed=1)
    make_shards(folder / "test", num_videos=12, num_classes=4, shard_size=12, seed=2)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real videos; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("STRATA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "ucf101").is_dir():
        pytest.skip(f"no real videos at {folder}; set STRATA_TEST_DATA to the folder that has them")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(0)
