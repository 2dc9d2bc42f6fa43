from pathlib import Path

import pytest

from strata.errors import ConfigError, FaultKind
from strata.preprocess.datasets import kinetics as kinetics_module
from strata.preprocess.datasets.folder import SourceSet
from strata.preprocess.datasets.kinetics import find_kinetics
from strata.preprocess.datasets.official import find_hmdb51, find_ucf101
from tests.unit.preprocess.datasets.test_folder import make_ucf, put


def faults(source_set: SourceSet) -> dict[str, FaultKind]:
    return {s.name: s.fault[0] for s in source_set.sources if s.fault}


def make_hmdb(root: Path, *, flat: bool = False) -> tuple[Path, Path]:
    videos, splits = root / "videos", root / "splits"
    for name in ("wave/a_wave.avi", "wave/b_wave.avi", "dive/[c] #1_dive.avi"):
        put(videos / (name.partition("/")[2] if flat else name), name.encode())
    put(splits / "wave_test_split1.txt", b"a_wave.avi 2 \nb_wave.avi 1 \nz_wave.avi 0 \n")
    put(splits / "dive_test_split1.txt", b"[c] #1_dive.avi 1 \r\ngone_dive.avi 2 \r\n")
    return videos, splits


@pytest.mark.parametrize("flat", [False, True], ids=["class-folders", "flat"])
def test_hmdb_lists(tmp_path: Path, flat: bool) -> None:
    videos, splits = make_hmdb(tmp_path, flat=flat)
    train, test = find_hmdb51([videos], splits, "1")
    assert (train.split, test.split) == ("train01", "test01")
    assert train.classes == ("dive", "wave")
    assert [(s.name, s.label) for s in train.present] == [
        ("dive/[c] #1_dive.avi", 0),
        ("wave/b_wave.avi", 1),
    ]
    assert [(s.name, s.path is None) for s in test.sources] == [
        ("dive/gone_dive.avi", True),
        ("wave/a_wave.avi", False),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a_wave.avi 3\n", "'a_wave.avi 3' is not a file name and 0, 1 or 2"),
        (b"a_wave.avi\n", "'a_wave.avi' is not a file name"),
        (b"a_wave.avi 1\na_wave.avi 2\n", "lists a_wave.avi twice"),
    ],
)
def test_hmdb_contradictions(tmp_path: Path, content: bytes, message: str) -> None:
    videos, splits = make_hmdb(tmp_path)
    put(splits / "wave_test_split1.txt", content)
    with pytest.raises(ConfigError, match=message):
        find_hmdb51([videos], splits, "1")


def test_hmdb_missing_lists_and_videos(tmp_path: Path) -> None:
    videos, splits = make_hmdb(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read the list .*dive_test_split2.txt"):
        find_hmdb51([videos], splits, "2")
    with pytest.raises(ConfigError, match=r"holds no <class>_test_split1.txt"):
        find_hmdb51([videos], videos, "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="none of the 4 listed videos is in"):
        find_hmdb51([tmp_path / "empty"], splits, "1")


def test_same_file_name_in_two_classes(tmp_path: Path) -> None:
    videos, splits = make_hmdb(tmp_path)
    put(splits / "dive_test_split1.txt", b"a_wave.avi 1\n[c] #1_dive.avi 1\n")
    put(videos / "dive" / "a_wave.avi", b"another")
    train, test = find_hmdb51([videos], splits, "1")
    assert not faults(train)
    assert train.present[1].path != test.present[0].path
    # Without class folders there is one file for two lines: nobody can say whose it is.
    for path in list(videos.rglob("*.avi")):
        path.rename(videos / path.name)
    train, test = find_hmdb51([videos], splits, "1")
    assert faults(train) == {"dive/a_wave.avi": FaultKind.CONFLICT}
    assert faults(test) == {"wave/a_wave.avi": FaultKind.CONFLICT}


def test_ucf_video_in_train_and_test(tmp_path: Path) -> None:
    videos, splits = make_ucf(tmp_path)
    put(splits / "testlist01.txt", b"YoYo/v_YoYo_g02_c01.avi\r\n")
    with pytest.raises(ConfigError, match=r"v_YoYo_g02_c01.avi in both train01 and test01"):
        find_ucf101([videos], splits, "1")


HEAD = "label,youtube_id,time_start,time_end,split,is_cc\n"
LINES = (
    "air drumming,-_aaaaaaaa_,7,17,val,0\n"
    '"training dog, big",bbbbbbbbbbb,100,110,val,1\n'
    "training dog,ccccccccccc,0,10,validate,0\n"
)


@pytest.fixture(autouse=True)
def three_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinetics_module.KINETICS_CLASSES, "kinetics400", 3)


def kinetics(
    root: Path, files: list[str], lines: str = LINES, split: str = "val"
) -> tuple[SourceSet, ...]:
    for file in files:
        put(root / "videos" / file, file.encode())
    put(root / "lists" / "val.csv", (HEAD + lines).encode())
    return tuple(find_kinetics("kinetics400", [root / "videos"], root / "lists", split))


@pytest.mark.parametrize(
    "files",
    [
        ["val/air drumming/-_aaaaaaaa__000007_000017.mp4", "val/training dog/ccccccccccc.mkv"],
        ["air_drumming/-_aaaaaaaa__000007_000017.mp4", "training_dog/ccccccccccc_0_10.mp4"],
        ["-_aaaaaaaa__000007_000017.webm", "ccccccccccc_000000_000010.mp4"],
        ["-_aaaaaaaa_.mp4", "ccccccccccc.mp4"],
    ],
    ids=["split and label", "label with underscores", "flat", "id alone"],
)
def test_kinetics_folder_forms(tmp_path: Path, files: list[str]) -> None:
    (val,) = kinetics(tmp_path, files)
    assert val.classes == ("air drumming", "training dog", "training dog, big")
    assert [(s.name, s.label, s.path is None) for s in val.sources] == [
        ("air drumming/-_aaaaaaaa__000007_000017.mp4", 0, False),
        ("training dog, big/bbbbbbbbbbb_000100_000110.mp4", 2, True),
        ("training dog/ccccccccccc_000000_000010.mp4", 1, False),
    ]
    assert not faults(val)
    by_id = [n for n in val.notes if "no times in their names" in n]
    assert bool(by_id) == any(len(Path(f).stem) == 11 for f in files)


def test_kinetics_conflicts_are_named(tmp_path: Path) -> None:
    files = [
        "val/training dog/-_aaaaaaaa__000007_000017.mp4",  # another class's folder
        "val/training dog/ccccccccccc.mp4",
        "val/training dog/ccccccccccc.mkv",  # two that may be it
        "val/training dog/ddddddddddd.mp4",  # in no list
        "val/readme.txt",
    ]
    (val,) = kinetics(tmp_path, files, LINES + LINES.splitlines(keepends=True)[0])
    assert faults(val) == {
        "air drumming/-_aaaaaaaa__000007_000017.mp4": FaultKind.CONFLICT,
        "training dog/ccccccccccc_000000_000010.mp4": FaultKind.CONFLICT,
    }
    notes = "\n".join(val.notes)
    assert "1 lines of val say the same twice: air drumming/" in notes
    assert "in no list: val/training dog/ddddddddddd.mp4" in notes
    assert "not videos by their names: val/readme.txt" in notes


def test_kinetics_one_clip_with_two_labels(tmp_path: Path) -> None:
    lines = LINES + "training dog,-_aaaaaaaa_,7,17,val,0\n"
    (val,) = kinetics(tmp_path, ["-_aaaaaaaa_.mp4"], lines)
    assert set(faults(val).values()) == {FaultKind.CONFLICT}
    assert len(faults(val)) == 2


def test_kinetics_one_file_for_two_clips(tmp_path: Path) -> None:
    lines = LINES + "air drumming,-_aaaaaaaa_,50,60,val,0\n"
    (val,) = kinetics(tmp_path, ["air drumming/-_aaaaaaaa_.mp4"], lines)
    assert len(faults(val)) == 2
    assert all("is also what the lists call" in s.fault[1] for s in val.sources if s.fault)


def test_kinetics_same_file_in_two_splits_of_folders(tmp_path: Path) -> None:
    name = "training dog/ccccccccccc_000000_000010.mp4"
    (val,) = kinetics(tmp_path, [f"train/{name}", f"val/{name}"])
    assert not faults(val)
    assert val.present[0].path == tmp_path / "videos" / "val" / name


def test_kinetics_split_by_file_name_and_no_labels(tmp_path: Path) -> None:
    put(tmp_path / "videos" / "eeeeeeeeeee_000001_000011.mp4", b"e")
    put(tmp_path / "lists" / "kinetics_test.csv", b"youtube_id,time_start,time_end\r\n")
    with (tmp_path / "lists" / "kinetics_test.csv").open("ab") as file:
        file.write(b"eeeeeeeeeee,1.0,11.0\r\n")
    val, test = kinetics(tmp_path, ["ccccccccccc.mp4"], split="all")
    assert (val.split, test.split) == ("val", "test")
    assert [s.label for s in test.present] == [-1]


@pytest.mark.parametrize(
    ("lines", "split", "message"),
    [
        (LINES, "train", "have no split 'train', only val"),
        (LINES + "x,yyyyyyyyyyy,ten,20,val,0\n", "val", "line 5 is not a clip .*'ten'"),
        (LINES + "x,yyyyyyyyyyy,10,20,vol,0\n", "val", None),
        (LINES.partition("\n")[0], "val", "name 1 classes, kinetics400 has 3; .*--classes"),
    ],
)
def test_kinetics_bad_lists(tmp_path: Path, lines: str, split: str, message: str | None) -> None:
    files = ["ccccccccccc.mp4"]
    if message is None:  # The file's name says which split it is.
        lines = lines.replace("\nx,", "\ntraining dog,")
        assert len(kinetics(tmp_path, files, lines, split)[0].sources) == 4
        return
    with pytest.raises(ConfigError, match=message):
        kinetics(tmp_path, files, lines, split)


def test_kinetics_not_a_csv_of_theirs(tmp_path: Path) -> None:
    put(tmp_path / "videos" / "a.mp4", b"a")
    put(tmp_path / "val.csv", b"id,class\n")
    with pytest.raises(ConfigError, match="no column time_end and time_start and youtube_id"):
        find_kinetics("kinetics400", [tmp_path / "videos"], tmp_path / "val.csv", "all")
    with pytest.raises(ConfigError, match="holds no csv"):
        find_kinetics("kinetics400", [tmp_path / "videos"], tmp_path / "videos", "all")


def test_kinetics_class_file(tmp_path: Path) -> None:
    put(tmp_path / "videos" / "ccccccccccc.mp4", b"c")
    put(tmp_path / "val.csv", (HEAD + LINES).encode())
    classes = tmp_path / "classes.txt"
    args = ("kinetics400", [tmp_path / "videos"], tmp_path / "val.csv", "val", classes)
    put(classes, b"training dog\nair drumming\n")
    with pytest.raises(ConfigError, match=r"1 labels are not in .*: training dog, big"):
        find_kinetics(*args)
    put(classes, b"training dog\nair drumming\ntraining dog, big\nunused\n")
    (val,) = find_kinetics(*args)
    assert val.classes == ("training dog", "air drumming", "training dog, big", "unused")
    assert [s.label for s in val.present] == [0]


@pytest.mark.parametrize(
    "other", ["train/training dog/ccccccccccc_000000_000010.mp4", "val/ccccccccccc_0_10.webm"]
)
@pytest.mark.parametrize(
    "replacement",
    [
        "replacement/replacement_for_corrupted_k400/ccccccccccc_000000_000010.mp4",
        "replacement/ccccccccccc.mp4",
        "k400/Replacements/training_dog/ccccccccccc_000000_000010.mkv",
    ],
)
def test_kinetics_replacements_are_preferred(tmp_path: Path, other: str, replacement: str) -> None:
    (val,) = kinetics(tmp_path, [other, replacement])
    assert not faults(val)
    assert [s.file for s in val.present] == [replacement]
    note = "1 clips are taken from a replacement folder instead of another: "
    assert f"{note}{replacement}, not {other}" in val.notes


def test_kinetics_clip_in_two_folders(tmp_path: Path) -> None:
    name = "training dog/ccccccccccc_000000_000010.mp4"
    put(tmp_path / "more" / name, b"same")
    put(tmp_path / "videos" / name, b"same")
    put(tmp_path / "val.csv", (HEAD + LINES).encode())
    folders = [tmp_path / "videos", tmp_path / "more"]
    (val,) = find_kinetics("kinetics400", folders, tmp_path / "val.csv", "val")
    assert not faults(val)
    assert len(val.present) == 1
    assert any(f"the first is taken: {name}" in n for n in val.notes)
    put(tmp_path / "more" / name, b"other")
    (val,) = find_kinetics("kinetics400", folders, tmp_path / "val.csv", "val")
    assert set(faults(val).values()) == {FaultKind.CONFLICT}


def test_kinetics_hidden_lists_are_none(tmp_path: Path) -> None:
    put(tmp_path / "lists" / "._val.csv", b"\0\5\x16\7")
    (val,) = kinetics(tmp_path, ["ccccccccccc.mp4"])
    assert len(val.present) == 1


def test_kinetics_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"looked for air drumming.* as <id>_<start>_<end> or"):
        kinetics(tmp_path, ["other.mp4"])


def test_kinetics_replacements_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """The folder that the user gives has a name, too."""
    name = "ccccccccccc_000000_000010.mp4"
    put(tmp_path / "val" / "training dog" / name, b"corrupt")
    put(tmp_path / "replacement_for_corrupted_k400" / name, b"good")
    put(tmp_path / "val.csv", (HEAD + LINES).encode())
    folders = [tmp_path / "val", tmp_path / "replacement_for_corrupted_k400"]
    (val,) = find_kinetics("kinetics400", folders, tmp_path / "val.csv", "val")
    assert not faults(val)
    assert [s.path for s in val.present] == [folders[1] / name]
    assert any("taken from a replacement folder" in n for n in val.notes)
