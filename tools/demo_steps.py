"""The demo: each step is a command that a user would type; the last one writes a report."""

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from strata import commands
from strata.config import parse_config
from strata.dataload.config import DataConfig
from strata.errors import ConfigError, StrataError
from strata.format.manifest import read_manifest
from strata.format.schema import MANIFEST_NAME
from strata.recipes import find_recipe
from strata.tools.launchers import QUIET, program

__all__ = ["DemoConfig", "main", "run_demo"]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Videos to an evaluated model."""

    videos: Path | None = None
    """A folder of videos, one subfolder a class; by default videos are generated."""
    out: Path = Path("runs/demo")
    """Folder for everything that the demo makes; the content of an earlier demo is replaced."""
    pretrain: str = "demo"
    """The pretraining's recipe: a name, or a YAML file."""
    seeds: tuple[int, ...] = (0,)
    """Pretraining seeds; each is a separate run."""
    untrained_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the untrained networks to compare with."""
    videos_per_class: int = 40
    """Generated videos of each of the 8 classes."""
    test_fraction: float = 0.3
    """Share of each class's videos held out for the evaluation."""
    num_clips: int = 10
    """Clips a video in the evaluation. TEXT: 10."""


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _command(name: str, *words: str | Path) -> None:
    """Run one step in a separate process, as a user would.

    Raises:
        StrataError: The step failed; its own error is above.
    """
    shown = commands.line(name, *words)
    print(f"   $ {shown}", flush=True)
    launcher = "deepspeed" if name in ("pretrain", "evaluate") else "python"
    command = [*program([launcher]), str(commands.script(name)), *map(str, words)]
    done = subprocess.run(command, env=os.environ | QUIET, check=False)
    if done.returncode:
        raise StrataError(f"the step `{shown}` ended with exit code {done.returncode}; see above")


def _prepare(config: DemoConfig) -> Path:
    """Empty the folder of this demo, or make it.

    Raises:
        ConfigError: The folder has content that is not a demo's.
    """
    out = config.out.absolute()
    marker = out / "made-by-strata-demo"
    if out.exists():
        if not marker.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not a demo's folder; choose another --out, or empty it")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    marker.touch()
    return out


def _find_videos(config: DemoConfig, out: Path) -> Path:
    """The folder of the user's videos, or of generated ones.

    Raises:
        ConfigError: The user's folder does not exist.
    """
    if config.videos is not None:
        _title("1 of 4: your videos")
        videos = config.videos.absolute()
        if not videos.is_dir():
            raise ConfigError(f"{videos} is not a folder; give one with a subfolder for each class")
        print(f"   {videos}")
        return videos
    _title("1 of 4: make videos (generated data: a trial of the system, not of the method)")
    videos, count = out / "videos", str(config.videos_per_class)
    _command("make_videos", "--out", videos, "--videos_per_class", count)
    return videos


def _shard(config: DemoConfig, videos: Path, out: Path) -> tuple[Path, Path]:
    """Shard the videos; returns the folders of the training and of the test set."""
    _title("2 of 4: shard them")
    shards = out / "shards"
    options = ["--test-fraction", str(config.test_fraction)]
    if config.videos is None:
        options += ["--width", "96", "--height", "80"]
    _command("shard", "folder", "--videos", videos, "--out", shards, *options)
    train, test = shards / "train", shards / "test"
    if not (train / MANIFEST_NAME).is_file() or not (test / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{videos} gives no training and test set of classes; give --videos a folder with a "
            "subfolder of two or more videos for each class"
        )
    found, needed = read_manifest(train).num_samples, _batch_size(config.pretrain)
    if found < needed:
        raise ConfigError(
            f"{found} videos are left to train on, and the demo's batches have {needed}; give "
            f"--videos a folder of about {math.ceil(needed / (1 - config.test_fraction))} videos "
            "or more"
        )
    return train, test


def _batch_size(recipe: str) -> int:
    """Videos in a batch of the pretraining."""
    settings = yaml.safe_load(find_recipe(recipe, "pretrain").read_text(encoding="utf-8"))
    return settings.get("data", {}).get("batch_size", DataConfig.batch_size)


def _pretrain(config: DemoConfig, seed: int, train: Path, out: Path) -> Path:
    """Pretrain with one seed; returns the run's folder."""
    _title(f"3 of 4: pretrain without labels (seed {seed})")
    run = out / f"run-{seed}"
    words = ["--config", config.pretrain, "--data.shards", train, "--run", run]
    _command("pretrain", *words, "--seed", str(seed))
    return run


def _compare(config: DemoConfig, runs: Sequence[Path], train: Path, test: Path, out: Path) -> Path:
    """Evaluate the runs' networks and untrained ones by both protocols; returns the page."""
    _title("4 of 4: evaluate, and compare with untrained networks and with chance")
    report = out / "report.json"
    words = ["--checkpoint", runs[0], "--train", train, "--test", test, "--out", report]
    words += ["--others", json.dumps([str(run) for run in runs[1:]])]
    words += ["--untrained_seeds", json.dumps(list(config.untrained_seeds))]
    words += ["--features.num_clips", str(config.num_clips), "--remark", _remark(config)]
    _command("evaluate", "compare", *words)
    return report.with_suffix(".html")


def _remark(config: DemoConfig) -> str:
    """The remark on the figures for readers of the report."""
    if config.videos is not None:
        return "The videos are the user's own."
    return (
        "The videos are generated by a program: the figures show that the system works, not how "
        "good the method is on real videos."
    )


def run_demo(config: DemoConfig) -> Path:
    """Make or take videos, shard them, pretrain, evaluate, and write the report.

    Returns:
        The report's page.

    Raises:
        ConfigError: There is no seed, or a folder does not suit.
        StrataError: A step failed.
    """
    if not config.seeds:
        raise ConfigError("tools/demo.py: --seeds is empty; give at least one, for instance [0]")
    start = time.perf_counter()
    out = _prepare(config)
    train, test = _shard(config, _find_videos(config, out), out)
    runs = [_pretrain(config, seed, train, out) for seed in config.seeds]
    page = _compare(config, runs, train, test, out)
    took = time.perf_counter() - start
    print(f"\n{_remark(config)}\nall steps took {took:.0f} s; the report: {page}")
    return page


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    described = "Videos to an evaluated model."
    run_demo(parse_config(DemoConfig, argv, prog="tools/demo.py", description=described))
