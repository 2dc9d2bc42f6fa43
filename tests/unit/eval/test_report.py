"""The page that a report becomes: figures with protocol, baseline and chance; the curves."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strata.dataload.reader import ShardReader
from strata.eval.accuracy import ClassSpace, measure_accuracy
from strata.eval.protocols.features import Features
from strata.eval.protocols.retrieval import RECALL_AT, retrieve
from strata.eval.report import DemoResult, build_page, write_report
from strata.eval.results import PairResult, accuracy_result, retrieval_result, write_record

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


def features(reader: ShardReader, seed: int) -> Features:
    values = np.random.default_rng(seed).normal(size=(reader.num_samples, 2, 6))
    levels = {level: values.astype(np.float32) for level in ("low", "mid", "high")}
    return Features(levels, reader.labels, reader.keys, reader.manifest.classes)


def pair(shards: Path, split: str, details: dict[str, Any], **more: Any) -> PairResult:
    sets = {}
    for name in ("train", "test"):
        reader = ShardReader(shards / name)
        sets[name] = {
            "folder": str(shards / name),
            "manifest_digest": reader.manifest.digest,
            "num_listed": reader.num_listed,
            "num_videos": reader.num_samples,
        }
    return PairResult(data="made", split=split, sets=sets, details=details, **more)


def found(shards: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of a retrieval and of a classifier."""
    gallery, queries = (
        features(ShardReader(shards / n), 1 + k) for k, n in enumerate(("train", "test"))
    )
    nearest = retrieve(queries.videos("high"), gallery.videos("high"), "none", max(RECALL_AT))
    space = ClassSpace.of(gallery.labels, queries.labels, queries.classes, learned=True)
    probabilities = np.random.default_rng(3).dirichlet(np.ones(len(space)), len(queries.keys))
    accuracy = measure_accuracy(probabilities, space.index(queries.labels))
    return retrieval_result(queries, gallery, *nearest, 5), accuracy_result(
        accuracy, space, queries.keys
    )


def record(checkpoint: Path, out: Path, results: list[PairResult], **head: Any) -> dict[str, Any]:
    said = {
        "checkpoint": str(checkpoint),
        "checkpoint_digest": "c0ffee",
        "step": 1000,
        "settings": {"features": {"num_clips": 10}},
        "num_ranks": 2,
        "device": "cpu",
        "pretraining": {"model": {"name": "r3d18"}},
        "pretraining_manifest_digest": "abad1dea",
    }
    write_record(out, said | head, results)
    return json.loads(out.read_text())


def recalls(share: float) -> dict[str, float]:
    return {f"R@{k}": share for k in RECALL_AT}


@pytest.fixture
def retrieval(shards: Path, checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    details, _ = found(shards)
    results = [
        pair(
            *(shards, split, details),
            figures={
                "measured": recalls(share),
                "untrained, seed 0": recalls(0.2),
                "chance": recalls(0.1),
            },
            variants={"low level, no centring": recalls(share / 2)},
        )
        for split, share in (("1", 0.4), ("2", 0.6))
    ]
    head = {"evaluation": "retrieval", "protocol": "retrieval: 10 clips, not centred"}
    return record(checkpoint, tmp_path / "report.json", results, **head)


def test_a_retrieval_over_two_splits(retrieval: dict[str, Any]):
    page = build_page(retrieval)
    assert [row.name for row in page.figures] == [f"Retrieval R@{k}" for k in RECALL_AT]
    for row in page.figures:
        assert row.measured == (0.4, 0.6)
        assert row.untrained == (0.2, 0.2)
        assert row.chance == pytest.approx(0.1)
        assert row.protocol == "retrieval: 10 clips, not centred"
        assert row.data == (
            "made, mean of splits 1, 2; train listed 24, used 24; test listed 12, evaluated 12"
        )
    each, variants = page.tables
    assert list(each.rows) == ["split 1", "split 2", "standard deviation"]
    assert each.rows["standard deviation"][0] == pytest.approx(math.sqrt(0.02))
    assert variants.rows["low level, no centring"][0] == pytest.approx(0.25)
    assert {p.protocol.split()[0] for p in page.published} == {"retrieval"}
    (classes,) = page.classes
    assert sum(count for count, _ in classes.per_class.values()) == 12
    (shown,) = page.retrieved
    assert shown.title == "made, split 1"
    assert len(shown.queries) == 6
    assert [q.key for q in shown.queries][::5] == ["video-0000", "video-0011"]
    assert all(len(q.neighbours) == 5 for q in shown.queries)
    assert page.provenance["made, split 2, test set"].startswith(
        "12 videos of 12 listed, manifest digest "
    )
    assert "num_clips: 10" in page.config
    assert "name: r3d18" in page.config


def test_missing_videos_head_the_page(shards: Path, checkpoint: Path, tmp_path: Path):
    details, _ = found(shards)
    figures = {"measured": recalls(0.4), "chance": recalls(0.1)}
    result = pair(shards, "1", details, figures=figures)
    result.sets["test"]["num_listed"] = 1530
    head = {"evaluation": "retrieval", "protocol": "retrieval: 10 clips, not centred"}
    content = record(checkpoint, tmp_path / "report.json", [result], **head)
    assert next(iter(content)) == "incomplete"
    page = build_page(content)
    assert page.note.startswith("INCOMPLETE: listed videos are missing")
    assert "made 1 test: 1,518 of 1,530. Shares of the test set" in page.note
    assert all("test listed 1,530, evaluated 12" in row.data for row in page.figures)


def test_curves_are_those_of_the_log(retrieval: dict[str, Any]):
    page = build_page(retrieval)
    instance, total = page.curves
    assert (instance.name, instance.chance, total.chance) == ("instance", 5.5, None)
    assert len(instance.points) == 400
    # What was repeated after a resume counts once, as it was the second time.
    assert instance.points[0] == (1, 6.0)
    assert instance.points[-1] == (1000, 6 / 1000)
    assert [c.name for c in page.health] == ["effective rank"]
    recall, linear = page.probe
    assert (recall.name, recall.chance, recall.points) == ("R@1", 0.1, ((0, 0.2), (500, 0.4)))
    assert (linear.name, linear.points) == ("Top-1, linear", ((0, 0.1), (500, 0.2)))
    assert page.provenance["pretraining log"] == "1 lines cannot be read"


def test_a_checkpoint_without_its_log_says_so(retrieval: dict[str, Any], checkpoint: Path):
    (checkpoint.parent.parent / "log.jsonl").unlink()
    page = build_page(retrieval)
    assert page.curves == page.health == ()
    assert "not found beside the checkpoint" in page.provenance["pretraining log"]


def test_an_untrained_network_is_not_called_pretrained(retrieval: dict[str, Any]):
    assert "UNTRAINED" not in build_page(retrieval).note
    assert "UNTRAINED" in build_page(retrieval | {"evaluation": "retrieval-untrained-3"}).note


def test_a_demo_has_both_protocols_and_all_networks(shards: Path, checkpoint: Path, tmp_path: Path):
    retrieved, classified = found(shards)
    details = {"retrieval": retrieved, "linear": classified}
    figures = {row: {"R@1": 0.5, "Top-1": 0.7} for row in ("pretrained", "chance")}
    results = [pair(shards, "train/test", details, figures=figures)]
    protocols = {"retrieval": "retrieval: by cosine", "linear": "linear, cached: a layer"}
    head = {"evaluation": "compare", "protocol": "both", "protocols": protocols}
    found_out = record(checkpoint, tmp_path / "compare.json", results, **head)
    result = DemoResult(
        generated=True,
        trained=({"R@1": 0.5, "R@5": 0.6, "Top-1": 0.7}, {"R@1": 0.6, "R@5": 0.6, "Top-1": 0.8}),
        untrained=({"R@1": 0.2, "R@5": 0.3, "Top-1": 0.4},),
        chance={"R@1": 0.125, "R@5": 0.5, "Top-1": 0.125},
        logs=(),
        wall_s=61.0,
        manifest_digest="d",
    )
    text = write_report(result, found_out, tmp_path).read_text()
    for shown in (
        "55.0% (50.0% to 60.0%)",
        "75.0% (70.0% to 80.0%)",
        "retrieval: by cosine",
        "linear, cached: a layer",
        "how good the method is on real videos",
        "Confusion: Linear probe, made, train/test",
        "Confusion: Retrieval, made, train/test",
        "61 s",
    ):
        assert shown in text
    assert "75.0% (70.0% to 80.0%)" in result.table()


def test_the_schema_is_documented(retrieval: dict[str, Any]):
    text = (ROOT / "docs" / "evaluation.md").read_text().partition("## report.json")[2]
    rows = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert set(retrieval) <= named
    assert set(retrieval["results"][0]) <= set(re.findall(r"`([^`]+)`", text))
