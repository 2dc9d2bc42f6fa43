"""Videos of every length go through sharding, pretraining and each evaluation, and are counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from strata.dataload.reader import ShardReader
from strata.preprocess.command import main as shard
from tests.support.commands import TINY, records, succeed
from tests.support.source_videos import moving_scene, write_video

LENGTHS = (1, 15, 16, 31, 32, 33)
CLASSES = ("run", "walk")
QUICK = ("--features.num_clips", "2", "--device", "cpu", "--untrained_seeds", "[]")
TRAINING = ("--training.epochs", "1", "--training.batch_size", "4")
SIZES = "train listed 12, used 12; test listed 12, evaluated 12"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `test`, each with a video of each length in each of two classes."""
    root = tmp_path_factory.mktemp("short")
    for number, name in enumerate(("train", "test")):
        videos = root / "videos" / name
        for label, kind in enumerate(CLASSES):
            for length in LENGTHS:
                scene = moving_scene(length, 96, 64, seed=1000 * number + 100 * label + length)
                write_video(videos / kind / f"{length:02d}.mp4", scene)
        form = ("--width", "64", "--height", "48", "--workers", "1", "--log", "none")
        argv = ["folder", "--videos", str(videos), "--out", str(root / name), *form]
        shard([*argv, "--test-fraction", "0"])
    return root


@pytest.fixture(scope="module")
def pretrained(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("pretrained")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    said = succeed(
        *("train/main.py", "--config", config, "--data.shards", sets / "train" / "train"),
        *("--run", folder / "run", "--schedule.epochs", "2"),
    )
    return folder / "run", said


def test_every_video_is_sharded_with_the_default_settings(sets: Path):
    reader = ShardReader(sets / "train" / "train")
    assert sorted(reader.num_frames.tolist()) == sorted(2 * LENGTHS)
    assert reader.num_listed == reader.num_samples == 12


def test_pretraining_names_the_videos_that_it_leaves_out(pretrained: tuple[Path, str], sets: Path):
    run, said = pretrained
    reader = ShardReader(sets / "train" / "train")
    lengths = dict(zip(reader.keys, reader.num_frames.tolist(), strict=True))
    (start,) = records(run, "start")
    left_out = start["plan"]["left_out"]
    assert sorted(lengths[key] for key in left_out) == sorted(2 * (1, 15, 16, 31))
    assert start["plan"]["steps_per_epoch"] == 1
    line = next(line for line in said.splitlines() if line.strip().startswith("left out"))
    assert "8 of 12 videos have fewer than the window's 32 frames: " in line
    assert f"{left_out[0]} ({lengths[left_out[0]]})" in line
    assert "and 3 more, all named in log.jsonl" in line


def evaluate(name: str, run: Path, sets: Path, out: Path, *more: str) -> Any:
    words = ("--train", sets / "train" / "train", "--test", sets / "test" / "train")
    command = ("eval/main.py", name, "--checkpoint", run, "--out", out, *words, *QUICK, *more)
    said = succeed(*command)
    assert SIZES in said
    return json.loads((out / "report.json" if out.suffix == "" else out).read_text())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("retrieval", ()),
        ("linear", TRAINING),
        ("linear", ("--variant", "cached")),
        ("finetune", TRAINING),
        ("temporal_cam", ("--cam.videos", "12")),
    ],
    ids=["retrieval", "linear", "cached", "finetune", "temporal_cam"],
)
def test_every_listed_video_is_in_the_figures(
    name: str, more: tuple[str, ...], pretrained: tuple[Path, str], sets: Path, tmp_path: Path
):
    out = tmp_path / ("cues" if name == "temporal_cam" else "report.json")
    record = evaluate(name, pretrained[0], sets, out, *more)
    assert record["incomplete"] == ""
    (result,) = record["results"]
    for part in ("train", "test"):
        found = result["sets"][part]
        assert (found["num_listed"], found["num_videos"]) == (12, 12)
    page = (out / "report.html" if out.suffix == "" else out.with_suffix(".html")).read_text()
    assert SIZES in page
    assert "INCOMPLETE" not in page
    if name == "temporal_cam":
        frames = [cue["num_frames"] for cue in result["details"]["cues"]]
        # Each frame that a clip shows, once: a video shorter than a clip has its own frames.
        assert sorted(frames) == sorted(2 * LENGTHS)
        return
    assert np.sum(result["details"]["confusion"]["counts"]) == 12
    assert sum(row["num_test"] for row in result["details"]["per_class"]) == 12


def test_exported_features_have_every_video(
    pretrained: tuple[Path, str], sets: Path, tmp_path: Path
):
    command = ("eval/main.py", "features", "--checkpoint", pretrained[0], "--device", "cpu")
    command = (*command, "--shards", sets / "test" / "train", "--out", tmp_path / "f.npz")
    assert "features of 12 videos (listed 12)" in succeed(*command)
    assert np.load(tmp_path / "f.npz")["high"].shape == (12, 10, 64)


def test_missing_videos_are_reported_first(
    pretrained: tuple[Path, str], sets: Path, tmp_path: Path
):
    """A set that was sharded with a higher limit lacks videos that its list names."""
    videos = sets / "videos" / "test"
    form = ("--width", "64", "--height", "48", "--workers", "1", "--log", "none")
    argv = ["folder", "--videos", str(videos), "--out", str(tmp_path / "cut"), *form]
    shard([*argv, "--test-fraction", "0", "--min-frames", "16", "--max-rejects", "1"])
    out = tmp_path / "report.json"
    said = succeed(
        *("eval/main.py", "compare", "--checkpoint", pretrained[0], "--out", out, *QUICK),
        *("--train", sets / "train" / "train", "--test", tmp_path / "cut" / "train"),
    )
    text = "INCOMPLETE: listed videos are missing"
    told = [line for line in said.splitlines() if "protocol:" in line or text in line]
    assert told[0].startswith(text)
    assert "test: 4 of 12" in told[0]
    assert "train listed 12, used 12; test listed 12, evaluated 8" in said
    content = out.read_text()
    assert content.splitlines()[1].strip().startswith(f'"incomplete": "{text}')
    record = json.loads(content)
    assert np.sum(record["results"][0]["details"]["linear"]["confusion"]["counts"]) == 8
    page = out.with_suffix(".html").read_text()
    assert page.index(text) < page.index("Shares of the test set")
