"""A finished shard folder is checked: any flipped bit is found; foreign shards are made known."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from strata.errors import ShardError
from strata.format.manifest import digest_of, read_manifest, write_manifest
from strata.format.schema import NormalForm, checksum
from strata.preprocess.audit import check_folder
from strata.preprocess.audit_command import main as verify
from strata.preprocess.command import main
from tests.integration.test_sharding import shard, shards, videos
from tests.support.source_videos import moving_scene, write_video

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
        try:
            assert check_folder(copy, decode=0, workers=1)
        except ShardError as error:
            assert name == "samples.jsonl"  # Rows are hashed as they stand.
            assert "the digest is not that of their content" in str(error)  # noqa: PT017
    path.write_bytes(whole)
    assert check_folder(copy, workers=1) == []


def test_faults_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "shard-000000.idx").unlink()
    (copy / "shard-000001.tar").unlink()
    (copy / "thesis.txt").write_text("precious")
    with pytest.raises(ShardError, match="3 faults"):
        verify([str(copy)])
    output = capsys.readouterr().out
    assert f"{copy}: shard-000000.idx: missing" in output
    assert f"{copy}: shard-000001.tar: missing" in output
    assert f"{copy}: thesis.txt: the manifest does not know it" in output


def rewrite_table(
    content: bytearray, member: tarfile.TarInfo, index: int, change: Callable[[int], int]
) -> None:
    """Change a number of a frame table in a tar, with the checksum that is then right."""
    here = slice(member.offset_data, member.offset_data + member.size)
    table = np.frombuffer(bytes(content[here]), "<u4").copy()
    table[index] = change(int(table[index]))
    table[-1] = checksum(table[:-1].tobytes())
    content[here] = table.tobytes()


@pytest.mark.parametrize("part", ["picture", "table", "facts", "key"])
def test_a_wrong_writer_is_found_behind_right_hashes(copy: Path, part: str) -> None:
    """Another program wrote all hashes right, but a sample that is none."""
    import hashlib

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
            rewrite_table(content, member["frames.i32"], 2, lambda count: count ^ 1)
        case "facts":
            start = member["json"].offset_data
            content[content.index(b'"num_frames":', start) + 13] ^= 1
            facts = checksum(content[start : start + member["json"].size])
            rewrite_table(content, member["frames.i32"], -2, lambda _: facts)
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
        "table": "frame table: ",
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
    main(["index", str(folder), "--min-frames", "20"])
    assert {p: p.read_bytes() for p in folder.glob("*.tar")} == before
    output = capsys.readouterr().out
    assert "6 samples in 2 tars, 6 with a label of 4 classes" in output
    assert "sizes: 96x64 (6)" in output
    assert "cost: a training sample takes " in output
    manifest = read_manifest(folder)
    assert manifest.form == NormalForm(payload="foreign", min_frames=20)
    assert manifest.classes == ("c0", "c1", "c2", "3")
    assert [(r.key, r.label, r.num_frames) for r in manifest.written][:2] == [
        ("part/00", 0, 20),
        ("part/01", 1, 21),
    ]
    verify([str(folder)])
    assert "6 samples decoded" in capsys.readouterr().out
    with pytest.raises(ShardError, match=r"has a manifest.json already"):
        main(["index", str(folder)])


def test_foreign_shards_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    foreign_shards(folder)
    main(["index", str(folder), "--min-frames", "21", "--max-rejects", "0.4"])
    assert check_folder(folder, decode=-1) == []
    manifest = read_manifest(folder)
    rows = [r for r in manifest.rows if r.status == "rejected"]
    assert [(r.source, r.reason) for r in rows] == [
        ("x-0.tar/part/00", "too-short"),
        ("x-1.tar/part/10", "too-short"),
    ]
    shutil.copyfile(folder / "x-0.tar", folder / "y.tar")
    assert check_folder(folder, decode=0) == ["y.tar: the manifest does not know it; remove it"]
    (folder / "y.tar").unlink()
    # The rejected ones stay in the tar, and their bytes under its hash.
    path = folder / "x-0.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert check_folder(folder, decode=0) == [
        "x-0.tar: its SHA-256 is not what the manifest says; no sample shows the damage"
    ]
    content[1000] ^= 1
    path.write_bytes(content)
    # A manifest that counts another number of frames than decode.
    wrong = [
        dataclasses.replace(r, num_frames=22) if r.num_frames == 21 else r for r in manifest.rows
    ]
    entries = [dataclasses.replace(e, num_frames=e.num_frames + 1) for e in manifest.shards]
    changed = dataclasses.replace(manifest, rows=tuple(wrong), shards=tuple(entries))
    write_manifest(dataclasses.replace(changed, digest=digest_of(changed)), folder)
    assert check_folder(folder, decode=-1) == [
        f"x-{k}.tar: part/{k}1: 21 frames decode, the manifest says 22" for k in range(2)
    ]


@pytest.mark.parametrize(
    ("labels", "classes", "found"),
    [
        (["7", "0", "0"], "", tuple("01234567")),
        (["walk", "run", "walk"], "", ("run", "walk")),
        (["walk", "run", "walk"], "walk\nrun\njump\n", ("walk", "run", "jump")),
        (["1", "0", "1"], "walk\nrun\njump\n", ("walk", "run", "jump")),
        (["1", "3", "1"], "walk\nrun\njump\n", "label 3 is none of the 3 classes given"),
        (
            ["walk", "3", "1"],
            "",
            r"member 0.cls: the label 'walk' is a name, and 3 in a.tar",
        ),
    ],
)
def test_labels_of_foreign_shards(
    tmp_path: Path, labels: list[str], classes: str, found: tuple[str, ...] | str
) -> None:
    content = write_video(tmp_path / "v.mp4", moving_scene(5, 32, 32)).read_bytes()
    (tmp_path / "theirs").mkdir()
    with tarfile.open(tmp_path / "theirs" / "a.tar", "w") as tar:
        for k, label in enumerate(labels):
            for ext, part in (("mp4", content), ("cls", label.encode())):
                info = tarfile.TarInfo(f"{k}.{ext}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    argv = ["index", str(tmp_path / "theirs"), "--min-frames", "1"]
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
        argv += ["--classes", str(tmp_path / "classes.txt")]
    if isinstance(found, str):
        with pytest.raises(ShardError, match=found):
            main(argv)
        assert not (tmp_path / "theirs" / "manifest.json").exists()
        return
    main(argv)
    manifest = read_manifest(tmp_path / "theirs")
    assert manifest.classes == found
    names = [manifest.classes[r.label] for r in manifest.written]
    assert names == [found[int(x)] if x.isdigit() else x for x in labels]


def test_index_of_foreign_shards_is_what_dali_makes(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    folder = tmp_path / "theirs"
    foreign_shards(folder)
    main(["index", str(folder), "--min-frames", "1"])
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
    ("names", "message"),
    [
        (None, r"holds no \*.tar"),
        ([], "not readable as a tar"),
        (["a.mp4"], r"no sample has a video that can be used, first a\.tar/a: unreadable"),
        (["a.txt"], r"no sample has a video that can be used, first a\.tar/a: no-video-stream"),
        (["a.mp4", "b.mp4", "a.cls"], "the members of a do not stand together, or two samples"),
        (["my video.mp4"], r"that can be used, first a\.tar/my video: unreadable"),
    ],
)
def test_index_of_what_is_none(tmp_path: Path, names: list[str] | None, message: str) -> None:
    if names is not None:
        path = tmp_path / "a.tar"
        path.write_bytes(b"not a tar at all" * 100)
        if names:
            with tarfile.open(path, "w") as tar:
                for name in names:
                    tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ShardError, match=message):
        main(["index", str(tmp_path)])
    assert not (tmp_path / "manifest.json").exists()
