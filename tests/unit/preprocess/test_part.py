"""Parts and the shards that they are joined to: the same bytes however a shard is divided."""

import dataclasses
import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from strata.errors import FaultKind, ShardError
from strata.format.manifest import build_manifest, read_manifest, write_manifest
from strata.format.schema import NormalForm, ShardEntry, SourceRow
from strata.preprocess import part
from strata.preprocess.container import stamp_of
from strata.preprocess.datasets.folder import Source, sample_key
from strata.preprocess.join import ShardRecord, join_parts
from strata.preprocess.part import PartTask, Range, make_part
from strata.preprocess.settings import ShardSettings
from tests.support.source_videos import moving_scene, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, ...]:
    """Five good ones; the third is no video, the fifth ends too early, behind its first segment."""
    folder = tmp_path_factory.mktemp("videos")
    made = []
    for k in range(7):
        path = write_video(folder / f"{k}.avi", moving_scene(12 if k != 4 else 300, 64, 64, seed=k))
        if k == 2:
            path.write_bytes(b"no video")
        if k == 4:
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
        made.append(Source(name=path.name, path=path, label=0, stamp=stamp_of(path)))
    return tuple(made)


def task(folder: Path, videos: tuple[Source, ...], first: int, last: int) -> PartTask:
    return PartTask(
        location=str(folder),
        range=Range(7, first, last),
        sources=videos[first:last],
        classes=("x",),
        plan="p",
        encoder=part.encoder_versions(),
        # 512 rows: 127 frames to a segment, so one is written before the fault of a long one shows.
        settings=ShardSettings(form=NormalForm(width=64, height=512, min_frames=1)),
    )


def make_shard(folder: Path, videos: tuple[Source, ...], size: int) -> ShardRecord:
    tasks = [task(folder, videos, k, min(k + size, 7)) for k in range(0, 7, size)]
    # In any order.
    return join_parts(str(folder), sorted((t.range, make_part(t)) for t in reversed(tasks)))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def shard(videos: tuple[Source, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    make_shard(folder, videos, 7)
    return folder


@pytest.mark.parametrize("size", [1, 3])
def test_the_bytes_do_not_depend_on_the_parts(
    size: int, videos: tuple[Source, ...], shard: Path, tmp_path: Path
):
    make_shard(tmp_path, videos, size)
    assert files(tmp_path) == files(shard)


def test_tar_index_and_record(videos: tuple[Source, ...], shard: Path, tmp_path: Path):
    record = make_shard(tmp_path, videos, 3)
    entry = record.entry
    assert entry is not None
    content = (shard / entry.name).read_bytes()
    assert (entry.num_bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    index = (shard / "shard-000007.idx").read_bytes()
    assert entry.index_sha256 == hashlib.sha256(index).hexdigest()
    good = [sample_key(f"{k}.avi") for k in (0, 1, 3, 5, 6)]
    assert [r.key for r in record.rows if r.status == "written"] == good
    assert [r.position for r in record.rows if r.status == "written"] == [0, 1, 2, 3, 4]
    rejected = {r.source: r.reason for r in record.rows if r.status == "rejected"}
    assert rejected == {"2.avi": "unreadable", "4.avi": "truncated"}
    with tarfile.open(shard / entry.name) as tar:
        members = tar.getmembers()
        assert list(dict.fromkeys(m.name.partition(".")[0] for m in members)) == good
        lines = index.decode().splitlines()
        assert lines[0] == "v1.2 5"
        words = " ".join(lines[1:]).split(" ")
        assert words[3::4] == [m.name for m in members]
        assert list(map(int, words[1::4])) == [m.offset_data for m in members]
        assert list(map(int, words[2::4])) == [m.size for m in members]


def test_index_is_what_dali_makes(shard: Path, tmp_path: Path):
    pytest.importorskip("nvidia.dali")
    theirs = tmp_path / "theirs.idx"
    call = [sys.executable, "-c", "import wds2idx; wds2idx.main()", shard / "shard-000007.tar"]
    subprocess.run([*call, theirs], check=True, capture_output=True)
    assert theirs.read_bytes() == (shard / "shard-000007.idx").read_bytes()


def test_a_part_that_was_damaged_is_not_joined(videos: tuple[Source, ...], tmp_path: Path):
    only = task(tmp_path, videos, 0, 2)
    made = make_part(only)
    path = tmp_path / only.range.name
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"000000-000002.part was damaged after it was written"):
        join_parts(str(tmp_path), [(only.range, made)])
    assert not list(tmp_path.glob("*.tar"))
    # Without its record the part is made again.
    assert not (tmp_path / f"{only.range.name}.json").exists()


def test_a_source_that_changes_while_it_is_read_is_rejected(
    videos: tuple[Source, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stamps = iter(["1:1", "1:2"])
    monkeypatch.setattr(part, "stamp_of", lambda path: next(stamps))
    (row,) = make_part(task(tmp_path, videos, 0, 1)).rows
    assert (row.reason, row.detail) == ("unreadable", "it changed while it was read")


def test_other_libraries_are_refused(videos: tuple[Source, ...], tmp_path: Path):
    other = dataclasses.replace(task(tmp_path, videos, 0, 1), encoder={"pyav": "0"})
    with pytest.raises(ShardError, match="install the same versions of av and pillow"):
        make_part(other)


def test_a_known_fault_is_a_row(videos: tuple[Source, ...], tmp_path: Path):
    fault = FaultKind.DUPLICATE, "the same bytes as a"
    video = dataclasses.replace(videos[0], fault=fault)
    record = make_shard(tmp_path, (video,) * 7, 7)
    assert (record.entry, {r.reason for r in record.rows}) == (None, {"duplicate"})
    assert not list(tmp_path.glob("*.tar"))


def test_manifest_survives_writing(tmp_path: Path) -> None:
    rows = [
        SourceRow(source="b/ü.avi", status="absent"),
        SourceRow(
            source="a/x.avi",
            status="written",
            key="a_x-1",
            label=1,
            num_frames=40,
            shard=0,
            position=0,
        ),
    ]
    manifest = build_manifest(
        dataset="folder",
        split="train",
        form=NormalForm(),
        classes=["a", "b"],
        shards=[
            ShardEntry(
                name="s.tar",
                num_samples=1,
                num_frames=40,
                num_bytes=9,
                sha256="0" * 64,
                index_sha256="1" * 64,
            )
        ],
        settings={"seed": 0},
        rows=rows,
    )
    write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert [r.source for r in manifest.rows] == ["a/x.avi", "b/ü.avi"]
    assert not list(tmp_path.glob("*.tmp"))
