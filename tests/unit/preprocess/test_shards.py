import hashlib
import multiprocessing
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from strata.format.manifest import build_manifest, read_manifest, write_manifest
from strata.format.schema import NormalForm, ShardEntry, SourceRow
from strata.preprocess.parts import PartPacker, Sent, receive
from strata.preprocess.shards import ShardWriter


def add(writer: ShardWriter, key: str, members: list[tuple[str, bytes]]) -> None:
    """As a worker and the driver do it, through a file in memory."""
    ours, theirs = multiprocessing.Pipe()
    packer = PartPacker(theirs, key)
    for ext, content in members:
        packer.add(ext, content)
    packer.send(1)
    sent = receive(ours)
    assert isinstance(sent, Sent)
    writer.add(sent.part.members, sent.descriptor, sent.part.num_bytes)
    sent.close()


def write_shard(folder: Path, samples: dict[str, list[tuple[str, bytes]]]) -> ShardWriter:
    with ShardWriter(folder, 7) as writer:
        for key, members in samples.items():
            writer.begin_sample()
            add(writer, key, members)
            writer.end_sample()
        writer.finish()
    return writer


SAMPLES = {
    "one-0123456789": [("000.jpg", b"x" * 700), ("001.jpg", b"y" * 512), ("json", b"{}")],
    "two-" + "z" * 80: [("000.jpg", b""), ("frames.i32", b"abc")],
}


def test_tar_and_index(tmp_path: Path) -> None:
    writer = write_shard(tmp_path, SAMPLES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard-000007.idx", "shard-000007.tar"]
    with tarfile.open(writer.path) as tar:
        members = tar.getmembers()
        expected = [(f"{k}.{e}", c) for k, parts in SAMPLES.items() for e, c in parts]
        found = [(m.name, tar.extractfile(m).read()) for m in members]  # pyright: ignore[reportOptionalMemberAccess]
        assert found == expected
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
    content = writer.path.read_bytes()
    lines = writer.path.with_suffix(".idx").read_text().splitlines()
    assert lines[0] == "v1.2 2"
    for line, parts in zip(lines[1:], SAMPLES.values(), strict=True):
        fields = line.split(" ")
        for k, (ext, expected_content) in enumerate(parts):
            assert fields[4 * k] == ext
            offset, size = int(fields[4 * k + 1]), int(fields[4 * k + 2])
            assert content[offset : offset + size] == expected_content


def test_index_is_what_dali_makes(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    writer = write_shard(tmp_path, SAMPLES)
    theirs = tmp_path / "theirs.idx"
    call = [sys.executable, "-c", "import wds2idx; wds2idx.main()", writer.path, theirs]
    subprocess.run(call, check=True, capture_output=True)
    assert theirs.read_bytes() == writer.path.with_suffix(".idx").read_bytes()


def test_dropped_sample_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "dropped").mkdir()
    plain = write_shard(tmp_path / "plain", SAMPLES)
    with ShardWriter(tmp_path / "dropped", 7) as writer:
        for key, members in SAMPLES.items():
            writer.begin_sample()
            add(writer, "bad", [("000.jpg", b"q" * 5000)])
            writer.drop_sample()
            add(writer, key, members)
            writer.end_sample()
        writer.begin_sample()
        add(writer, "bad", [("000.jpg", b"q" * 5000)])
        writer.drop_sample()
        num_bytes, sha256, index_sha256 = writer.finish()
    content = writer.path.read_bytes()
    assert content == plain.path.read_bytes()
    assert num_bytes == len(content)
    assert sha256 == hashlib.sha256(content).hexdigest()
    index = writer.path.with_suffix(".idx")
    assert index.read_bytes() == plain.path.with_suffix(".idx").read_bytes()
    assert index_sha256 == hashlib.sha256(index.read_bytes()).hexdigest()


def test_unfinished_shard_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0) as writer:  # noqa: PT012
        writer.begin_sample()
        add(writer, "a", [("000.jpg", b"x")])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


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
