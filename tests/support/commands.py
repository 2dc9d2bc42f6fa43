"""Run the commands of the README as a user does, each in its own process."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*words: str | Path, launcher: bool = False, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run `python ...`, or `deepspeed ...` with the given number of CPU ranks."""
    command = [sys.executable]
    if launcher:
        # The installed script fails in a path with a space; the module does not.
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        command += ["--master_port", str(free_port())]
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def succeed(*words: str | Path, launcher: bool = False, ranks: int = 1) -> str:
    done = run(*words, launcher=launcher, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def fail_with_one_line(*words: str | Path) -> str:
    """Run a command that must end with exit code 2 and one error line, and return the line."""
    done = run(*words)
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
