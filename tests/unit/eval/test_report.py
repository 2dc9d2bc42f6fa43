"""report.json and the page's content from one result: baselines, chance, missing videos, curves."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strata.dataload.reader import ShardReader
from strata.eval.protocols.retrieval import RECALL_AT
from strata.eval.report import probe_curves, render, run_curves, shown_queries
from strata.eval.results import EvaluationResult, Retrieved, Row, write_json
from strata.eval.summary import figure_lines, full_text, summary
from strata.logs import read_json_lines
from tests.support.evaluation_results import (
    classifier_measurement,
    evaluation_result,
    recalls,
    retrieval_measurement,
)

ROOT = Path(__file__).parents[3]
STEPS = range(1, 1001)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run's folder whose log was cut off once, and repeats steps after a resume."""
    run = tmp_path / "run"
    step = {"kind": "step", "health": {"effective_rank": 3.0}}
    rows = [{"kind": "start", "chance": {"instance": 5.5}}]
    rows += [{**step, "step": n, "losses": {"instance": 9.0, "total": 9.0}} for n in (1, 2)]
    lines = [*map(json.dumps, rows), '{"kind": "st']
    lines += [json.dumps(rows[0])]
    for n in STEPS:
        losses = {"instance": 6 / n, "total": None if n == 2 else 7 / n}
        lines.append(json.dumps({**step, "step": n, "losses": losses}))
    for step, recall in ((0, 0.9), (0, 0.2), (500, 0.4)):
        figures = {"recall": {"R@1": recall}, "accuracy": {"linear": recall / 2}}
        probe = {"kind": "probe", "step": step, "chance": {"R@1": 0.1}, **figures}
        lines.append(json.dumps(probe))
    run.mkdir()
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    return run / "checkpoints" / "step-000001000"


@pytest.fixture
def retrieval(shards: Path, checkpoint: Path) -> EvaluationResult:
    measured = [retrieval_measurement(shards, share) for share in (0.4, 0.6)]
    return evaluation_result(shards, checkpoint, retrieval=measured)


def written(result: EvaluationResult, folder: Path) -> dict[str, Any]:
    write_json(result, folder / "new" / "report.json")
    return json.loads((folder / "new" / "report.json").read_text())


def test_figures_of_two_splits_have_their_baselines(retrieval: EvaluationResult):
    lines = figure_lines(retrieval, "retrieval")
    assert [line.name for line in lines] == [f"Retrieval R@{k}" for k in RECALL_AT]
    for line in lines:
        assert line.measured == (0.4, 0.6)
        assert line.untrained == (0.2, 0.2)
        assert line.chance == pytest.approx(0.1)
        assert line.data == (
            "made, mean of splits 1, 2; train listed 24, used 24; test listed 12, evaluated 12"
        )


def test_the_page_has_each_split_variants_and_provenance(retrieval: EvaluationResult):
    text = " ".join(render(retrieval).split())
    spread = f"{math.sqrt(0.02):.1%}"
    assert f'<td>standard deviation</td><td class="number">{spread}</td>' in text
    assert '<td>split 2</td><td class="number">60.0%</td>' in text
    assert '<td>low level, no centring</td><td class="number">25.0%</td>' in text
    assert "<dt>made, split 2, test set</dt><dd>12 videos of 12 listed, manifest digest " in text
    assert "num_clips: 10" in text
    assert "name: r3d18" in text
    published = text.partition("Published results")[2].partition("</table>")[0]
    assert "retrieval R@1" in published
    assert "linear probe" not in published


def test_queries_are_evenly_spaced_and_name_the_sets_videos(retrieval: EvaluationResult):
    pair = retrieval.pairs[0]
    details = pair.measured["retrieval"].details
    assert isinstance(details, Retrieved)
    assert sum(details.by_class.num_test) == 12
    queries = shown_queries(pair, details)
    assert len(queries) == 6
    assert [q.video.key for q in queries][::5] == ["video-0000", "video-0011"]
    nearest = queries[0].neighbours
    assert [n.key for n in nearest] == [pair.sets.train.keys[k] for k in details.nearest[0]]
    assert [n.similarity for n in nearest] == sorted((n.similarity for n in nearest), reverse=True)


def test_json_names_neighbours_as_the_page_does(retrieval: EvaluationResult, tmp_path: Path):
    record = written(retrieval, tmp_path)
    details = record["results"][0]["details"]
    counts = np.array(details["confusion"]["counts"])
    for k, row in enumerate(details["per_class"]):
        assert row["num_test"] == counts[k].sum()
        assert row["R@1"] == pytest.approx(counts[k, k] / counts[k].sum())
    (test,) = {pair.sets.test for pair in retrieval.pairs[:1]}
    for q, row in enumerate(details["neighbours"]):
        assert row["query"] == test.keys[q]
        assert len(row["nearest"]) == 5
        assert all(n["right"] == (n["class"] == row["class"]) for n in row["nearest"])
    assert record["figures"]["measured"]["R@1"] == pytest.approx(0.5)
    assert record["deviation"]["measured"]["R@1"] == pytest.approx(math.sqrt(0.02))
    assert "protocols" not in record


def test_missing_videos_head_the_report(
    retrieval: EvaluationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    test = retrieval.pairs[0].sets.test.location
    listed = property(lambda r: 1530 if r.location == test else r.num_samples)
    monkeypatch.setattr(ShardReader, "num_listed", listed)
    one = replace(retrieval, pairs=retrieval.pairs[:1], remark="Generated videos.")
    record = written(one, tmp_path)
    assert next(iter(record)) == "incomplete"
    sentence = "INCOMPLETE: listed videos are missing"
    assert record["incomplete"].startswith(sentence)
    assert full_text(one).startswith(sentence)
    text = " ".join(render(one).partition("</h1>")[2].split())
    assert text.startswith(f"<p>{sentence}")
    assert "made 1 test: 1,518 of 1,530. Generated videos. Shares of the test set" in text
    lines = figure_lines(one, "retrieval")
    assert all("test listed 1,530, evaluated 12" in line.data for line in lines)


def test_curves_are_those_of_the_log(retrieval: EvaluationResult, checkpoint: Path):
    records, num_lost = read_json_lines(checkpoint.parent.parent / "log.jsonl")
    assert num_lost == 1
    instance, total = run_curves(records, "losses", "nats")
    assert (instance.name, instance.chance, total.chance) == ("instance", 5.5, None)
    # A step that was repeated after a resume counts once, with the later values.
    assert instance.points == [(n, 6 / n) for n in STEPS]
    assert total.num_lost == 1
    assert [c.name for c in run_curves(records, "health", "")] == ["effective rank"]
    recall, linear = probe_curves(records)
    assert (recall.name, recall.chance, recall.points) == ("R@1", 0.1, [(0, 0.2), (500, 0.4)])
    assert (linear.name, linear.points) == ("Top-1, linear", [(0, 0.1), (500, 0.2)])
    assert "1 lines cannot be read" in render(retrieval)


def test_a_checkpoint_without_its_log_has_no_curves(retrieval: EvaluationResult, checkpoint: Path):
    (checkpoint.parent.parent / "log.jsonl").unlink()
    text = render(retrieval)
    assert "Loss terms" not in text
    assert "not found beside the checkpoint" in text


def test_an_untrained_network_is_not_called_pretrained(retrieval: EvaluationResult):
    assert "UNTRAINED" not in render(retrieval)
    assert "UNTRAINED" in render(replace(retrieval, is_untrained=True))


def test_two_protocols_and_several_networks(shards: Path, checkpoint: Path, tmp_path: Path):
    retrieval = retrieval_measurement(shards, 0.5)
    second = Row(name="pretrained, run-1", role="measured", shares=recalls(0.6))
    retrieval = replace(retrieval, rows=(*retrieval.rows, second))
    linear = classifier_measurement(shards)
    result = evaluation_result(shards, checkpoint, retrieval=[retrieval], linear=[linear])
    text = render(result)
    for shown in (
        "55.0% (50.0% to 60.0%)",
        "a protocol of retrieval",
        "a protocol of linear",
        "Confusion: Linear probe, made, split 1",
        "Confusion: Retrieval, made, split 1",
    ):
        assert shown in text
    recall, *_, top1 = summary(result).splitlines()[2:]
    assert recall.split() == "Retrieval R@1 55.0% (50.0% to 60.0%) 20.0% 10.0%".split()
    assert top1.split() == ["Linear", "probe", "Top-1", "70.0%", "not", "measured", "12.5%"]
    record = written(result, tmp_path)
    assert list(record["protocols"]) == ["retrieval", "linear"]
    (found,) = record["results"]
    assert set(found["figures"]["measured"]) == {*recalls(0), "Top-1"}
    assert "neighbours" in found["details"]["retrieval"]
    assert len(found["details"]["linear"]["predictions"]) == 12


def test_the_schema_is_documented(retrieval: EvaluationResult):
    record = retrieval.to_json()
    text = (ROOT / "docs" / "evaluation.md").read_text().partition("## report.json")[2]
    rows = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert set(record) <= named
    assert set(record["results"][0]) <= set(re.findall(r"`([^`]+)`", text))
    assert set(record["results"][0]["details"]) <= set(re.findall(r"`([^`]+)`", text))
