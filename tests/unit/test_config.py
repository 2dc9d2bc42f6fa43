"""Parsing: files, overrides, names of what is wrong, and a dump that parses again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from strata.config import dump_config, parse_config
from strata.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part."""

    rate: float = 0.5
    """Something in hertz."""
    kind: Literal["a", "b"] = "a"
    """Which."""

    def __post_init__(self):
        if self.rate <= 0:
            raise ConfigError(f"part.rate is {self.rate}; use more than 0")


@dataclass(frozen=True, kw_only=True)
class Root:
    """A tree."""

    folder: Path
    """Where."""
    part: Part = field(default_factory=Part)
    """How."""
    drops: tuple[int, ...] = (1,)
    """When."""
    dry_run: bool = False
    """Whether to do nothing."""
    only_rows: tuple[str, ...] = ()
    """Rows by name."""


def parse(*argv: str) -> Root:
    return parse_config(Root, argv, prog="x", description="d")


def test_files_then_overrides(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("folder: /a\npart: {rate: 2, kind: b}\ndrops: [3, 4]\n")
    (tmp_path / "b.yaml").write_text("part: {rate: 7}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    got = parse(*files, "--part.kind", "a", "--local_rank=3")
    assert got == Root(folder=Path("/a"), part=Part(rate=7, kind="a"), drops=(3, 4))


def test_the_dump_is_a_config(tmp_path: Path):
    config = Root(folder=Path("/a"), part=Part(rate=2.5, kind="b"), drops=(5, 6))
    dump_config(config, tmp_path / "c.yaml")
    assert parse("--config", str(tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dry_run"], {"dry_run": True}),
        (["--dry-run", "--part.kind", "b"], {"dry_run": True, "part": Part(kind="b")}),
        (["--dry_run", "false"], {"dry_run": False}),
        (["--dry-run=false"], {"dry_run": False}),
        (["--drops", "3"], {"drops": (3,)}),
        (["--drops=3"], {"drops": (3,)}),
        (["--drops", "-3", "4", "--dry_run"], {"drops": (-3, 4), "dry_run": True}),
        (["--drops", "[3, 4]"], {"drops": (3, 4)}),
        (["--drops", "[]"], {"drops": ()}),
        (["--only-rows", "a, b", "1", "x=-y"], {"only_rows": ("a, b", "1", "x=-y")}),
    ],
)
def test_shorter_spellings(words: list[str], expected: dict[str, Any]):
    assert parse("--folder", "/a", *words) == Root(folder=Path("/a"), **expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--folder", "/a", "--drops", "soon"], "drops"),
        (["--folder", "/a", "--dry_run", "maybe"], "dry_run"),
        (["--folder", "/a", "stray"], "stray"),
        (["--folder", "/a", "--part.rat", "1"], "part.rat"),
        (["--folder", "/a", "--part.kind", "c"], "part.kind"),
        (["--folder", "/a", "--part.rate", "fast"], "part.rate"),
        (["--folder", "/a", "--part.rate", "0"], "part.rate is 0"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        ([], "folder"),
    ],
)
def test_what_is_wrong_is_named(argv: list[str], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


def test_help_describes_the_fields(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "Something in hertz" in capsys.readouterr().out
