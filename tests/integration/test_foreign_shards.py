"""Tars that somebody else wrote: indexed, then trained and evaluated on as they are."""

from pathlib import Path

import yaml
from webdataset.writer import ShardWriter

from strata.format.manifest import read_manifest
from strata.preprocess.command import main
from tests.support.commands import TINY, records, succeed
from tests.support.source_videos import moving_scene, write_video


def test_from_foreign_tars_to_a_figure(tmp_path: Path):
    for name, first in (("train", 0), ("test", 8)):
        (tmp_path / name).mkdir()
        with ShardWriter(str(tmp_path / name / "%03d.tar"), maxcount=5, verbose=0) as writer:
            for k in range(first, first + 8):
                video = write_video(
                    tmp_path / "v.mp4",
                    moving_scene(36, 80, 60, seed=k),
                    codec="libx264",
                    options={"g": "12", "bf": "2"},
                )
                facts = {"label": ("run", "walk")[k % 2]}
                writer.write({"__key__": f"v{k}", "mp4": video.read_bytes(), "json": facts})
        main(["index", str(tmp_path / name)])
    tiny, run = tmp_path / "tiny.yaml", tmp_path / "run"
    tiny.write_text(yaml.safe_dump(TINY | {"schedule": {"epochs": 1, "lr_drop_epochs": []}}))
    stride = ("--data.clips.max_stride", "1.1")
    succeed(
        "train/main.py",
        "--config",
        tiny,
        "--data.shards",
        tmp_path / "train",
        "--run",
        run,
        *stride,
    )
    assert [r["step"] for r in records(run, "step")] == [1, 2]
    said = succeed(
        "eval/main.py",
        "retrieval",
        *("--checkpoint", run, "--train", tmp_path / "train", "--test", tmp_path / "test"),
    )
    assert "used 8; " in said
    assert "evaluated 8" in said
    assert read_manifest(tmp_path / "train").classes == ("run", "walk")
