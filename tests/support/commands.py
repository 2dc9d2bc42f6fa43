"""Run the commands of the README, each in its own process."""

import json
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.forked import ROOT, fork_server, free_port

__all__ = ["ROOT", "TINY", "fail_with_one_line", "free_port", "records", "run", "scrape", "succeed"]

TINY = {
    "data": {"batch_size": 4, "size": 32, "threads": 1},
    "model": {"width": 8},
    "method": {"num_prototypes": 16, "queue_length": 16, "embedding_size": 16},
    "schedule": {
        "epochs": 3,
        "second_stage_epoch": 1,
        "queue_epoch": 1,
        "lr_drop_epochs": [2],
    },
    "engine": {"device": "cpu", "world_timeout_s": 60},
    "monitor": {"log_every": 1, "health_every": 2, "port": 0, "progress": False},
}


def run(script: str | Path, *words: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a script as `python SCRIPT ...` does, or as a launcher does on several CPU ranks.

    The process is forked from one that has imported everything. `tests/integration/test_launch.py`,
    `test_demo.py` and `test_help.py` start the same scripts from nothing and by every launcher.
    """
    server = fork_server()
    if ranks == 1:
        group = [server.fork(script, *words, apart=True)]
    else:
        group = server.start(*words, script=script, ranks=ranks)
    codes = [rank.wait() for rank in group]
    said = "".join(rank.text() for rank in group)
    errors = group[0].errors.read_text() if ranks == 1 else ""
    return subprocess.CompletedProcess([script, *words], max(codes, key=abs), said, errors)


def succeed(script: str | Path, *words: str | Path, ranks: int = 1) -> str:
    done = run(script, *words, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def fail_with_one_line(script: str | Path, *words: str | Path) -> str:
    """Run a command that must end with exit code 2 and one error line, and return the line."""
    done = run(script, *words)
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr[-3000:]
    return lines[0]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def scrape(port: int) -> dict[str, float]:
    """Read all samples of a metrics endpoint by name with labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    pairs = re.findall(r"^(strata_\S+) (\S+)$", text, flags=re.MULTILINE)
    return {name: float(value) for name, value in pairs}
