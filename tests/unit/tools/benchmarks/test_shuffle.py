"""The measure of shuffling distinguishes uniform from a pool, and a pool from no shuffling."""

import json
from pathlib import Path

import numpy as np
import pytest

from strata.dataload.plan import Plan
from strata.errors import ConfigError
from strata.tools.bench import main
from strata.tools.benchmarks.shuffle import Quality, measure_order

SIZES = (64,) * 64


def quality(pool: int) -> Quality:
    plan = Plan(shard_sizes=SIZES, batch_size=32, seed=0, pool_samples=pool)
    return measure_order(plan.epoch_order, shard_size=64, batch_size=32, epochs=2)


def test_a_pool_of_all_samples_is_uniform():
    uniform = measure_order(
        lambda epoch: np.random.default_rng(epoch).permutation(4096),
        shard_size=64,
        batch_size=32,
        epochs=2,
    )
    for found in (quality(4096), uniform):
        assert abs(found.serial_correlation) < 0.05
        assert abs(found.moved - 1 / 3) < 0.015
        assert found.moved_ks < 0.04
        assert found.same_shard == pytest.approx(63 / 4095, rel=0.1)


def test_a_small_pool_keeps_a_shards_samples_together():
    found = quality(256)
    assert found.same_shard == pytest.approx(63 / 255, rel=0.05)
    assert found.shards_in_batch == pytest.approx(4, abs=0.1)
    assert found.serial_correlation > 0.1
    assert quality(1).serial_correlation > 0.9


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    main(["shuffle", "--sets", "ucf101", "--pools", "16384", "--epochs", "1", "--out", str(out)])
    assert [row["pool"] for row in json.loads(out.read_text())] == ["16384", "uniform"]
    assert "ucf101" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no set imagenet; use ucf101"):
        main(["shuffle", "--sets", "imagenet"])
