"""Clips of UCF101 from its official lists through every protocol, from one pretraining run."""

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

from strata.preprocess.command import main as shard
from tests.support.commands import TINY, succeed

PER_CLASS = {"trainlist01.txt": 3, "testlist01.txt": 2}


def small_lists(ucf: Path, folder: Path) -> None:
    """The official lists of split 1, but few videos of each class that is there."""
    folder.mkdir()
    (folder / "classInd.txt").write_bytes((ucf / "splits" / "classInd.txt").read_bytes())
    for name, most in PER_CLASS.items():
        taken: dict[str, list[str]] = {}
        for line in (ucf / "splits" / name).read_text().splitlines():
            mine = taken.setdefault(line.partition("/")[0], [])
            if len(mine) < most and (ucf / "videos" / line.split()[0]).exists():
                mine.append(line)
        (folder / name).write_text("".join(f"{x}\n" for mine in taken.values() for x in mine))


@pytest.fixture(scope="module")
def sets(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ucf101")
    small_lists(real_data / "ucf101", root / "lists")
    videos = real_data / "ucf101" / "videos"
    argv = ["ucf101", "--videos", videos, "--splits", root / "lists", "--split", "1"]
    argv += ["--out", root / "shards", "--width", "64", "--height", "48", "--workers", "1"]
    shard(list(map(os.fspath, argv)))
    return root / "shards"


@pytest.fixture(scope="module")
def pretrained(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ("train/main.py", "--config", folder / "tiny.yaml", "--data.shards", sets / "train01")
    succeed(*command, "--run", folder / "run", "--schedule.epochs", "1")
    return folder / "run"


@pytest.mark.parametrize("name", ["retrieval", "linear", "finetune", "temporal_cam"])
def test_a_protocol_on_ucf101(name: str, sets: Path, pretrained: Path, tmp_path: Path):
    one, two = ("gallery", "query") if name == "retrieval" else ("train", "test")
    command = ["eval/main.py", name, "--checkpoint", pretrained, "--device", "cpu"]
    command += [f"--{one}", sets / "train01", f"--{two}", sets / "test01"]
    command += ["--features.num_clips", "4"]
    out = tmp_path / "cues" / "report.json" if name == "temporal_cam" else tmp_path / "report.json"
    command += ["--out", out.parent if name == "temporal_cam" else out]
    if name in ("linear", "finetune"):
        command += ["--training.epochs", "1", "--training.batch_size", "6"]
    if name == "temporal_cam":
        command += ["--cam.videos", "2", "--cam.max_clips", "5"]
    said = succeed(*command)
    record = json.loads(out.read_text())
    (result,) = record["results"]
    assert (result["data"], result["split"]) == ("ucf101", "train01/test01")
    assert [result["sets"][s]["num_videos"] for s in ("train", "test")] == [18, 12]
    figures = result["figures"]
    assert figures["measured"].keys() == figures["untrained, seed 0"].keys()
    assert all(0 <= v <= 1 for row in figures.values() for v in row.values())
    assert f"protocol: {record['protocol']}" in said
    page = out.with_suffix(".html").read_text()
    assert record["protocol"].replace("'", "&#39;") in page
    assert "untrained" in page
    if name == "temporal_cam":
        assert figures["chance"] == {"clips": 0.5, "videos": 0.5}
        look_at_cues(out.parent, result["details"]["cues"], page)
    else:
        # 6 of the 101 classes have videos here.
        assert len(result["details"]["per_class"]) == 6
        assert np.sum(result["details"]["confusion"]["counts"]) == 12


def look_at_cues(folder: Path, cues: list[dict], page: str) -> None:  # pyright: ignore[reportMissingTypeArgument]
    assert len(cues) == 2
    assert len(list(folder.glob("*.png"))) == 2
    assert page.count('<figure class="cue">') == 2
    for cue in cues:
        with av.open(str(cue["video"]), "r") as container:
            frames = list(container.decode(video=0))
        assert len(frames) == cue["num_frames"] > 16
        assert (frames[0].width, frames[0].height) == (3 * 64, 64)
