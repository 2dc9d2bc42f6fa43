"""A grid of settings and seeds: killed and started again, failures, what is refused."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from strata.errors import ConfigError
from strata.tools.ablation import main
from tests.commands import ROOT, TINY

RETRIEVAL = {"protocol": "retrieval", "set": {"device": "cpu", "features.num_clips": 2}}
PRETRAIN = {
    "schedule": {"epochs": 2, "second_stage_epoch": 1, "queue_epoch": 1, "lr_drop_epochs": []},
    "checkpoint": {"every_steps": 2, "keep": 9},
}


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A grid in this process leaves its handlers."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def grid(tmp_path: Path, shards: Path) -> dict[str, Any]:
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(TINY | PRETRAIN))
    return {
        "title": "A trial",
        "pretrain": str(tiny),
        "shards": str(shards / "train"),
        "test": str(shards / "test"),
        "out": str(tmp_path / "out"),
        "seeds": [0, 1],
        "rows": {"one": {}, "same": {"set": {"method.temperature": 0.07}}},
        "evaluations": {"retrieval": RETRIEVAL},
        "launcher": "python",
    }


def written(grid: dict[str, Any], **changes: Any) -> list[str]:
    """Arguments for a grid with some settings replaced."""
    path = Path(grid["out"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(grid | changes))
    return ["--config", str(path)]


def result(grid: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(grid["out"]) / "ablation.json").read_text())


def processes_with(text: str) -> list[int]:
    """Processes whose command line has a text."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and text in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_killed_and_started_again_it_ends_with_the_same_table(
    grid: dict[str, Any], capfd: pytest.CaptureFixture[str]
):
    """The two rows have the same settings: one is interrupted, the other is not."""
    run = Path(grid["out"]) / "rows" / "one" / "seed-0" / "run"
    argv = written(grid, launcher="deepspeed")
    process = subprocess.Popen([sys.executable, "tools/ablate.py", *argv], cwd=ROOT)
    limit = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*/complete.json")):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.01)
    # As if the machine had gone: the launcher, the rank and the grid itself.
    for pid in [process.pid, *processes_with(str(run))]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert main(written(grid)) == 0
    said = capfd.readouterr().out
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] > 0 for r in log if r["kind"] == "start"] == [False, True]
    found = result(grid)
    by_run = {(r["row"], r["seed"]): r for r in found["runs"]}
    assert {r["status"] for r in by_run.values()} == {"whole"}
    for seed in (0, 1):
        first, second = (by_run[row, seed] for row in ("one", "same"))
        mine, theirs = (r["evaluations"]["retrieval"] for r in (first, second))
        assert mine["figures"] == theirs["figures"]
        health = first["pretraining"]["health"]
        assert health == second["pretraining"]["health"]
        assert {"graph_off_diagonal_mass", "prototypes_in_use", "cosine_altered_0_low"} <= set(
            health
        )
        assert first["pretraining"]["steps"] == 12
        assert first["pretraining"]["pretraining_s"] > 0
    values = [
        by_run["same", seed]["evaluations"]["retrieval"]["figures"]["made"]["R@1"]
        for seed in (0, 1)
    ]
    for row in ("one", "same"):
        recall = found["rows"][row]["figures"]["retrieval"]["made"]["R@1"]
        assert recall["mean"] == pytest.approx(statistics.fmean(values))
        assert recall["deviation"] == pytest.approx(statistics.stdev(values))
        assert recall["num_seeds"] == 2
    mean, deviation = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
    page = (Path(grid["out"]) / "ablation.md").read_text()
    assert f"| one | 2 | {mean:.1f} ± {deviation:.1f} |" in page
    assert "test videos query the training set" in page
    assert "| chance |  | 25.0 |" in page
    assert said.count("$ python train/main.py") == 4
    # Whole: nothing is run again.
    assert main(written(grid, launcher="false")) == 0
    assert "$ false" not in capfd.readouterr().out
    # A row that is no longer the same may not stand beside what was measured before.
    with pytest.raises(
        ConfigError, match=r"row same having method.temperature 0.07, now it is 0.2"
    ):
        main(written(grid, rows={"one": {}, "same": {"set": {"method.temperature": 0.2}}}))
    wider = {"protocol": "retrieval", "set": {"device": "cpu", "features.num_clips": 3}}
    with pytest.raises(ConfigError, match=r"evaluation retrieval having features.num_clips 2"):
        main(written(grid, evaluations={"retrieval": wider}))
    # New rows and seeds may; one that fails is named, and the others stay.
    rows = grid["rows"] | {"new": {"set": {"method.temperature": 0.2}}}
    assert main(written(grid, rows=rows, launcher="false")) == 1
    page = (Path(grid["out"]) / "ablation.md").read_text()
    assert f"| one | 2 | {mean:.1f} ± {deviation:.1f} |" in page
    assert "| new | 0 of 2 whole | not measured |" in page
    assert "- new, seed 1: pretraining failed with exit code 1; see " in page
