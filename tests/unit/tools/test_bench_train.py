"""The benchmark of a step runs the real trainer, and its parts add up."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from strata.errors import ConfigError, StrataError
from strata.tools.bench_train import PARTS, StepClock, main
from tests.commands import ROOT, TINY, run


def test_time_belongs_to_the_innermost_part():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        clock.start_step()
        time.sleep(0.02)
        with clock.part("backward"):
            time.sleep(0.02)
            with clock.part("communication"):
                time.sleep(0.06)
    (step,) = clock.steps()  # The second is not over: nothing says when.
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
        # Each was there to be measured; in TINY every step is logged.
        assert all(record["parts_s"][name] > 0 for name in PARTS)
        assert record["samples_per_s"] == pytest.approx(4 / record["step_s"])
        assert record["mfu"] > 0
        assert record["memory_bytes"] > 0
    assert "| communication, ms |" in done.stdout
    assert "| **step, ms** |" in done.stdout


def test_a_signal_before_the_end_is_told_and_nothing_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, out = tmp_path / "tiny.yaml", tmp_path / "out.jsonl"
    config.write_text(yaml.safe_dump(TINY))
    start_step = StepClock.start_step

    def start_and_kill(self: StepClock):
        start_step(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepClock, "start_step", start_and_kill)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    words = ["--config", config, "--data.shards", shards / "train", "--out", out]
    try:
        with pytest.raises(StrataError, match=r"a signal stopped stage 2 at step 1 of 7; nothing"):
            main([*map(str, words), "--stages", "2", "--steps", "5", "--warmup", "1"])
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert not out.exists()


def test_wrong_settings_are_named(shards: Path):
    with pytest.raises(ConfigError, match="--steps and --warmup must be 1 or more"):
        main(["--steps", "0"])
    with pytest.raises(ConfigError, match=r"modle\.width"):
        main(["--data.shards", str(shards / "train"), "--modle.width", "8"])
