"""The benchmark of the temporal terms: its videos, its probe, its control and its command."""

import json
from pathlib import Path

import pytest
import torch

from strata.errors import ConfigError
from strata.tools.bench import main
from strata.tools.benchmarks.temporal import (
    QUESTIONS,
    moving_videos,
    probe,
    replicate_in_time,
    small_model,
)
from strata.train.method.settings import TermWeights
from strata.train.models.inputs import normalise


def test_the_labels_describe_the_motion_and_appearance_does_not_predict_them():
    videos = moving_videos(256, seed=3)
    # What differs from the last frame is where the spot is, at first and in the middle.
    gray = videos.clips.float().mean(dim=4)
    changed = (gray - gray[:, -1:]).abs()
    at = torch.arange(24.0) + 0.5

    def centre(frame: int) -> torch.Tensor:
        weight = (changed[:, frame] - 20).clamp(min=0)
        mass = weight.sum(dim=(1, 2)).clamp(min=1e-6)
        rows = (weight.sum(dim=2) * at).sum(dim=1) / mass
        columns = (weight.sum(dim=1) * at).sum(dim=1) / mass
        return torch.stack([rows, columns], dim=1)

    step = centre(8) - centre(0)
    guess = torch.stack([step[:, 1], step[:, 0], -step[:, 1], -step[:, 0]], dim=1).argmax(dim=1)
    assert (guess == videos.direction).double().mean() > 0.8
    colours = videos.clips.float().mean(dim=(1, 2, 3))
    half = slice(0, 128), slice(128, 256)
    for labels in (videos.direction, videos.pace):
        found = probe(colours[half[0]], labels[half[0]], colours[half[1]], labels[half[1]])
        assert found < 1 / (int(labels.max()) + 1) + 0.12
    assert torch.equal(moving_videos(256, seed=3).clips, videos.clips)


def test_the_probe_predicts_linear_labels_only():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    y = torch.randn(400, 6, generator=generator)
    linear, product = (x[:, 0] + x[:, 1] > 0).long(), (x[:, 0] * x[:, 1] > 0).long()
    assert probe(x, linear, y, (y[:, 0] + y[:, 1] > 0).long()) > 0.95
    assert probe(x, product, y, (y[:, 0] * y[:, 1] > 0).long()) < 0.6
    # Scale and offset of a feature do not matter.
    assert probe(x * 1e3 + 7, linear, y * 1e3 + 7, (y[:, 0] + y[:, 1] > 0).long()) > 0.95


def test_padding_with_zeros_marks_the_steps_of_a_still_clip_and_repeating_does_not():
    still = moving_videos(2, seed=0).clips[:, :1].expand(-1, 16, -1, -1, -1)
    spread = []
    for replicate in (False, True):
        model = small_model(TermWeights())
        if replicate:
            replicate_in_time(model)
        with torch.no_grad():
            maps = model.eval().backbone(normalise(still, 3))
        assert maps.mid.shape[2] == 4
        spread.append(float((maps.mid - maps.mid.mean(dim=2, keepdim=True)).abs().max()))
    assert spread[0] > 0.1
    assert spread[1] < 1e-5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.jsonl"
    small = ["--steps", "1", "--videos", "32", "--batch", "4", "--size", "16", "--seeds", "0"]
    arms = ["untrained", "both"]
    main(["temporal", *small, "--arms", *arms, "--out", str(out)])
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [r["arm"] for r in records] == arms
    assert "augmentation_low" in records[1]["terms"]
    table = " ".join(capsys.readouterr().out.split())
    for question, chance in QUESTIONS.items():
        assert f"| {question} ({chance:.0%}) | mid, excited |" in table
        # Whatever was learned: an average over time is the same for maps in any order.
        for record in records:
            if question.startswith("reversed maps"):
                assert record["probes"][question]["high"] == chance
    main(["temporal", *small, "--arms", "both", "--out", str(out)])
    again = json.loads(out.read_text(encoding="utf-8").splitlines()[-1])
    assert again == records[1]
    with pytest.raises(ConfigError, match="batch 2 or more"):
        main(["temporal", "--batch", "1"])
