"""Folders that are divided into splits, in the layouts that people have."""

from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.format.manifest import read_manifest
from strata.preprocess.command import main
from strata.preprocess.datasets.folder import find_folder
from tests.support.source_videos import moving_scene, write_video
from tests.unit.preprocess.datasets.test_folder import put


def fill(root: Path, *names: str) -> None:
    for name in names:
        put(root / name, name.encode())


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/{}/{}.mp4", "val/{}/{}.mp4"),
        ("Training/{}/{}.mp4", "validation/{}/{}.mp4"),
        ("train_256/{}/{}.mp4", "test_256/{}/{}.mp4"),
        ("set/train/{}/{}.mp4", "set/eval/{}/{}.mp4"),
        ("{}/train/{}.mp4", "{}/test/{}.mp4"),
        ("set/{}/train/{}.mp4", "set/{}/test/{}.mp4"),
    ],
)
def test_splits_become_sets_with_the_same_classes(tmp_path: Path, train: str, test: str) -> None:
    names = [train.format(c, n) for c in ("run", "sit", "walk") for n in "ab"]
    names += [test.format(c, "c") for c in ("run", "walk")]
    fill(tmp_path, *names)
    first, second = find_folder([tmp_path])
    folders = [set(train.split("/")), set(test.split("/"))]
    assert first.split in folders[0]
    assert second.split in folders[1]
    assert first.classes == second.classes == ("run", "sit", "walk")
    assert [s.label for s in first.sources] == [0, 0, 1, 1, 2, 2]
    assert [s.label for s in second.sources] == [0, 2]
    assert any("are taken as splits" in n for n in first.notes)
    assert any(f"1 classes have no video in {second.split}: sit" in n for n in first.notes)


def test_splits_without_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/a.mp4", "train/b.mp4", "test/c.mp4")
    train, test = find_folder([tmp_path])
    assert (train.split, test.split, train.classes) == ("train", "test", ())
    assert (len(train.sources), len(test.sources)) == (2, 1)


def test_the_same_video_in_two_splits_is_noted(tmp_path: Path) -> None:
    fill(tmp_path, "train/run/a.mp4", "val/run/b.mp4")
    put(tmp_path / "train" / "run" / "x.mp4", b"same")
    put(tmp_path / "val" / "run" / "y.mp4", b"same")
    train, val = find_folder([tmp_path])
    assert len(train.sources) == len(val.sources) == 2
    note = "1 videos are in several splits, and kept: train/run/x.mp4 = val/run/y.mp4"
    assert note in train.notes


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/run/a.mp4", "val/run/b.mp4", "extras/c.mp4")
    with pytest.raises(ConfigError, match=r"splits \(train, val\) beside others \(extras\)"):
        find_folder([tmp_path])


def test_splits_as_two_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/run/a.mp4", "val/run/b.mp4", "train_2/run/c.mp4")
    with pytest.raises(ConfigError, match=r"val are splits, and would become one set; give the"):
        find_folder([tmp_path / "train", tmp_path / "val"])
    (both,) = find_folder([tmp_path / "train", tmp_path / "train_2"])
    assert [s.name for s in both.sources] == ["run/a.mp4", "run/c.mp4"]


def test_a_share_for_the_test_set_is_refused_where_there_are_splits(tmp_path: Path) -> None:
    fill(tmp_path, "train/run/a.mp4", "val/run/b.mp4")
    with pytest.raises(ConfigError, match=r"is divided into train, val already; leave out"):
        find_folder([tmp_path], test_fraction=0.2)


def test_classes_that_sound_like_splits_stay_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/a.mp4", "bus/b.mp4", "test drive/c.mp4")
    (only,) = find_folder([tmp_path])
    assert only.classes == ("bus", "test drive", "train")


def test_odd_class_folders_are_noted(tmp_path: Path) -> None:
    fill(tmp_path, "Riding Bike/a.mp4", "riding_bike/b.mp4", "跑 步/c.mp4", "empty/.keep")
    (tmp_path / "really empty").mkdir()
    (only,) = find_folder([tmp_path])
    assert only.classes == ("Riding Bike", "riding_bike", "跑 步")
    notes = "\n".join(only.notes)
    assert "2 folders hold no video and are no classes: empty, really empty" in notes
    assert "differ in spelling alone, and are kept apart: Riding Bike / riding_bike" in notes


def test_a_class_folder_with_a_line_break_is_refused_before_the_work(tmp_path: Path) -> None:
    fill(tmp_path, "walk\n/a.mp4", "run/b.mp4")
    with pytest.raises(ConfigError, match=r"the class name 'walk\\n', which is not allowed"):
        find_folder([tmp_path])


def test_one_class_above_the_classes_is_noted(tmp_path: Path) -> None:
    fill(tmp_path, "UCF-101/run/a.mp4", "UCF-101/walk/b.mp4")
    (only,) = find_folder([tmp_path])
    assert only.classes == ("UCF-101",)
    assert f"give --videos {tmp_path / 'UCF-101'}" in only.notes[-1]


def test_splits_in_one_command(tmp_path: Path) -> None:
    for k, name in enumerate(("train/run/a", "train/walk/b", "val/walk/c")):
        write_video(tmp_path / "v" / f"{name}.mp4", moving_scene(4, 64, 48, seed=k))
    argv = ["folder", "--videos", str(tmp_path / "v"), "--out", str(tmp_path / "out")]
    argv += ["--width", "64", "--height", "48", "--min-frames", "1", "--workers", "1"]
    main([*argv, "--log", "none"])
    found = {s: read_manifest(tmp_path / "out" / s) for s in ("train", "val")}
    assert {m.classes for m in found.values()} == {("run", "walk")}
    assert [r.label for r in found["train"].rows] == [0, 1]
    assert [(r.source, r.label) for r in found["val"].rows] == [("val/walk/c.mp4", 1)]
