"""A finished shard folder is checked: any flipped bit is found; foreign shards are made known."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from strata.errors import ShardError
from strata.preprocess.check import check_folder
from strata.preprocess.check_cli import main as verify
from strata.preprocess.cli import main
from strata.preprocess.manifest import write_manifest
from strata.schema import read_manifest
from tests.integration.test_sharding import shard, shards, videos
from tests.unit.preprocess.videos import moving_scene, write_video

__all__ = ["shards", "videos"]


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_sound_folder(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify([str(shards), "--decode", "-1"])
    assert "sound: 10 samples in 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["shard-000001.tar", "shard-000001.idx", "manifest.json", "samples.jsonl"]
)
def test_any_flipped_bit_is_found(copy: Path, name: str) -> None:
    path = copy / name
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    places = random.choice(len(whole), 25, replace=False)
    for place, bit in zip(places.tolist(), random.integers(0, 8, 25).tolist(), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            faults = check_folder(copy, decode=0, workers=1)
        except ShardError as error:
            faults = [str(error)]
        assert faults, f"byte {place}, bit {bit} of {name}"
    if not name.endswith(".tar"):
        path.write_bytes(whole[:-1] + b" \n")  # JSON would not mind.
        assert check_folder(copy, decode=0, workers=1)
    path.write_bytes(whole)
    assert check_folder(copy, workers=1) == []


def test_faults_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "shard-000000.idx").unlink()
    (copy / "shard-000001.tar").unlink()
    (copy / "thesis.txt").write_text("precious")
    with pytest.raises(ShardError, match="3 faults"):
        verify([str(copy)])
    told = capsys.readouterr().out
    assert f"{copy}: shard-000000.idx: missing" in told
    assert f"{copy}: shard-000001.tar: missing" in told
    assert f"{copy}: thesis.txt: the manifest does not know it" in told


@pytest.mark.parametrize("part", ["picture", "table", "facts", "key"])
def test_a_wrong_writer_is_found_behind_right_hashes(copy: Path, part: str) -> None:
    """Another program wrote all hashes right, but a sample that is none."""
    import dataclasses
    import hashlib

    from strata.preprocess.manifest import digest_of

    manifest = read_manifest(copy)
    path = copy / manifest.shards[0].name
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = {m.name.partition(".")[2]: m for m in tar.getmembers()}
    key = manifest.written[0].key or ""
    match part:
        case "picture":
            marker = content.index(b"\xff\xd1", member["000.jpg"].offset_data)
            content[marker : marker + 2] = bytes(2)
        case "table":
            content[member["frames.i32"].offset_data + 8] ^= 1
        case "facts":
            content[content.index(b'"num_frames":') + 13] ^= 1
        case "key":
            manifest = dataclasses.replace(
                manifest,
                rows=tuple(
                    dataclasses.replace(r, key="other-0123456789") if r.key == key else r
                    for r in manifest.rows
                ),
            )
    path.write_bytes(content)
    entry = dataclasses.replace(manifest.shards[0], sha256=hashlib.sha256(content).hexdigest())
    manifest = dataclasses.replace(manifest, shards=(entry, *manifest.shards[1:]))
    manifest = dataclasses.replace(manifest, digest=digest_of(manifest))
    write_manifest(manifest, copy)
    faults = check_folder(copy, decode=-1)
    assert len(faults) == 1
    assert faults[0].startswith("shard-000000.tar: ")
    expected = {
        "picture": "restart markers out of order",
        "table": "the",
        "facts": "the facts' num_frames",
        "key": "expected key other-0123456789",
    }
    assert expected[part] in faults[0]


def test_mp4_payload_is_decoded(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.avi", moving_scene(40, 96, 64))
    shard(tmp_path / "videos", tmp_path / "out", "--payload", "mp4")
    assert check_folder(tmp_path / "out" / "train", decode=-1) == []


def foreign_shards(folder: Path) -> None:
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"x-{number}.tar", "w") as tar:
            for k in range(3):
                label = number + k
                path = write_video(folder.parent / "v.mp4", moving_scene(20 + k, 96, 64, seed=k))
                members = {"mp4": path.read_bytes()}
                if number:
                    members["cls"] = str(label).encode()
                else:
                    facts = {"label": label, "class_name": f"c{label}"}
                    members["json"] = json.dumps(facts).encode()
                for ext, content in members.items():
                    info = tarfile.TarInfo(f"part/{number}{k}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def test_foreign_shards_are_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    foreign_shards(folder)
    before = {p: p.read_bytes() for p in folder.glob("*.tar")}
    main(["index", str(folder)])
    assert {p: p.read_bytes() for p in folder.glob("*.tar")} == before
    told = capsys.readouterr().out
    assert "6 samples in 2 tars, 6 with a label" in told
    assert "sizes: 96x64 (6)" in told
    assert "ms of one core to decode 16 frames" in told
    assert "Strata's loader reads its own shards alone" in told
    manifest = read_manifest(folder)
    assert manifest.form.payload == "foreign"
    assert manifest.classes == ("c0", "c1", "c2", "3")
    assert [(r.key, r.label, r.num_frames) for r in manifest.written][:2] == [
        ("part/00", 0, 20),
        ("part/01", 1, 21),
    ]
    assert check_folder(folder) == []
    with pytest.raises(ShardError, match=r"has a manifest.json already"):
        main(["index", str(folder)])


def test_index_of_foreign_shards_is_what_dali_makes(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    folder = tmp_path / "theirs"
    foreign_shards(folder)
    main(["index", str(folder)])
    pipeline = Pipeline(batch_size=3, num_threads=1, device_id=None)
    tar = folder / "x-1.tar"
    with pipeline:
        members = fn.readers.webdataset(
            paths=[str(tar)], index_paths=[str(tar.with_suffix(".idx"))], ext=["mp4", "cls"]
        )
        assert members is not None
        pipeline.set_outputs(*members)
    pipeline.build()
    outputs = pipeline.run()
    assert outputs is not None
    assert [np.array(outputs[1].at(k)).tobytes() for k in range(3)] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"holds no \*.tar"), (b"not a tar at all" * 100, "not readable as a tar")],
)
def test_index_of_what_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=message):
        main(["index", str(tmp_path)])
