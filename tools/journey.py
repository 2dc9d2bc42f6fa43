"""The demo's steps, each a command that a user would type, and the report at their end."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.config import parse_config
from strata.errors import ConfigError, StrataError
from strata.eval.report import DemoResult, write_report
from strata.tools.launchers import QUIET, program

__all__ = ["DemoConfig", "main"]

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo runs on."""

    videos: Path | None = None
    """A folder of videos, one subfolder a class; by default videos are generated."""
    out: Path = Path("runs/demo")
    """Folder for everything that the demo makes; a former demo's content is replaced."""
    pretrain: Path = Path("configs/pretrain/demo.yaml")
    """The pretraining's configuration."""
    seeds: tuple[int, ...] = (0,)
    """Pretraining seeds; each is a run of its own."""
    untrained_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the untrained networks to compare with."""
    videos_per_class: int = 40
    """Generated videos of each of the 8 classes."""
    test_fraction: float = 0.3
    """Share of each class's videos held out for the evaluation."""
    num_clips: int = 10
    """Clips a video in the evaluation. TEXT: 10."""


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _command(*words: str | Path) -> None:
    """Run one step in a process of its own, as a user would.

    Raises:
        StrataError: The step failed; it has said why itself.
    """
    shown = " ".join(str(w) for w in words)
    print(f"   $ {shown}", flush=True)
    command = [*program([str(words[0])]), *map(str, words[1:])]
    done = subprocess.run(command, cwd=_ROOT, env=os.environ | QUIET, check=False)
    if done.returncode:
        raise StrataError(f"the step `{shown}` ended with exit code {done.returncode}; see above")


def _prepare(config: DemoConfig) -> Path:
    """An empty folder for this demo.

    Raises:
        ConfigError: The folder exists and is not a demo's.
    """
    out = config.out if config.out.is_absolute() else _ROOT / config.out
    marker = out / "made-by-strata-demo"
    if out.exists():
        if not marker.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not a demo's folder; choose another --out, or empty it")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    marker.touch()
    return out


def _compare(run: Path, train: Path, test: Path, seeds: Sequence[int], num_clips: int) -> Any:
    """Both protocols on a run's network and on untrained ones; the content of its report."""
    out = run / "eval" / "compare.json"
    _command(
        "deepspeed",
        "eval/main.py",
        "compare",
        "--checkpoint",
        run,
        "--train",
        train,
        "--test",
        test,
        "--untrained_seeds",
        json.dumps(list(seeds)),
        "--features.num_clips",
        str(num_clips),
        "--out",
        out,
    )
    return json.loads(out.read_text(encoding="utf-8"))


def main(argv: Sequence[str]) -> None:
    """Run the demo."""
    config = parse_config(
        DemoConfig, argv, prog="tools/demo.py", description="Videos to an evaluated model."
    )
    start = time.perf_counter()
    out = _prepare(config)
    if config.videos is None:
        _say("1 of 4: make videos (generated data: a trial of the system, not of the method)")
        videos = out / "videos"
        _command(
            "python",
            "tools/make_videos.py",
            "--out",
            videos,
            "--videos-per-class",
            str(config.videos_per_class),
        )
    else:
        _say("1 of 4: your videos")
        videos = config.videos.absolute()
        if not videos.is_dir():
            raise ConfigError(f"{videos} is not a folder; give one with a subfolder a class")
        print(f"   {videos}")
    _say("2 of 4: shard them")
    shards = out / "shards"
    _command(
        "python",
        "tools/shard.py",
        "folder",
        "--videos",
        videos,
        "--out",
        shards,
        "--test-fraction",
        str(config.test_fraction),
        *_shard_options(config),
    )
    train, test = shards / "train", shards / "test"
    runs = []
    for seed in config.seeds:
        _say(f"3 of 4: pretrain without labels (seed {seed})")
        run = out / f"run-{seed}"
        _command(
            "deepspeed",
            "train/main.py",
            "--config",
            config.pretrain,
            "--data.shards",
            train,
            "--run",
            run,
            "--seed",
            str(seed),
        )
        runs.append(run)
    _say("4 of 4: evaluate, against untrained networks and chance")
    trained, untrained, records = [], [], []
    for run in runs:
        seeds = config.untrained_seeds if run == runs[0] else ()
        records.append(_compare(run, train, test, seeds, config.num_clips))
        figures = records[-1]["figures"]
        trained.append(figures["pretrained"])
        untrained += [figures[name] for name in figures if name.startswith("untrained")]
    result = DemoResult(
        generated=config.videos is None,
        trained=tuple(trained),
        untrained=tuple(untrained),
        chance=records[0]["figures"]["chance"],
        logs=tuple(run / "log.jsonl" for run in runs),
        wall_s=time.perf_counter() - start,
        manifest_digest=json.loads((train / "manifest.json").read_text())["digest"],
    )
    page = write_report(result, records[0], out)
    print("\n" + result.table())
    print(f"\nthe whole took {result.wall_s:.0f} s; the report: {page}")


def _shard_options(config: DemoConfig) -> list[str]:
    return ["--width", "96", "--height", "80"] if config.videos is None else []
