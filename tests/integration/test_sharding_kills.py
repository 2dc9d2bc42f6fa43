"""SIGKILL of the driver, of a worker and of everything at random moments: the same bytes, no rest.

STRATA_TEST_KILLS sets how many; the test suite has few, as each costs the start of a command.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.integration.test_sharding import REPOSITORY, SMALL, contents, videos
from tests.support.source_videos import moving_scene, write_video

__all__ = ["videos"]
KILLS = int(os.environ.get("STRATA_TEST_KILLS", "2"))


def processes_of(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.timeout(60 + 30 * KILLS)
def test_killed_at_random_moments(videos: Path, tmp_path: Path) -> None:
    own = tmp_path / "videos"
    shutil.copytree(videos, own)
    for k in range(8):
        write_video(own / "run" / f"long-{k}.avi", moving_scene(250, 320, 240, seed=k))

    def start(out: str) -> subprocess.Popen[bytes]:
        call = [sys.executable, REPOSITORY / "tools" / "shard.py", "folder", "--videos", own]
        call += ["--out", tmp_path / out, *SMALL, "--samples-per-part", "2", "--workers", "2"]
        words = [*map(str, call), "--max-rejects", "1", "--log", "none"]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(words, stdout=quiet, stderr=quiet, start_new_session=True)

    start_s = time.monotonic()
    assert start("never-killed").wait() == 0
    duration_s = time.monotonic() - start_s
    expected = contents(tmp_path / "never-killed" / "train")
    folder, chance = tmp_path / "out" / "train", random.Random(KILLS)
    killed: Counter[str] = Counter()
    found_work = 0
    while killed.total() < KILLS:
        process = start("out")
        if killed.total() % 4 == 0:
            time.sleep(chance.uniform(0.1, 0.9) * duration_s)
        else:  # Starting takes most of the time: these come during the work.
            while process.poll() is None and not list(folder.glob(".progress/*.part")):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.1) * duration_s)
        kind = ("driver", "worker", "everything")[killed.total() % 3]
        workers = [p for p in processes_of(process.pid) if p.pid != process.pid]
        if kind == "worker" and workers:
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
            # Half of the time it is left to finish, and recovers.
            time.sleep(chance.choice([0.2, 2.0]) * duration_s)
        with suppress(ProcessLookupError):
            if kind == "everything":
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        status = process.wait()
        assert status in (0, -signal.SIGKILL)
        deadline = time.monotonic() + 20
        while left := processes_of(process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        if status == 0:
            assert contents(folder) == expected
            shutil.rmtree(tmp_path / "out")
            killed["worker"] += kind == "worker" and bool(workers)
            continue
        killed[kind] += 1
        found_work += len(list(folder.glob(".progress/*.part")))
    assert start("out").wait() == 0
    assert contents(folder) == expected
    print(f"killed: {dict(killed)}; parts that were found finished: {found_work}")
