"""The demo at a small size: every step is a command, and the report is written at the end."""

from pathlib import Path

import pytest
import yaml

from strata.errors import ConfigError
from strata.tools.demo_steps import DemoConfig, run_demo
from tests.support.commands import TINY, succeed


def test_the_demo_makes_videos_shards_a_run_and_a_report(tmp_path: Path):
    config, out = tmp_path / "tiny.yaml", tmp_path / "demo"
    config.write_text(yaml.safe_dump(TINY))
    words = ["--out", out, "--pretrain", config, "--videos_per_class", "4", "--num_clips", "1"]
    told = succeed("tools/demo.py", *words, "--untrained_seeds", "0")
    assert len(list((out / "videos").rglob("*.mp4"))) == 32
    for made in ("shards/train/manifest.json", "shards/test/manifest.json", "run-0/log.jsonl"):
        assert (out / made).is_file()
    (page,) = out.glob("*.html")
    assert f"the report: {page}" in told
    for step in ("tools/make_videos.py", "tools/shard.py", "train/main.py", "eval/main.py"):
        assert f"{step} " in told


def test_a_folder_that_is_not_a_demos_is_kept(tmp_path: Path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not a demo's folder; choose another --out"):
        run_demo(DemoConfig(out=tmp_path))
    assert (tmp_path / "thesis.txt").exists()


def test_a_folder_of_videos_that_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        run_demo(DemoConfig(out=tmp_path / "demo", videos=tmp_path / "nowhere"))
