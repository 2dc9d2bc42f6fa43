"""The benchmark of a device runs every part at a small size and refuses unknown names."""

import json
from pathlib import Path

import pytest
from PIL import Image

from strata.errors import ConfigError
from strata.tools.benchmarks.device import main
from tests.support.commands import succeed

PARTS = ("ceilings", "decode", "graph", "loader", "step", "precision", "training")


def test_every_part_gives_a_rate(shards: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out.jsonl", tmp_path / "plot.png"
    words = ["--shards", str(shards / "train"), "--batch", "4", "--size", "32", "--width", "8"]
    words += ["--threads", "1", "2", "--variants", "plain", "half the batch", "--stages", "1"]
    words += ["--seconds", "0.1", "--steps", "2", "--out", str(out), "--plot", str(picture)]
    # In a process of its own: DeepSpeed keeps the groups of the first world that it sees.
    output = " ".join(succeed("tools/bench.py", "device", *words).split())
    records = [json.loads(line) for line in out.read_text().splitlines()]
    by_part = {part: [r for r in records if r["part"] == part] for part in PARTS}
    assert all(by_part.values())
    assert all(v > 0 for r in records for k, v in r.items() if k.endswith("per_s"))
    assert {(r["stored"], r["threads"], r["start"]) for r in by_part["decode"]} == {
        (stored, threads, start)
        for stored in ("strip", "single", "mjpeg", "vp9 gop 16")
        for threads in (1, 2)
        for start in ((0, 32) if stored in ("mjpeg", "vp9 gop 16") else (0,))
    }
    assert [(r["variant"], r["batch"]) for r in by_part["step"]] == [
        ("plain", 4),
        ("half the batch", 2),
    ]
    exact, rounded = by_part["precision"]
    assert (exact["precision"], rounded["precision"]) == ("fp32", "bf16")
    assert exact["cosine"] == pytest.approx(1)
    assert exact["norm_ratio"] == pytest.approx(1)
    # Rounded, and still the same direction; not fp32 once more.
    assert 0.5 < rounded["cosine"] < 1 - 1e-7
    assert 0.5 < rounded["rest_cosine"] < 1 - 1e-7
    assert "precision, bf16, stage 1, batch 4: the encoder's gradient has cosine" in output
    (training,) = by_part["training"]
    assert training["of_step_alone"] == pytest.approx(
        training["samples_per_s"] / by_part["step"][0]["samples_per_s"]
    )
    assert sum(training["shares"].values()) == pytest.approx(1, abs=0.02)
    assert "| step | plain, stage 1, batch 4 |" in output
    assert "of the step alone; data wait" in output
    with Image.open(picture) as image:
        assert image.width > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "engine"], "no part engine; use ceilings"),
        (["--variants", "fast"], "no variant fast; use plain"),
    ],
)
def test_unknown_names_are_errors(shards: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--shards", str(shards / "train"), *words])
