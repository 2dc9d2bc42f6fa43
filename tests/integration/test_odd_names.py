"""Names with any bytes come through in every locale, and the shards are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from strata.errors import ShardError
from strata.files import sha256_of
from strata.format.manifest import read_manifest
from strata.preprocess.audit import check_folder
from strata.untrusted import decode_json
from tests.support.commands import ROOT
from tests.support.source_videos import moving_scene, write_video

NAMES = [
    b"caf\xe9/a:b\xff.mp4",
    "跑 步/视频\n é.mp4".encode(),
    b"plain/100%\\udce9.mp4",
]
BROKEN = b"caf\xe9/bad\xe9.mp4"

LOCALES = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"},
}
LOGS = ("bar", "json")


def run(locale: str, *argv: bytes | str | Path) -> subprocess.CompletedProcess[bytes]:
    unset = {"LC_ALL", "LANG", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONCOERCECLOCALE"}
    env = {k: v for k, v in os.environ.items() if k not in unset} | LOCALES[locale]
    command = [sys.executable, ROOT / "tools" / "shard.py", *argv]
    return subprocess.run(
        list(map(os.fsencode, command)), env=env, capture_output=True, check=False
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("names")
    root = os.fsencode(folder / "videos")
    for k, name in enumerate([*NAMES, BROKEN]):
        clip = write_video(folder / "v.mp4", moving_scene(4, 64, 48, seed=k)).read_bytes()
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"no video" if name == BROKEN else clip)
    return root


def shard(locale: str, log: str, videos: bytes, out: Path) -> subprocess.CompletedProcess[bytes]:
    argv = ["folder", "--videos", videos, "--out", out, "--width", "64", "--height", "48"]
    argv += ["--min-frames", "1", "--max-rejects", "1", "--workers", "1", "--log", log]
    return run(locale, *argv)


@pytest.fixture(scope="module")
def made_by_utf8(videos: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("utf8")
    assert shard("UTF-8", "none", videos, out).returncode == 0
    return out


# A locale that Python makes UTF-8 itself differs from it in nothing that both logs would show.
@pytest.mark.parametrize(
    ("locale", "log"),
    [("UTF-8", "bar"), ("C", "json"), *((a, b) for a in ("ASCII", "ASCII output") for b in LOGS)],
)
def test_names_survive_in_any_locale(
    videos: bytes, made_by_utf8: Path, tmp_path: Path, locale: str, log: str
) -> None:
    done = shard(locale, log, videos, tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"unreadable" in done.stdout
    assert rb"caf\udce9/bad\udce9.mp4" in done.stdout
    if log == "json":
        told = [json.loads(line) for line in done.stderr.splitlines()]
        rejected = [t["source"] for t in told if t["event"] == "rejected"]
        assert rejected == [BROKEN.decode("utf-8", "surrogateescape")]
    manifest = read_manifest(tmp_path / "train")
    found = {row.source.encode("utf-8", "surrogateescape") for row in manifest.rows}
    assert found == {*NAMES, BROKEN}
    assert manifest.classes == ("caf\udce9", "plain", "跑 步")
    assert check_folder(tmp_path / "train", decode=-1) == []
    # The order of the rows and the shuffle do not depend on the locale either.
    for path in (tmp_path / "train").iterdir():
        assert sha256_of(path) == sha256_of(made_by_utf8 / "train" / path.name)


@pytest.mark.parametrize("locale", ["C", "ASCII", "ASCII output"])
def test_a_dry_run_and_errors_in_any_locale(videos: bytes, tmp_path: Path, locale: str) -> None:
    argv = ["folder", "--videos", videos, "--out", tmp_path / "out", "--min-frames", "1"]
    done = run(locale, *argv, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert rb"caf\udce9 " in done.stdout
    done = run(locale, "folder", "--videos", videos + b"/nowhere\xe9", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert b"nowhere" in done.stderr
    assert b"Traceback" not in done.stderr


def test_rows_are_read_by_the_typed_decoder_too() -> None:
    text = rb'{"a":"caf\udce9","b":"\ud83d\ude00","c":"\\udce9"}'
    found = decode_json(text, dict[str, str], "x", ShardError)
    assert found == {"a": "caf\udce9", "b": "\U0001f600", "c": "\\udce9"}
    with pytest.raises(ShardError, match="x is not valid: Expected `str`, got `int`"):
        decode_json(rb'{"a":"\udce9","b":1}', dict[str, str], "x", ShardError)
    for bad in (rb'{"a":"\udce9",}', rb'{"a":"\udce9","b":NaN}', b'"\\udce9" \xff'):
        with pytest.raises(ShardError, match="x is not valid"):
            decode_json(bad, dict[str, object], "x", ShardError)
