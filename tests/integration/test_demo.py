"""The demo as a user has it: from the wheel, in a fresh environment, far from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from strata.errors import ConfigError
from strata.tools.demo_steps import DemoConfig, run_demo
from tests.support.commands import ROOT, TINY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that belong to the project."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        listed, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not names:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    for name in names:
        source = ROOT / name
        if source.is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder / "copy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_adds_one_top_level_name_and_has_every_file(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    top = {name.split("/")[0] for name in inside}
    assert {name for name in top if not name.endswith(".dist-info")} == {"strata"}
    for name in ("py.typed", "telemetry/catalogue.toml", "eval/report.html.j2"):
        assert f"strata/{name}" in inside
    for folder in ("strata", "preprocess", "dataload", "train", "eval", "tools", "configs"):
        for path in (ROOT / folder).rglob("*.yaml" if folder == "configs" else "*.py"):
            name = str(path.relative_to(ROOT))
            assert (name if folder == "strata" else f"strata/{name}") in inside


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment with the wheel."""
    folder = tmp_path_factory.mktemp("far away")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True)
    # What Strata needs is taken from this environment; its own editable Strata is not.
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    paths = [p for p in sys.path if p.endswith("-packages")]
    (packages / "packages.pth").write_text("\n".join(paths))
    return python.parent


def test_the_demo_makes_videos_shards_a_run_and_a_report(installed: Path, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = ["demo", "--pretrain", "tiny.yaml", "--videos_per_class", "2", "--num_clips", "1"]
    done = subprocess.run(
        # A path with a space: the script's first line cannot name its interpreter.
        [installed / "python", installed / "strata", *words, "--untrained_seeds", "0"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "runs" / "demo"
    assert len(list((out / "videos").rglob("*.mp4"))) == 16
    for made in ("shards/train/manifest.json", "shards/test/manifest.json", "run-0/log.jsonl"):
        assert (out / made).is_file()
    (page,) = out.glob("*.html")
    assert f"the report: {page}" in done.stdout
    for step in ("make_videos", "shard folder", "pretrain", "evaluate compare"):
        assert f"$ strata {step} " in done.stdout
    assert "strata export --checkpoint" in done.stdout


def test_a_folder_that_is_not_a_demos_is_kept(tmp_path: Path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not a demo's folder; choose another --out"):
        run_demo(DemoConfig(out=tmp_path))
    assert (tmp_path / "thesis.txt").exists()


def test_a_folder_of_videos_that_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        run_demo(DemoConfig(out=tmp_path / "demo", videos=tmp_path / "nowhere"))
