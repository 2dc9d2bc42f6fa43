"""The benchmark runs every part at a small size and names what it does not know."""

import json
from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.tools.bench_device import main


def test_every_part_gives_a_rate(shards: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    sizes = ["--batch", "4", "--size", "32", "--width", "8", "--threads", "1"]
    main(["--shards", str(shards / "train"), *sizes, "--seconds", "0.1", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["part"] for line in lines} == {"ceilings", "jpeg", "graph", "loader", "step"}
    rates = [v for line in lines for k, v in line.items() if k.endswith("per_s")]
    assert len(rates) >= 5
    assert all(rate > 0 for rate in rates)


def test_an_unknown_part_is_named(shards: Path):
    with pytest.raises(ConfigError, match="has no part engine"):
        main(["--shards", str(shards / "train"), "--parts", "engine"])
