"""The benchmark of a step runs the real trainer, and its parts add up to the step."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml

from strata.errors import ConfigError
from strata.tools.benchmarks.train import PARTS, StepClock, main
from tests.support.commands import ROOT, TINY, fail_with_one_line, run


def test_time_is_attributed_to_the_innermost_part():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        clock.start_step()
        time.sleep(0.02)
        with clock.part("backward"):
            time.sleep(0.02)
            with clock.part("communication"):
                time.sleep(0.06)
    (step,) = clock.steps()  # The second step has not ended.
    assert tuple(step) == PARTS
    assert {name for name, seconds in step.items() if seconds > 0.01} == {
        "rest",
        "backward",
        "communication",
    }
    assert step["communication"] > step["backward"]


def test_the_command_on_two_ranks(shards: Path, tmp_path: Path):
    config, out = tmp_path / "tiny.yaml", tmp_path / "out.jsonl"
    config.write_text(yaml.safe_dump(TINY))
    words = ["--config", config, "--data.shards", shards / "train", "--out", out]
    quick = ["--steps", "1", "--warmup", "1", "--stages", "2", "--seconds", "0.1", "--ranks", "2"]
    done = run(ROOT / "tools" / "bench.py", "train", *words, *quick)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["stage"] for r in records] == [2]
    for record in records:
        assert record["ranks"] == 2
        assert sum(record["parts_s"].values()) == pytest.approx(record["step_s"])
        # Every part was measured; in TINY every step is logged.
        assert all(record["parts_s"][name] > 0 for name in PARTS)
        assert record["samples_per_s"] == pytest.approx(4 / record["step_s"])
        assert record["mfu"] > 0
        assert record["memory_bytes"] > 0
    output = " ".join(done.stdout.split())
    assert "| communication, ms |" in output
    assert "| **step, ms** |" in output


STOPPED = """
import os, signal, sys
from strata.errors import exit_with_one_line
from strata.tools.benchmarks.train import StepClock, main

start_step = StepClock.start_step

def start_and_kill(self):
    start_step(self)
    os.kill(os.getpid(), signal.SIGTERM)

StepClock.start_step = start_and_kill
with exit_with_one_line():
    main(sys.argv[1:])
"""


def test_a_signal_before_the_end_is_an_error_and_nothing_is_written(shards: Path, tmp_path: Path):
    config, out = tmp_path / "tiny.yaml", tmp_path / "out.jsonl"
    config.write_text(yaml.safe_dump(TINY))
    words = ["--config", config, "--data.shards", shards / "train", "--out", out]
    # In a process of its own: DeepSpeed keeps the groups of the first world that it sees.
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    said = fail_with_one_line(script, *words, *("--stages", "2", "--steps", "5", "--warmup", "1"))
    assert "a signal stopped stage 2 at step 1 of 7; nothing was measured" in said
    assert not out.exists()


def test_wrong_settings_are_named(shards: Path):
    with pytest.raises(ConfigError, match="steps is 0; use 1 or more"):
        main(["--data.shards", str(shards / "train"), "--steps", "0"])
    with pytest.raises(ConfigError, match=r"modle\.width"):
        main(["--data.shards", str(shards / "train"), "--modle.width", "8"])
