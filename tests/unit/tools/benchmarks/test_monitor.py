"""The benchmark of monitoring scrapes a real run in every second turn."""

import json
from pathlib import Path

import pytest
import yaml

from strata.errors import ConfigError
from strata.tools.benchmarks.monitor import main
from tests.support.commands import ROOT, TINY, free_port, run


def test_the_command(shards: Path, tmp_path: Path):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    words = ["--config", config, "--data.shards", shards / "train"]
    words += ["--monitor.port", str(free_port()), "--pause", "0.01"]
    quick = ["--turns", "2", "--steps", "2", "--warmup", "1", "--seconds", "0.5"]
    done = run(ROOT / "tools" / "bench.py", "monitor", *words, *quick)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["turns"] == 2
    assert record["cpu_of_a_scrape_s"] > 0
    assert record["scraping_ratio"] == pytest.approx(record["lost_to_a_scrape_s"] / 5)
    assert record["recording_ratio"] == pytest.approx(record["recording_s"] / record["step_s"])
    assert "| share of step time, scraped every 5 s |" in " ".join(done.stdout.split())


def test_wrong_settings_are_named(shards: Path):
    with pytest.raises(ConfigError, match="turns is 0; use 1 or more"):
        main(["--data.shards", str(shards / "train"), "--turns", "0"])
