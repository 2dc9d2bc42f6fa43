"""Processes of the project's scripts, forked from one that has imported everything."""

import atexit
import functools
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port(count: int = 1) -> int:
    """The first of so many free ports in a row: rank N of a run takes the Nth.

    They are below those that the kernel gives to connections, which could take them meanwhile.
    """
    chance = random.SystemRandom()
    while True:
        first = chance.randrange(15_000, 32_000)
        with ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return first


class Rank:
    """A running process of a script."""

    def __init__(self, address: Path, request: dict, output: Path, errors: Path) -> None:
        self.output, self.errors = output, errors
        self.over = threading.Event()
        self.status: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(address))
        self._connection.sendall((json.dumps(request) + "\n").encode())
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with self._connection, self._answers:
            answer = self._answers.readline()
        if answer:
            self.status = int(answer)
            self.over.set()

    def wait(self, timeout_s: float = 240.0) -> int:
        """Wait for the exit status; negative for a signal."""
        assert self.over.wait(timeout_s), f"not done in {timeout_s} s: {self.text()[-3000:]}"
        assert self.status is not None
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.over.is_set():
            os.kill(self.pid, number)

    def text(self) -> str:
        """Its output so far; errors too, unless they go to a file of their own."""
        return self.output.read_text(encoding="utf-8", errors="replace")


class ForkServer:
    """Starts processes of `train/main.py` and other scripts."""

    def __init__(self) -> None:
        self._folder, self._number = Path(tempfile.mkdtemp(prefix="fork-server-")), 0
        self._address = self._folder / "socket"
        self._ranks: list[Rank] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", str(self._address)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:  # Libraries print while they are imported.
            if line.strip() == "ready":
                break

    def start(
        self,
        *argv: str | Path,
        script: str | Path = "train/main.py",
        ranks: int = 1,
        hook: str = "",
        env: dict[str, str] | None = None,
    ) -> list[Rank]:
        """Start a group; `hook` is `module:function`, called in each process before the script."""
        return self.start_differing(*([argv] * ranks), script=script, hook=hook, env=env)

    def start_differing(
        self,
        *argvs: Sequence[str | Path],
        script: str | Path = "train/main.py",
        hook: str = "",
        env: dict[str, str] | None = None,
    ) -> list[Rank]:
        """Start a group in which each rank has different arguments."""
        port, ranks = str(free_port()), str(len(argvs))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks} | (env or {})
        return [
            self.fork(
                script, *argv, hook=hook, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, argv in enumerate(argvs)
        ]

    def fork(
        self,
        script: str | Path,
        *argv: str | Path,
        hook: str = "",
        env: dict[str, str] | None = None,
        apart: bool = False,
    ) -> Rank:
        """Start one process, without a launcher's variables; `apart` keeps its errors apart."""
        self._number += 1
        output = self._folder / f"output-{self._number}"
        errors = output.with_suffix(".errors") if apart else output
        request = {
            "script": str(script),
            "argv": [str(a) for a in argv],
            "env": os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
            "stdout": str(output),
            "stderr": str(errors),
            "hook": hook,
        }
        rank = Rank(self._address, request, output, errors)
        self._ranks.append(rank)
        return rank

    def finish(self, *argv: str | Path, ranks: int = 1, hook: str = "", code: int = 0) -> str:
        """Run a group to its end and return the output of rank 0."""
        group = self.start(*argv, ranks=ranks, hook=hook)
        codes = [rank.wait() for rank in group]
        assert codes == [code] * ranks, f"{codes}\n" + "\n".join(r.text()[-3000:] for r in group)
        return group[0].text()

    def write_launcher(self, path: Path) -> Path:
        """Write a program that starts `SCRIPT ...` by this server, as `python SCRIPT ...` would."""
        words = (sys.executable, ROOT / "tests" / "support" / "forked_launcher.py", self._address)
        path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        path.chmod(0o755)
        return path

    def kill_all(self) -> None:
        """End what still runs."""
        for rank in self._ranks:
            rank.kill()
        self._ranks.clear()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def fork_server() -> ForkServer:
    """The server of this test process, started at the first call."""
    server = ForkServer()
    atexit.register(server.close)
    return server
