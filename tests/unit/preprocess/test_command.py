"""Options of `tools/shard.py` from a YAML file and from the command line."""

from pathlib import Path

import pytest

from strata.errors import ConfigError, ShardError
from strata.preprocess import audit_command
from strata.preprocess.command import main
from strata.preprocess.options import (
    IndexOptions,
    MergeOptions,
    ShardCommand,
    parse_command,
    parse_index,
    parse_merge,
)

CONFIGS = Path(__file__).parents[3] / "configs" / "shard"


def parse(dataset: str, *options: str) -> ShardCommand:
    needed = ["--videos", "v", "--out", "o"]
    needed += [] if dataset == "folder" else ["--splits", "s"]
    return parse_command([dataset, *needed, *options])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_of_its_dataset(path: Path) -> None:
    command = parse(path.stem, "--config", str(path))
    assert command.dataset == path.stem
    # The documented sets have the default form, so that one word is enough to make them.
    assert command.settings.form == parse(path.stem).settings.form
    assert command.videos == (Path("v"),)


def test_there_is_one_config_for_each_dataset() -> None:
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
        ("qualty: 80", r"a\.yaml: there is no setting qualty .did you mean quality"),
        ("dataset: hmdb51", "is for hmdb51; the command says ucf101"),
        ("quality: [1, 2]", r'"quality": Expected a .* Got value: \[1, 2\]'),
        ("strict: 1", '"strict": Expected a .* Got value: 1'),
        ("quality: true", '"quality": Expected a .* Got value: True'),
        ("split: 4", "split is 4; use 1, 2, 3, all"),
        ("just words", r"a\.yaml holds a str, not settings"),
        ("a: [", r"a\.yaml, line 1, column 5: not valid YAML"),
        (None, "no such file, and no recipe"),
        ("timeout: 7", r"a\.yaml: timeout has another name now; write timeout_s: 7"),
        ("monitor_port: 9", r"now; write monitor: {port: 9}"),
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


def test_one_style_and_its_earlier_spellings() -> None:
    today = ["--dry_run", "--min_frames", "5", "--monitor.port", "9100", "--timeout_s", "3"]
    today += ["--monitor.file_sd", "d", "--max_rejects", "0.5", "--read_back", "all"]
    today += ["--damaged", "keep", "--test_fraction", "0.1", "--samples_per_shard", "9"]
    earlier = ["--dry-run", "--min-frames", "5", "--monitor-port", "9100", "--timeout", "3"]
    earlier += ["--file-sd=d", "--max-rejects", "0.5", "--read-back=all", "--local-rank=0"]
    earlier += ["--damaged=keep", "--test-fraction=0.1", "--samples-per-shard=9"]
    command = parse("folder", *today)
    assert command == parse("folder", *earlier)
    assert command.dry_run
    assert command.settings.damaged == "keep"
    assert command.test_fraction == 0.1
    assert (command.settings.form.min_frames, command.settings.timeout_s) == (5, 3.0)
    assert (command.monitor.port, command.monitor.file_sd) == (9100, Path("d"))


def test_folders_of_merge_and_index_need_no_name() -> None:
    for argv in (["a", "b", "--max-rejects", "1"], ["--max_rejects=1", "--folders", "a", "b"]):
        assert parse_merge(argv) == MergeOptions(folders=(Path("a"), Path("b")), max_rejects=1.0)
    for argv in (["a", "--index-out", "b"], ["--index_out", "b", "--folder", "a"]):
        assert parse_index(argv) == IndexOptions(folder=Path("a"), index_out=Path("b"))


def test_folders_to_audit_need_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def check(folder: Path, **options: int) -> list[str]:
        seen.append((str(folder), options["decode"]))
        return ["a fault"]

    monkeypatch.setattr(audit_command, "check_folder", check)
    for argv in (["a", "--decode", "-1", "b"], ["--decode=-1", "--folders", "a", "b"]):
        with pytest.raises(ShardError, match="2 faults"):
            audit_command.main(argv)
        assert seen == [("a", -1), ("b", -1)]
        seen.clear()
    with pytest.raises(ConfigError, match="required: folders"):
        audit_command.main([])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"tools/shard\.py: the first argument is one of ucf101,.*, index; got nothing"),
        (["coffee"], "index; got coffee"),
        (["folder", "--out", "o"], "required: videos"),
        (["folder", "--videos", "v", "--out", "o", "--splits", "s"], "splits"),
        (["folder", "--videos", "v", "--out", "o", "--width", "33"], "width is 33; use a multiple"),
        (["folder", "--videos", "v", "--out", "o", "--max-rejects", "2"], "max_rejects is 2"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command(argv)


def test_the_help_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "ucf101,hmdb51," in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["folder", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "--test_fraction" in output
    assert "Share of each class for a test set." in output
