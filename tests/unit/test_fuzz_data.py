"""Fuzzed data sets: an error of one line, or the same pictures; never a traceback or other data.

2,400 edits, the same ones in every run.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strata.dataload.decode_windows import read_windows
from strata.dataload.faults import UndecodableError
from strata.dataload.reader import ShardReader
from strata.dataload.strip_decoder import StripDecoder
from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.format.schema import NormalForm, checksum
from strata.preprocess.audit import check_folder
from strata.preprocess.index_existing import index_folder
from strata.preprocess.run import merge_set
from tests.support.fuzzing import budget, byte_edits, edited, json_edited, json_edits, outcome
from tests.support.shard_edits import all_strips, canonical, place_of, write_json
from tests.support.shard_folders import HEIGHT, WIDTH, make_shards
from tests.support.source_videos import moving_scene, write_video

FRAMES = 33


def make(folder: Path, schema: int, payload: str = "jpeg") -> Path:
    form = NormalForm(width=WIDTH, height=HEIGHT, segment_frames=20, payload=payload, codec="vp9")  # pyright: ignore[reportArgumentType]
    make_shards(folder, num_videos=2, num_classes=2, shard_size=1, seed=3, form=form, schema=schema)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("new") / "set", 2)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("old") / "set", 1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("videos") / "set", 1, "mp4")


@contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Files that are what they were before, afterwards."""
    before = [path.read_bytes() for path in paths]
    try:
        yield
    finally:
        for path, content in zip(paths, before, strict=True):
            path.write_bytes(content)


@budget(300)
@given(st.sampled_from(["manifest.json", "samples.jsonl"]), byte_edits())
def test_bytes_of_the_manifest(folder: Path, name: str, edits: Any):
    good = read_manifest(folder)
    with kept(folder / name):
        (folder / name).write_bytes(edited((folder / name).read_bytes(), edits))
        assert outcome(lambda: read_manifest(folder)) in (None, good)


@budget(500)
@given(json_edits(), st.booleans())
def test_values_of_the_manifest_with_the_right_digest(folder: Path, edit: Any, in_rows: bool):
    good = all_strips(folder)
    manifest, samples = folder / "manifest.json", folder / "samples.jsonl"
    with kept(manifest, samples):
        head = json.loads(manifest.read_bytes())
        rows = [json.loads(line) for line in samples.read_bytes().splitlines()]
        if in_rows:
            rows = json_edited(rows, edit)
        else:
            head = json_edited(head, edit)
        write_json(folder, head, rows)
        assert outcome(lambda: all_strips(folder)) in (None, good)


@budget(300)
@given(byte_edits(), st.booleans())
def test_index(folder: Path, edits: Any, with_hash: bool):
    good = all_strips(folder)
    path, manifest, samples = (
        folder / name for name in ("shard-000001.idx", "manifest.json", "samples.jsonl")
    )
    with kept(path, manifest, samples):
        content = edited(path.read_bytes(), edits)
        path.write_bytes(content)
        if with_hash:
            head = json.loads(manifest.read_bytes())
            head["shards"][1]["index_sha256"] = hashlib.sha256(content).hexdigest()
            write_json(folder, head, [json.loads(s) for s in samples.read_bytes().splitlines()])
        assert outcome(lambda: all_strips(folder)) in (None, good)


NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 16, 33, 2**31 - 1, -(2**31), 10**9]), st.integers(-100, 70_000)
)


@budget(400)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 300), NUMBERS), min_size=1, max_size=3))
def test_frame_table_with_the_right_checksum(
    folder: Path, old: Path, is_old: bool, edits: list[tuple[int, int]]
):
    """A table may point elsewhere in an old set: a picture of the same size is what comes then."""
    where = old if is_old else folder
    good = all_strips(where)
    path, start, size = place_of(where, 1, "frames.i32")
    with kept(path):
        content = bytearray(path.read_bytes())
        table = np.frombuffer(bytes(content[start : start + size]), "<i4").copy()
        for place, value in edits:
            table[place % len(table)] = value
        if not is_old:
            table[-1:].view("<u4")[0] = checksum(table[:-1].tobytes())
        content[start : start + size] = table.tobytes()
        path.write_bytes(content)
        found = outcome(lambda: all_strips(where))
        outcome(lambda: check_folder(where, decode=0, workers=1))
        assert found is None or is_old or found == good
        if found is not None:
            assert decoded(np.frombuffer(found[1], np.uint8)) is not None or is_old


_DECODER: list[StripDecoder] = []


def decoded(strip: np.ndarray) -> np.ndarray | None:
    """A strip through the loader's own decoder, or None where its decoder refuses it."""
    if not _DECODER:
        _DECODER.append(StripDecoder(FRAMES + 1, HEIGHT, WIDTH))
    try:
        return _DECODER[0].decode(strip)
    except UndecodableError:
        return None


@budget(400)
@given(st.booleans(), byte_edits())
def test_jpeg_header(folder: Path, old: Path, is_old: bool, edits: Any):
    """Edits of the same length; with the checksums right for them where there are any."""
    where = old if is_old else folder
    path, start, _ = place_of(where, 1, "000.jpg")
    _, table_start, table_size = place_of(where, 1, "frames.i32")
    with kept(path):
        content = bytearray(path.read_bytes())
        table = np.frombuffer(bytes(content[table_start:][:table_size]), "<i4").copy()
        header = bytes(content[start : start + int(table[8])])
        new = edited(header, edits)[: len(header)].ljust(len(header), b"\0")
        content[start : start + len(header)] = new
        if not is_old:
            unsigned = table.view("<u4")
            unsigned[8 + 3 * (FRAMES + 1)] = checksum(new)
            unsigned[-1] = checksum(table[:-1].tobytes())
            content[table_start : table_start + table_size] = table.tobytes()
        path.write_bytes(content)
        reader = ShardReader(where)
        strip = outcome(lambda: reader.strip(1, np.arange(FRAMES + 1)))
        if strip is not None:
            found = decoded(strip)
            assert found is None or found.shape == (FRAMES + 1, HEIGHT, WIDTH, 3)
        reader.close()


@budget(150)
@given(byte_edits(), st.booleans())
def test_mp4_segments(videos: Path, edits: Any, at_end: bool):
    """What stands around the frames of an old set, which has no checksums."""
    path, start, size = place_of(videos, 1, "000.mp4")
    with kept(path):
        content = bytearray(path.read_bytes())
        here = slice(start + size - 800, start + size) if at_end else slice(start, start + 100)
        new = edited(bytes(content[here]), edits)[: here.stop - here.start]
        content[here] = new.ljust(here.stop - here.start, b"\0")
        path.write_bytes(content)
        reader = ShardReader(videos)
        outcome(lambda: read_windows(reader, [1], [np.arange(30)]))
        reader.close()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    content = write_video(folder.parent / "v.mp4", moving_scene(12, 32, 32)).read_bytes()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for k in range(3):
            facts = json.dumps({"label": k, "class_name": f"c{k}"}).encode()
            for ext, part in (("mp4", content), ("json", facts)):
                info = tarfile.TarInfo(f"part/{k}.{ext}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    return folder


@budget(200)
@given(byte_edits(), st.sampled_from([512, 1024, 1 << 30]))
def test_foreign_tars(
    foreign: Path, tmp_path_factory: pytest.TempPathFactory, edits: Any, head: int
):
    """The beginning, which is a header of the taror any part; indexed, read, checked."""
    folder = tmp_path_factory.mktemp("edited")
    content = (foreign / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(edited(content[:head], edits) + content[head:])
    form = NormalForm(width=32, height=32, min_frames=5)

    def read() -> int:
        manifest, _ = index_folder(folder, form, workers=1)
        reader = ShardReader(folder)
        frames = [np.arange(min(5, n)) for n in reader.num_frames.tolist()]
        read_windows(reader, list(range(reader.num_samples)), frames)
        reader.close()
        assert check_folder(folder, decode=-1, workers=1) == []
        return manifest.num_samples

    found = outcome(read)
    assert found is None or 0 < found <= 3 + len(edits)
    shutil.rmtree(folder)


@budget(150)
@given(
    st.sampled_from(["plan.json", "shard-000000.tar.json"]), st.one_of(byte_edits(), json_edits())
)
def test_records_of_unfinished_shards(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, name: str, edit: Any
):
    where = tmp_path_factory.mktemp("unfinished")
    (where / ".progress").mkdir()
    head = json.loads((folder / "manifest.json").read_bytes())
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
    plan = {n: head[n] for n in ("dataset", "split", "form", "classes")}
    plan |= {
        "settings": {"plan": "p"},
        "names": "p",
        "shards": [[1, "s"]],
        "absent": [["b.avi", 1]],
    }
    files = {
        "plan.json": plan,
        "shard-000000.tar.json": {
            **{"plan": "p", "stamps": [""]},
            **{"entry": head["shards"][0], "rows": rows[:1]},
        },
    }
    for suffix in (".tar", ".idx"):
        shutil.copyfile(folder / f"shard-000000{suffix}", where / f"shard-000000{suffix}")
    for other, content in files.items():
        text = canonical(content)
        if other == name:
            is_bytes = isinstance(edit, list)
            text = edited(text, edit) if is_bytes else canonical(json_edited(content, edit))
        (where / ".progress" / other).write_bytes(text)

    def merge() -> bytes:
        merge_set(where)
        return all_strips(where)[0]

    assert outcome(merge) in (None, all_strips(folder)[0])
    assert not {p.name for p in where.parent.iterdir()} & {"x", "evil"}
    shutil.rmtree(where)


def test_the_sets_are_sound(folder: Path, old: Path):
    """Else every edit would be refused."""
    assert check_folder(folder, decode=-1) == []
    assert len(all_strips(folder)) == len(all_strips(old)) == 2
    reader = ShardReader(folder)
    assert decoded(reader.strip(1, np.arange(FRAMES + 1))) is not None
    with pytest.raises(ShardError):
        read_manifest(folder / "nothing")
