"""Training processes that are forked, for tests that need many of them."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.commands import ROOT, free_port


@dataclass
class Rank:
    """A running training process."""

    pid: int
    output: Path
    over: threading.Event = field(default_factory=threading.Event)
    status: int | None = None

    def wait(self, timeout_s: float = 120.0) -> int:
        """Wait for the exit status; negative for a signal."""
        assert self.over.wait(timeout_s), f"not done in {timeout_s} s: {self.text()[-3000:]}"
        assert self.status is not None
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.over.is_set():
            os.kill(self.pid, number)

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


class ForkServer:
    """Starts ranks of `train/main.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._ranks: dict[int, Rank] = {}
        self._new: queue.Queue[int] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server"],
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
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            pid, *status = map(int, line.split())
            if status:
                while pid not in self._ranks:
                    time.sleep(0.001)
                rank = self._ranks[pid]
                rank.status = status[0]
                rank.over.set()
            else:
                self._new.put(pid)

    def start(
        self, *argv: str | Path, ranks: int = 1, hook: str = "", env: dict[str, str] | None = None
    ) -> list[Rank]:
        """Start a group; `hook` is `module:function`, called in each process before training."""
        return self.start_differing(*([argv] * ranks), hook=hook, env=env)

    def start_differing(
        self,
        *argvs: Sequence[str | Path],
        hook: str = "",
        env: dict[str, str] | None = None,
    ) -> list[Rank]:
        """Start a group in which each rank has different arguments."""
        group, port, ranks = [], free_port(), len(argvs)
        for rank, argv in enumerate(argvs):
            self._number += 1
            output = self._folder / f"output-{self._number}"
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            request = {
                "argv": [str(a) for a in argv],
                "env": {k: str(v) for k, v in world.items()}
                | {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(ranks)}
                | (env or {}),
                "output": str(output),
                "hook": hook,
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            pid = self._new.get(timeout=60)
            self._ranks[pid] = Rank(pid, output)
            group.append(self._ranks[pid])
        return group

    def finish(self, *argv: str | Path, ranks: int = 1, hook: str = "", code: int = 0) -> str:
        """Run a group to its end and return the output of rank 0."""
        group = self.start(*argv, ranks=ranks, hook=hook)
        codes = [rank.wait() for rank in group]
        assert codes == [code] * ranks, f"{codes}\n" + "\n".join(r.text()[-3000:] for r in group)
        return group[0].text()

    def close(self) -> None:
        for rank in self._ranks.values():
            rank.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
