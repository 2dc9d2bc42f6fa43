"""The picture of what a probe found: read from logs, the same bytes for the same runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from strata.errors import ConfigError
from strata.tools.learning_curve import draw, main, read_learning


def run(folder: Path, *records: dict) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def probe(step: int, recall: float, **more: float) -> dict:
    found = {"recall": {"R@1": recall}, "chance": {"R@1": 0.2}}
    return {"kind": "probe", "step": step, **found} | ({"accuracy": more} if more else {})


def test_the_last_record_of_each_step_is_drawn(tmp_path: Path):
    old = run(tmp_path / "old", {"kind": "step", "step": 1}, probe(0, 0.9), probe(0, 0.25))
    new = run(tmp_path / "new", probe(0, 0.3, linear=0.4, knn=0.1), probe(150, 0.5, linear=0.6))
    found = {"old": read_learning(old), "new": read_learning(new)}
    assert found["old"].points == {"R@1": [(0, 25.0)], "linear": []}
    assert found["new"].points == {"R@1": [(0, 30.0), (150, 50.0)], "linear": [(0, 40), (150, 60)]}
    retrieval, linear = draw(found).axes
    lines = {str(line.get_label()): line for line in retrieval.get_lines()}
    assert np.asarray(lines["new"].get_ydata()).tolist() == [30.0, 50.0]
    assert np.asarray(lines["chance"].get_ydata())[0] == pytest.approx(20)
    assert [np.asarray(line.get_ydata()).size for line in linear.get_lines()] == [0, 2]


def test_the_command_writes_the_same_svg_twice(tmp_path: Path):
    folder = run(tmp_path / "run", probe(0, 0.3, linear=0.4), probe(150, 0.5, linear=0.6))
    pictures = []
    for name in ("a.svg", "b.svg"):
        main(["--runs", json.dumps({"paper": str(folder)}), "--out", str(tmp_path / name)])
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert b"<svg" in pictures[0]


def test_a_run_without_a_probe_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is not there; give the folder of a pretraining"):
        read_learning(tmp_path)
    with pytest.raises(ConfigError, match=r"no record of a probe; pretrain with --probe\.every"):
        read_learning(run(tmp_path / "run", {"kind": "step", "step": 1}))


def test_a_cut_line_is_skipped_and_a_damaged_record_is_named(tmp_path: Path):
    folder = run(tmp_path / "run", probe(0, 0.5))
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'\n{"kind": "pro\xff\n')
    assert read_learning(folder).points["R@1"] == [(0, 50.0)]
    log.write_text('{"kind": "probe", "step": 1, "recall": {"R@1": "high"}}\n')
    with pytest.raises(ConfigError, match=r"log\.jsonl .* not valid: .*R@1"):
        read_learning(folder)
