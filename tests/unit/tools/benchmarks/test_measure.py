"""What the benchmarks share: turns, rates, tables, options and the names of the benchmarks."""

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.ranges import check_range
from strata.tools import bench
from strata.tools.benchmarks import measure


def test_each_round_starts_with_another_contender():
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    rounds = measure.in_turns({name: lambda n=name: run(n) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc"
    assert [list(r) for r in rounds] == [list("abc")] * 4
    assert rounds[1] == {"b": 4, "c": 5, "a": 6}


def test_a_rate_counts_items_between_two_readings_of_the_clock(monkeypatch: pytest.MonkeyPatch):
    calls, waits, now = count(), count(), count()
    # The clock: a second between two readings; the loop ends when 3 s have passed.
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    found = measure.rate(lambda: next(calls), 3.0, items=8, warmup=2, wait=lambda: next(waits))
    assert next(calls) == 2 + 3
    assert next(waits) == 2
    assert found == 3 * 8 / 4


def test_a_rate_measures_at_least_one_call():
    calls = count()
    assert measure.rate(lambda: next(calls), 0.0) > 0
    assert next(calls) == 1


def test_columns_of_a_table_are_aligned():
    assert measure.table(["", "rate"], [["data", 10.5], ["end to end", 3]]).splitlines() == [
        "|            | rate |",
        "| ---------- | ---- |",
        "| data       | 10.5 |",
        "| end to end | 3    |",
    ]


def test_a_spread_is_the_median_and_the_range():
    assert measure.spread([3.0, 1.0, 2.0, 10.0]) == "2.50 (1.00 to 10.00)"


def test_videos_are_evenly_spaced_in_the_order_of_their_names(tmp_path: Path):
    for number in range(10):
        (tmp_path / f"{number}.mp4").touch()
    (tmp_path / "0.txt").touch()
    assert [p.stem for p in measure.find_videos(tmp_path, 3)] == ["0", "3", "6"]
    assert len(measure.find_videos(tmp_path, 99)) == 10
    with pytest.raises(ConfigError, match=r"no videos in .*; correct --videos"):
        measure.find_videos(tmp_path / "none", 1)


def test_records_are_appended_as_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "out.jsonl"
    for number in range(2):
        measure.append_record(path, {"number": number})
    assert [json.loads(x) for x in path.read_text().splitlines()] == [{"number": 0}, {"number": 1}]
    assert capsys.readouterr().out == path.read_text()


@dataclass(frozen=True, kw_only=True)
class Options:
    """The first line.

    Not the help's.
    """

    rounds: int = 3
    """Turns."""

    def __post_init__(self):
        check_range(self, "rounds", at_least=1)


def test_options_are_checked_and_the_class_explains_the_benchmark(
    capsys: pytest.CaptureFixture[str],
):
    assert measure.parse_options(Options, ["--rounds", "5"], "x") == Options(rounds=5)
    with pytest.raises(ConfigError, match=r"tools/bench\.py x: rounds is 0; use 1 or more"):
        measure.parse_options(Options, ["--rounds", "0"], "x")
    with pytest.raises(SystemExit):
        measure.parse_options(Options, ["--help"], "x")
    output = capsys.readouterr().out
    assert "The first line." in output
    assert "Not the help's." not in output


def test_every_benchmark_has_a_main_and_shows_its_options(capsys: pytest.CaptureFixture[str]):
    for subject in bench.SUBJECTS:
        with pytest.raises(SystemExit) as caught:
            bench.main([subject, "--help"])
        assert caught.value.code == 0
        assert f"tools/bench.py {subject}" in capsys.readouterr().out


def test_an_earlier_name_of_a_benchmark_is_accepted(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench.main(["dataload", "--help"])
    assert "tools/bench.py data" in capsys.readouterr().out


def test_an_unknown_subject_is_named():
    with pytest.raises(ConfigError, match=r"measures .*preprocess"):
        bench.main(["coffee"])


def test_without_a_subject_all_are_listed(capsys: pytest.CaptureFixture[str]):
    bench.main([])
    output = capsys.readouterr().out
    assert all(f"  {subject} " in output for subject in bench.SUBJECTS)
