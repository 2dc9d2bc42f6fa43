"""Help is short, every command has some, and a mistake is answered with what was probably meant."""

import importlib
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strata import commands, launch
from strata.config import parse_config
from strata.errors import ConfigError, ShardError
from strata.eval.evaluations.retrieval import RetrievalEvaluation
from strata.eval.evaluations.runners import RUNNERS
from strata.format.manifest import read_manifest
from strata.preprocess.options import usage
from strata.recipes import find_recipe, recipes, summary_of
from strata.suggestions import did_you_mean
from strata.tools import demo_steps, entry
from strata.tools.demo_steps import DemoConfig
from strata.train.config import TrainConfig
from tests.support.shard_folders import make_shards

MAINS = (
    *("preprocess.command", "preprocess.audit_command", "train.main", "eval.main"),
    *("tools.ablation", "tools.bench", "tools.dashboards", "tools.demo_steps", "tools.export"),
    *("tools.inspect_batch", "tools.learning_curve", "tools.make_videos"),
    "tools.render_dashboards",
)


def helped(module: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    # Help of settings ends the program; a list of evaluations or data sets is printed.
    with suppress(SystemExit):
        importlib.import_module(f"strata.{module}").main(argv)
    return capsys.readouterr().out


@pytest.mark.parametrize("module", MAINS)
def test_every_command_has_help_of_at_most_one_page(
    module: str, capsys: pytest.CaptureFixture[str]
):
    text = helped(module, ["--help"], capsys)
    assert text.startswith("usage: ")
    lines = text.splitlines()
    assert 3 <= len(lines) <= 70


@pytest.mark.parametrize("name", RUNNERS)
def test_the_help_of_an_evaluation_is_at_most_one_page(
    name: str, capsys: pytest.CaptureFixture[str]
):
    text = helped("eval.main", [name, "--help"], capsys)
    assert "--checkpoint" in text
    assert len(text.splitlines()) <= 70


def test_the_long_help_has_every_setting(capsys: pytest.CaptureFixture[str]):
    short = helped("train.main", ["--help"], capsys)
    assert "--data.batch_size" in short
    assert "--data.prefetch" not in short
    assert f"--help_all explains all {len(all_settings(TrainConfig))} settings" in short
    long = helped("train.main", ["--help_all"], capsys)
    for name in all_settings(TrainConfig):
        assert f"--{name} " in long
    assert "Samples in a global batch, over all ranks." in " ".join(long.split())
    assert set(TrainConfig.SHOWN) <= all_settings(TrainConfig)


def all_settings(root: Any, prefix: str = "") -> set[str]:
    found = set()
    for field in fields(root):
        inner = field.type if isinstance(field.type, type) else None
        name = f"{prefix}{field.name}"
        nested = hasattr(inner, "__dataclass_fields__")
        found |= all_settings(inner, f"{name}.") if nested else {name}
    return found


def refused(*argv: str, root: Any = TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(root, argv, prog="train/main.py", description="")
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.batchsize", "3"], "data.batchsize (did you mean data.batch_size?)"),
        (["--batch_size", "3"], "batch_size (did you mean data.batch_size?)"),
        (["--epochs=3"], "epochs (did you mean schedule.epochs?)"),
        (["--qqqq", "3"], "there is no setting qqqq. See"),
        (["--model.name", "r3d"], "model.name is r3d; use r3d18, s3d (did you mean r3d18?)"),
        (["--config", "ucf101_r3d"], "(did you mean ucf101_r3d18?)"),
        (["--config", "."], "is a folder"),
    ],
)
def test_a_typo_is_answered_with_a_name_that_exists(argv: list[str], message: str):
    assert message in refused("--run", "a", "--data.shards", "b", *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {batch_size: 4\nmodel: [", "line 2, column 6: not valid YAML"),
        ("data: {batchsize: 4}", "no setting data.batchsize (did you mean data.batch_size?)"),
        ("- 1", "holds a list, not settings"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    output = refused("--config", str(path))
    assert f"{path}" in output
    assert message in output
    assert "unicode string" not in output


def test_words_of_commands():
    assert did_you_mean("retrievel", RUNNERS) == " (did you mean retrieval?)"
    with pytest.raises(ConfigError, match="did you mean retrieval"):
        importlib.import_module("strata.eval.main").main(["retrievel"])
    with pytest.raises(ConfigError, match="did you mean ucf101"):
        importlib.import_module("strata.preprocess.command").main(["ucf1O1"])
    with pytest.raises(ConfigError, match="did you mean soak"):
        importlib.import_module("strata.tools.bench").main(["saok"])


def test_retrieval_takes_the_names_of_the_other_evaluations_and_its_earlier_ones():
    def parse(*words: str) -> RetrievalEvaluation:
        argv = ["--checkpoint", "a", *words]
        return parse_config(RetrievalEvaluation, argv, prog="x", description="")

    assert parse("--train", "b", "--test", "c") == parse("--gallery", "b", "--query", "c")


def test_an_earlier_name_in_a_file_is_read(tmp_path: Path):
    path = tmp_path / "config.yaml"

    def read(text: str) -> TrainConfig:
        path.write_text(f"run: a\ndata: {{shards: b}}\n{text}\n")
        return parse_config(TrainConfig, ["--config", str(path)], prog="x", description="")

    assert read("probe: {gallery: c, query: null}").probe.train == Path("c")
    # A setting that moved to another group, and a word that YAML reads as a boolean.
    assert read("model: {width: 8, fold_stem: false}").engine.fold_stem == "off"
    assert read("engine: {compile: on}").engine.compile == "on"
    with pytest.raises(ConfigError, match=r"engine\.fold_stem is True; use auto, off, pixels"):
        read("model: {fold_stem: true}")
    with pytest.raises(ConfigError, match=r"engine\.fold_stem is given twice"):
        read("model: {fold_stem: false}\nengine: {fold_stem: off}")


def test_recipes_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    by_name = find_recipe("ucf101_r3d18")
    assert by_name == find_recipe("configs/pretrain/ucf101_r3d18.yaml")
    assert by_name == recipes()["pretrain/ucf101_r3d18"]
    assert find_recipe("ucf101", "shard").parent.name == "shard"
    with pytest.raises(ConfigError, match="several recipes; use ablate/ucf101 or shard/ucf101"):
        find_recipe("ucf101")
    assert all(summary_of(path) for path in recipes().values())
    Path("ucf101_r3d18").write_text("run: mine\n")
    assert find_recipe("ucf101_r3d18") == Path("ucf101_r3d18")


def test_the_folder_above_shard_folders_says_which_there_are(tmp_path: Path):
    make_shards(tmp_path / "train01", num_videos=2, num_classes=1, shard_size=2, seed=1)
    with pytest.raises(ShardError, match=r"the folder of 1 shard folders, train01; give one"):
        read_manifest(tmp_path)


def test_commands_are_named_as_they_were_started(monkeypatch: pytest.MonkeyPatch):
    assert commands.line("export", "--out", "a b") == "python tools/export.py --out 'a b'"
    assert commands.shown_program("tools/shard.py ucf101") == "tools/shard.py ucf101"
    monkeypatch.setenv(commands.STARTED_AS, "strata")
    assert commands.line("pretrain", "--run", "a") == "strata pretrain --run a"
    assert commands.shown_program("tools/shard.py ucf101") == "strata shard ucf101"
    assert "strata pretrain --help" in refused("--qqqq", "1")


def test_the_program_lists_commands_and_recipes(capsys: pytest.CaptureFixture[str]):
    def said(*words: str) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv(commands.STARTED_AS, "")
            with suppress(SystemExit):
                status = entry.main(words)
                return status, capsys.readouterr().out
        return 2, capsys.readouterr().err

    listed = said("--help")[1]
    assert all(f"  {name} " in listed for name in [*commands.FILES, "configs"])
    assert "pretrain/ucf101_r3d18 " in said("configs")[1]
    assert "queue_length: 1024" in said("configs", "ucf101_r3d18")[1]
    assert "did you mean pretrain?" in said("petrain")[1]
    assert "--num_gpus is 0; use 1 or more" in said("pretrain", "--num_gpus", "0")[1]
    assert said("shard", "--help") == (0, usage().replace("tools/shard.py", "strata shard") + "\n")


def test_the_program_starts_a_rank_for_each_gpu(monkeypatch: pytest.MonkeyPatch):
    started: list[list[str]] = []

    def run(words: list[str], **options: Any) -> SimpleNamespace:
        started.append(words)
        return SimpleNamespace(returncode=5)

    monkeypatch.setenv(commands.STARTED_AS, "")
    monkeypatch.setattr(entry.subprocess, "run", run)
    monkeypatch.setattr(entry.runpy, "run_path", lambda path, run_name: started.append([path]))
    monkeypatch.setattr(entry.sys, "argv", [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    script = str(commands.script("pretrain"))
    assert entry.main(["pretrain", "--run", "a"]) == 5
    assert started[-1][-3:] == [script, "--run", "a"]
    assert started[-1][started[-1].index("--num_gpus") + 1] == "4"
    assert entry.main(["evaluate", "--num_gpus=2", "linear"]) == 5
    assert started[-1][started[-1].index("--num_gpus") + 1] == "2"
    # With one GPU, and in a rank, it is this process.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert entry.main(["pretrain", "--run", "a"]) == 0
    assert (started[-1], sys.argv) == ([script], [script, "--run", "a"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with monkeypatch.context() as launched:
        launched.setattr(launch, "is_launched", lambda: True)
        assert entry.main(["pretrain", "--run", "a"]) == 0
    assert started[-1] == [script]


def test_the_demo_says_how_many_videos_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("train", "test"):
        folder = tmp_path / "shards" / name
        make_shards(folder, num_videos=4, num_classes=2, shard_size=4, seed=1)
    monkeypatch.setattr(demo_steps, "_command", lambda *words: None)
    with pytest.raises(
        ConfigError, match=r"4 videos are left to train on.* about 23 videos or more"
    ):
        demo_steps._shard(DemoConfig(), tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="a subfolder of two or more videos for each class"):
        demo_steps._shard(DemoConfig(), tmp_path, tmp_path / "other")
