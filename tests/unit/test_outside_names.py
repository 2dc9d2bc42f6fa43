"""No name from outside becomes a path, and none is shown with control characters."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from strata.dataload.reader import ShardReader
from strata.dataload.storage import DownloadConfig
from strata.errors import ShardError
from strata.preprocess.command import main as shard_main
from strata.preprocess.run import merge_set
from strata.untrusted import file_stem
from tests.support.shard_edits import edit_manifest

BAD_NAMES = [
    "../../evil.tar",
    "/tmp/evil.tar",
    ".evil.tar",
    "a/b.tar",
    "x" * 300 + ".tar",
    "a\n.tar",
]


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards / "train", tmp_path / "sets" / "train"))


def refused(folder: Path | str, match: str, download: DownloadConfig | None = None) -> None:
    with pytest.raises(ShardError, match=match) as caught:
        ShardReader(folder, download=download)
    assert "\n" not in " ".join(str(caught.value).split(" "))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_shard_names(folder: Path, name: str):
    edit_manifest(folder, lambda head, _: head["shards"][1].update(name=name))
    refused(folder, r"manifest\.json contains the shard name .* which is not allowed")


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.tar", "shard-000001.idx"])
def test_shards_are_different_tars(folder: Path, name: str):
    edit_manifest(folder, lambda head, _: head["shards"][1].update(name=name))
    refused(folder, r"the shards must be different files named \*\.tar")


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("what", ["name", "digest"])
def test_a_manifest_from_a_url_writes_nothing_elsewhere(
    folder: Path, tmp_path: Path, name: str, what: str
):
    edit_manifest(folder, lambda head, _: head["shards"][1].update(name=name))
    if what == "digest":
        head = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(head | {"digest": name}))
    kept = tmp_path / "kept" / "deep" / "cache"
    before = sorted(p for p in tmp_path.rglob("*") if kept not in p.parents)
    refused(folder.as_uri(), "manifest.json", DownloadConfig(folder=kept))
    after = sorted(p for p in tmp_path.rglob("*") if kept not in p.parents)
    assert [p for p in after if p not in before and p not in (kept, *kept.parents)] == []
    assert {p.name for p in kept.rglob("*") if p.is_file()} <= {"manifest.json", "samples.jsonl"}


@pytest.mark.parametrize("key", ["../x", "a/b", ".x", "a.b\n", "", "k" * 300, "a b"])
def test_keys(folder: Path, key: str):
    def change(_: dict[str, Any], rows: list[Any]) -> None:
        rows[0]["key"] = key

    edit_manifest(folder, change)
    refused(folder, r"samples\.jsonl (contains the key name|is not valid: .*\.key)")


@pytest.mark.parametrize("name", ["", "a\x1b[2J", "a\nb", "\u2028", "c" * 300])
@pytest.mark.parametrize("what", ["class", "dataset", "split"])
def test_names_that_people_see(folder: Path, what: str, name: str):
    def change(head: dict[str, Any], _: list[Any]) -> None:
        if what == "class":
            head["classes"][2] = name
        else:
            head[what] = name

    edit_manifest(folder, change)
    refused(folder, rf"manifest\.json contains the {what} name .* which is not allowed")


def test_classes_may_have_any_visible_characters(folder: Path):
    names = ["Äpfel (süß)", "打篮球", "<b>it's</b>", "a/b"]
    edit_manifest(folder, lambda head, _: head.update(classes=names))
    assert list(ShardReader(folder).manifest.classes) == names


def test_names_in_records_of_unfinished_shards(tmp_path: Path):
    progress = tmp_path / ".progress"
    progress.mkdir()
    form = {"width": 64, "height": 48}
    plan = {"dataset": "d", "split": "s", "form": form, "classes": [], "absent": []}
    plan |= {"settings": {"plan": "p"}, "names": "p", "shards": [[1, "s"]]}
    (progress / "plan.json").write_text(json.dumps(plan))
    entry = {"name": "../evil.tar", "num_samples": 1, "num_frames": 1, "num_bytes": 1}
    entry |= {"sha256": "0" * 64, "index_sha256": "0" * 64}
    record = {"plan": "p", "stamps": [""], "entry": entry, "rows": []}
    (progress / "shard-000000.tar.json").write_text(json.dumps(record))
    with pytest.raises(ShardError, match=r"shard-000000\.tar\.json contains the shard name"):
        merge_set(tmp_path)


def test_names_of_foreign_tars(tmp_path: Path):
    with tarfile.open(tmp_path / "my shard.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"), io.BytesIO())
    with pytest.raises(ShardError, match=r"contains the shard name 'my shard\.tar'"):
        shard_main(["index", str(tmp_path)])


@pytest.mark.parametrize("key", ["part/00", "../x", "/etc/passwd", "..", ".", "ä", "a" * 300, ""])
def test_a_key_becomes_one_safe_part_of_a_path(key: str):
    stem = file_stem(key)
    assert Path(stem).name == stem
    assert not stem.startswith(".")
    assert len(stem) <= 120
    assert file_stem(key + "x") != stem


def test_safe_keys_stay_as_they_are():
    assert file_stem("v_Archery_g01_c01-0123456789") == "v_Archery_g01_c01-0123456789"
    assert file_stem("a/b") != file_stem("a_b")
