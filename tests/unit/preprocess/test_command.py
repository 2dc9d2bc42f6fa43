"""Options of `tools/shard.py` from a YAML file and from the command line."""

from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.preprocess.command import ShardCommand, parse_command

CONFIGS = Path(__file__).parents[3] / "configs" / "shard"


def parse(dataset: str, *options: str) -> ShardCommand:
    needed = ["--videos", "v", "--out", "o"]
    needed += [] if dataset == "folder" else ["--splits", "s"]
    return parse_command([dataset, *needed, *options])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_of_its_dataset(path: Path) -> None:
    command = parse(path.stem, "--config", str(path))
    assert command.dataset == path.stem
    # The documented sets are in the default form, so that they can be told to be by one word.
    assert command.settings.form == parse(path.stem).settings.form
    assert command.videos == (Path("v"),)


def test_there_is_one_for_each_dataset() -> None:
    names = {"ucf101", "hmdb51", "kinetics400", "kinetics600", "kinetics700", "folder"}
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == names


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("quality: 80\nsplit: 2\nsamples_per_shard: 7\nstrict: true\nout: there\n")
    command = parse("ucf101", "--config", str(path), "--quality", "70")
    assert command.settings.form.quality == 70
    assert (command.split, command.settings.samples_per_shard, command.strict) == ("2", 7, True)
    assert command.out == Path("o")
    path.write_text("strict: false\nvideos: v\nsplits: s\nout: there\n")
    assert not parse_command(["ucf101", f"--config={path}"]).strict


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("qualty: 80", "'qualty' is no option of tools/shard.py ucf101"),
        ("dataset: hmdb51", "is for hmdb51; the command says ucf101"),
        ("quality: [1, 2]", r"quality is \[1, 2\]; use one number or word"),
        ("strict: 1", "strict is 1; use true or false"),
        ("quality: true", "quality is True; use one number"),
        ("split: 4", "invalid choice: '4'"),
        ("just words", "is not a table of options"),
        ("a: [", "cannot read .*mend --config"),
        (None, "cannot read .*No such file"),
    ],
)
def test_bad_config_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse("ucf101", "--config", str(path))


def test_several_folders_of_videos(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("videos: [c, d]\nout: o\n")
    for argv, found in (
        (["--videos", "a", "b", "--out", "o"], "ab"),
        (["--videos", "a", "--out", "o", "--videos", "b"], "ab"),
        (["--config", str(path)], "cd"),
        (["--config", str(path), "--videos", "a"], "a"),
        (["--config", str(path), "--videos=a", "--videos=b"], "ab"),
    ):
        assert parse_command(["folder", *argv]).videos == tuple(map(Path, found))
