"""A short soak: memory, descriptors and threads do not grow with batches or loaders."""

import json
from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.tools.bench import main
from strata.tools.benchmarks.soak import Reading, growth, reopen, soak


def test_batches_leave_nothing_behind(shards: Path):
    readings = list(soak(shards / "train", batches=300, every=30, batch=2, frames=2))
    late = readings[3:]
    assert len(late) == 7
    assert {r.fds for r in late} == {late[0].fds}
    assert {r.threads for r in late} == {late[0].threads}
    assert late[-1].shm_mib == late[0].shm_mib
    # A batch is 50 kB and its strips are 30 kB: keeping them would cost 16 MiB.
    assert late[-1].rss_mib - late[0].rss_mib < 6


def test_closed_loaders_leave_nothing_behind(shards: Path):
    readings = list(reopen(shards / "train", loaders=12, every=2, batch=2, frames=2))
    assert readings[-1].fds == readings[1].fds
    assert readings[-1].threads <= readings[1].threads + 1
    assert readings[-1].rss_mib - readings[1].rss_mib < 30


def test_growth_is_the_slope_of_the_second_half():
    readings = [Reading(1000 * k, 100 + 2.0 * max(k - 4, 0), 0.0, 9, 3) for k in range(10)]
    slope = growth(readings)
    assert slope["rss_mib"] == pytest.approx(2)
    assert slope["fds"] == pytest.approx(0)


def test_a_wrong_count_is_named():
    with pytest.raises(ConfigError, match="batches is 0"):
        main(["soak", "--batches", "0"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    main(["soak", "--batches", "8", "--loaders", "4", "--readings", "4", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [r["count"] for r in record["batches"]] == [2, 4, 6, 8]
    assert [r["count"] for r in record["loaders"]] == [1, 2, 3, 4]
    assert "1,000 batches add" in capsys.readouterr().out
