"""Manifest, rows, index, records: every wrong type, range and relation ends in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strata.dataload.reader import ShardReader
from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.preprocess.run import merge_set
from tests.support.shard_edits import edit_index, edit_manifest, flip

HUGE = 10**30
WRONG = [None, "x", 1.5, HUGE, -7, [], {}, True]


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def set_field(where: str, name: str, value: Any) -> Callable[[dict[str, Any], list[Any]], None]:
    def change(head: dict[str, Any], rows: list[Any]) -> None:
        parts = {"head": head, "form": head["form"], "shard": head["shards"][1], "row": rows[3]}
        parts[where][name] = value

    return change


def refused(folder: Path, named: str) -> None:
    with pytest.raises(ShardError) as caught:
        ShardReader(folder)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(folder)) * 2


NUMBERS = [
    *[("shard", n) for n in ("num_samples", "num_frames", "num_bytes")],
    *[("form", n) for n in ("width", "height", "quality", "gop", "segment_frames", "min_frames")],
    *[("row", n) for n in ("label", "num_frames", "shard", "position")],
    ("head", "schema"),
]
TEXTS = [
    ("head", "dataset"),
    ("head", "split"),
    ("form", "fit"),
    ("form", "payload"),
    ("form", "codec"),
    ("shard", "name"),
    ("shard", "sha256"),
    ("shard", "index_sha256"),
    ("row", "source"),
    ("row", "status"),
    ("row", "key"),
]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize(("where", "name"), NUMBERS, ids=lambda x: str(x))
def test_wrong_numbers(folder: Path, where: str, name: str, value: Any):
    edit_manifest(folder, set_field(where, name, value))
    refused(folder, "samples.jsonl" if where == "row" else "manifest.json")


@pytest.mark.parametrize(
    "value", [None, 3, 1.5, HUGE, [], {}, True, "ü" * 70_000], ids=lambda v: str(v)[:9]
)
@pytest.mark.parametrize(("where", "name"), TEXTS, ids=lambda x: str(x))
def test_wrong_texts(folder: Path, where: str, name: str, value: Any):
    edit_manifest(folder, set_field(where, name, value))
    refused(folder, "samples.jsonl" if where == "row" else "manifest.json")


@pytest.mark.parametrize("name", ["classes", "shards", "settings", "form"])
@pytest.mark.parametrize("value", [None, 3, "x", [1], [[]], {"a": 1}], ids=str)
def test_wrong_parts(folder: Path, name: str, value: Any):
    if (name, value) == ("settings", {"a": 1}):
        pytest.skip("settings are any object")
    edit_manifest(folder, lambda head, _: head.update({name: value}))
    refused(folder, "manifest.json")


@pytest.mark.parametrize("name", ["schema", "form", "classes", "shards", "settings", "split"])
def test_missing_fields(folder: Path, name: str):
    edit_manifest(folder, lambda head, _: head.pop(name))
    refused(folder, f"manifest.json is not valid: Object missing required field `{name}`")


@pytest.mark.parametrize("schema", [0, 3, 99])
def test_other_versions(folder: Path, schema: int):
    edit_manifest(folder, set_field("head", "schema", schema))
    refused(folder, f"manifest.json: schema {schema}, this program reads 1 to 2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("row", "label", 4), "has the label 4, there are 4 classes"),
        (set_field("row", "shard", 3), "is in shard 3 of 3"),
        (set_field("row", "position", 4), "the samples' places, or their numbers of frames"),
        (set_field("row", "num_frames", 34), "the samples' places, or their numbers of frames"),
        (set_field("row", "num_frames", 0), "is written, but has no complete place"),
        (set_field("row", "status", "absent"), "the samples' places, or their numbers of frames"),
        (lambda _, rows: rows.pop(), "the samples' places, or their numbers of frames"),
        (lambda head, _: head["shards"].pop(), "is in shard 2 of 2"),
        (lambda head, _: head["shards"][0].pop("index_sha256"), "has no `index_sha256`"),
    ],
)
def test_wrong_relations(folder: Path, change: Callable[[Any, Any], Any], message: str):
    edit_manifest(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("name", ["manifest.json", "samples.jsonl"])
def test_any_flipped_bit_of_a_manifest_is_found(folder: Path, name: str):
    path = folder / name
    whole = path.read_bytes()
    good = read_manifest(folder)
    for place in range(0, len(whole), 1 + len(whole) // 400):
        flip(path, place, 1 << place % 8)
        try:
            found = read_manifest(folder)
        except ShardError:
            found = None
        # No value depends on the white space of the head.
        assert found is None or (found == good and name == "manifest.json"), place
        path.write_bytes(whole)


def test_texts_that_are_no_json(folder: Path):
    for name in ("manifest.json", "samples.jsonl"):
        whole = (folder / name).read_bytes()
        for content in (
            b"",
            b"[" * 100_000 + b"]" * 100_000,
            b'{"schema":' * 100_000,
            b"\xff\xfe",
            b"NaN",
            b"null",
            whole[: len(whole) // 2],
            whole + whole,
            # In a key that no field has; a decoder by schema skips it.
            whole.replace(b'"form": {', b'"form": {"\x80": 1, ').replace(b'"key"', b'"\x80"'),
        ):
            (folder / name).write_bytes(content)
            refused(folder, name)
        (folder / name).write_bytes(whole)


INDEX_EDITS: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda _: b"", "its first line is ''"),
    (lambda c: c.replace(b"v1.2", b"v1.1"), "its first line is 'v1.1 9'"),
    (lambda c: c.replace(b"v1.2 9", b"v1.2 8"), "but 9 lines follow"),
    (lambda c: c.rpartition(b"video")[0], "words|is listed as|reaches"),
    (lambda c: c.replace(b" 512 ", b" -512 ", 1), "is not inside the shard"),
    (lambda c: c.replace(b" 512 ", b" 999999999 ", 1), "is not inside the shard"),
    (lambda c: c.replace(b" 512 ", b" x ", 1), "invalid literal"),
    (lambda c: c.replace(b" 512 ", b" %s " % (b"9" * 5000), 1), "limit"),
    (lambda c: c.replace(b"video-0000", b"video-0001", 1), "is listed as"),
    (lambda c: c.replace(b"video-0000", b"video-9999"), "which are not the 9 of the manifest"),
    (lambda c: c.replace(b"frames.i32", b"000.jpg", 1), "is listed as"),
    (lambda c: c.replace(b"video", b"\xff\xfe", 1), "can't decode"),
]


@pytest.mark.parametrize(("change", "message"), INDEX_EDITS)
def test_index_files(folder: Path, change: Callable[[bytes], bytes], message: str):
    edit_index(folder, 0, change)
    with pytest.raises(ShardError, match=rf"(?s)index .*shard-000000\.idx .*({message})"):
        ShardReader(folder)


def test_a_flipped_bit_of_an_index_is_found_by_its_hash(folder: Path):
    path = folder / "shard-000001.idx"
    for place in range(len(path.read_bytes())):
        flip(path, place)
        refused(folder, "shard-000001.idx is damaged: its SHA-256")
        flip(path, place)


def progress(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    form = {"width": 64, "height": 48}
    plan = {"dataset": "d", "split": "s", "form": form, "classes": [], "absent": []}
    plan |= {"settings": {"plan": "p"}, "names": "p", "shards": [[1, "s"]]}
    record = {"plan": "p", "stamps": [""], "entry": None}
    return plan, record | {"rows": [{"source": "a", "status": "rejected"}]}


@pytest.mark.parametrize("name", ["plan.json", "shard-000000.tar.json"])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_records_of_unfinished_shards(tmp_path: Path, name: str, value: Any):
    (tmp_path / ".progress").mkdir()
    plan, record = progress(tmp_path)
    files: dict[str, Any] = {"plan.json": plan, "shard-000000.tar.json": record}
    for other, content in files.items():
        (tmp_path / ".progress" / other).write_text(json.dumps(content))
    for field in files[name]:
        if (field, value) in (("entry", None), ("absent", []), ("classes", []), ("rows", [])):
            continue
        if (field, value) in (("shards", []), ("stamps", []), ("names", "x")):
            continue
        if field in ("dataset", "split", "settings", "plan", "form") and value in ("x", {}):
            continue
        path = tmp_path / ".progress" / name
        path.write_text(json.dumps(files[name] | {field: value}))
        with pytest.raises(ShardError, match=name.replace(".", r"\.")):
            merge_set(tmp_path)
