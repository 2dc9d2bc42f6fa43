"""Inputs as people have them, through the commands: stored, refused, and what is told."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.format.schema import Manifest, SourceRow
from strata.preprocess.command import main
from tests.support.source_videos import moving_scene, write_video
from tests.unit.format.test_open_video import with_damage
from tests.unit.test_orientation import letters, quarters


def shard(videos: Path, out: Path, *options: str) -> Manifest:
    argv = ["folder", "--videos", str(videos), "--out", str(out), "--workers", "1"]
    main([*argv, "--min-frames", "2", "--log", "none", *options])
    return read_manifest(out / "train")


def rows(manifest: Manifest) -> dict[str, SourceRow]:
    return {row.source: row for row in manifest.rows}


def first_picture(manifest: Manifest, folder: Path, row: SourceRow) -> np.ndarray:
    assert row.shard is not None
    with tarfile.open(folder / "train" / manifest.shards[row.shard].name) as tar:
        member = tar.extractfile(f"{row.key}.000.jpg")
        assert member is not None
        strip = Image.open(io.BytesIO(member.read())).convert("RGB")
    return np.asarray(strip)[: manifest.form.height]


@pytest.fixture(scope="module")
def cases(real_data: Path) -> Path:
    folder = real_data / "cases"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def test_the_named_cases(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = shard(cases, tmp_path, "--width", "64", "--height", "48", "--max-rejects", "1")
    found = {Path(name).name: row for name, row in rows(manifest).items()}
    assert {name: (row.status, row.num_frames, row.notes) for name, row in found.items()} == {
        "base.mp4": ("written", 40, None),
        "hflip.mp4": ("written", 40, None),
        "vflip.mp4": ("written", 40, None),
        "m1.mpg": ("written", 160, None),
        "s4320x16.mp4": ("written", 40, None),
        "long.mp4": ("written", 120, None),
        "trimcopy.mp4": ("written", 87, None),
        "nopts.avi": ("written", 120, ["the header declares 240 frames, 120 decode"]),
        "drop20.avi": ("written", 119, ["the header declares 119 frames, 96 decode"]),
    }
    for name, shown in (("base.mp4", "RGBW"), ("hflip.mp4", "GRWB"), ("vflip.mp4", "BWRG")):
        assert letters(first_picture(manifest, tmp_path, found[name])) == shown
    said = capsys.readouterr().out
    assert "written with a note" in said
    assert "14-editlist/nopts.avi: the header declares 240 frames, 120 decode" in said


def test_notes_stand_beside_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    videos = tmp_path / "videos"
    for name in ("damaged.mp4", "good.mp4"):
        write_video(videos / name, moving_scene(60, 96, 64), codec="libx264")
    with_damage(videos / "damaged.mp4", 20)
    (videos / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    found = rows(shard(videos, tmp_path / "reject", "--max-rejects", "1"))
    assert found["good.mp4"].notes is None
    assert found["damaged.mp4"].reason == "damaged"
    detail = found["damaged.mp4"].detail or ""
    assert "of 60 frames damaged, first at frame" in detail
    assert found["list.mp4"].reason == "unreadable"
    assert "a list of other files (ffconcat)" in (found["list.mp4"].detail or "")
    said = capsys.readouterr().out
    assert "  damaged                          1  damaged.mp4" in said
    assert "with a note" not in said
    # The lines of videos without a note are as they were before there were notes.
    for line in (tmp_path / "reject" / "train" / "samples.jsonl").read_text().splitlines():
        assert "notes" not in json.loads(line)

    kept = shard(videos, tmp_path / "keep", "--max-rejects", "1", "--damaged", "keep")
    row = rows(kept)["damaged.mp4"]
    assert (row.status, row.notes) == ("written", [f"damaged: {detail}"])
    assert 57 <= row.num_frames < 60
    assert kept.settings["damaged"] == "keep"
    said = capsys.readouterr().out
    assert f"  {'written with a note':<24}{1:>12}" in said
    assert f"    damaged.mp4: damaged: {detail}" in said
    # Another setting makes other shards; the same one finds them done.
    with pytest.raises(ShardError, match="with other settings"):
        shard(videos, tmp_path / "keep", "--max-rejects", "1")
    assert shard(videos, tmp_path / "keep", "--max-rejects", "1", "--damaged", "keep") == kept


def test_shards_of_others_have_the_same_notes_and_orientations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_video(
        tmp_path / "mirrored.mp4",
        quarters()[None].repeat(40, 0),
        codec="libx264",
        display_matrix=(-1, 0, 0, 1),
    )
    write_video(tmp_path / "promises.avi", moving_scene(40, 96, 64))
    content = bytearray((tmp_path / "promises.avi").read_bytes())
    for place in (content.index(b"avih") + 24, content.index(b"strh") + 40):
        content[place : place + 4] = (80).to_bytes(4, "little")
    (tmp_path / "promises.avi").write_bytes(content)
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for path in sorted(tmp_path.glob("*.*")):
            tar.add(path, path.name)
            label = tarfile.TarInfo(f"{path.stem}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))
    main(["index", str(folder), "--workers", "1"])
    found = {row.key: row for row in read_manifest(folder).rows}
    assert found["mirrored"].notes is None
    assert found["promises"].notes == ["the header declares 80 frames, 40 decode"]
    assert found["promises"].num_frames == 40


def test_names_with_a_colon_in_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["http:a.mp4", "2020-01-01 10:00.mp4"]
    for seed, name in enumerate(names):
        write_video(tmp_path / "videos" / name, moving_scene(10, 96, 64, seed=seed))
    monkeypatch.chdir(tmp_path)
    found = rows(shard(Path("videos"), Path("out")))
    assert {name: row.num_frames for name, row in found.items()} == dict.fromkeys(names, 10)
