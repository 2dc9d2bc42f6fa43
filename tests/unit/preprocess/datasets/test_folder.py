from pathlib import Path

import pytest

from strata.errors import ConfigError, FaultKind
from strata.preprocess.datasets.folder import find_folder, mark_duplicates, sample_key
from strata.preprocess.datasets.official import find_ucf101

LINE_END = "\r\n"


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make_ucf(root: Path, *, flat: bool = False) -> tuple[Path, Path]:
    videos, splits = root / "videos", root / "splits"
    for number, name in enumerate(["Archery/v_Archery_g01_c01", "YoYo/v_YoYo_g02_c01"]):
        name = name.partition("/")[2] if flat else name
        put(videos / f"{name}.avi", bytes([number]) * 10)
    put(splits / "classInd.txt", b"1 Archery\r\n2 YoYo\r\n")
    put(
        splits / "trainlist01.txt",
        b"YoYo/v_YoYo_g02_c01.avi 2\r\nArchery/v_Archery_g09_c01.avi 1\r\n",
    )
    put(splits / "testlist01.txt", b"Archery/v_Archery_g01_c01.avi\r\n")
    return videos, splits


@pytest.mark.parametrize("flat", [False, True], ids=["class-folders", "flat"])
def test_ucf_lists(tmp_path: Path, flat: bool) -> None:
    videos, splits = make_ucf(tmp_path, flat=flat)
    train, test = find_ucf101([videos], splits, "1")
    assert (train.split, test.split) == ("train01", "test01")
    assert train.classes == test.classes == ("Archery", "YoYo")
    assert [(s.name, s.label, s.path is None) for s in train.sources] == [
        ("Archery/v_Archery_g09_c01.avi", 0, True),
        ("YoYo/v_YoYo_g02_c01.avi", 1, False),
    ]
    assert [s.name for s in test.present] == ["Archery/v_Archery_g01_c01.avi"]
    assert test.present[0].num_bytes == 10
    note = "1 classes have no video on the disk: Archery"
    assert [note in s.notes for s in (train, test)] == [True, False]


@pytest.mark.parametrize(
    ("list_name", "content", "message"),
    [
        (
            "trainlist01.txt",
            b"Nope/v_Nope_g01_c01.avi 3\r\n",
            "class 'Nope' is not in classInd.txt",
        ),
        ("trainlist01.txt", b"YoYo/v_YoYo_g02_c01.avi 1\r\n", "has label 1, classInd.txt says 2"),
        ("trainlist01.txt", b"YoYo/a.avi 2\r\nYoYo/a.avi 2\r\n", "lists YoYo/a.avi twice"),
        ("classInd.txt", b"one Archery\r\n", "not a number and a class name"),
        ("classInd.txt", b"1 Archery\r\n3 YoYo\r\n", "class numbers are not 1 to 2"),
    ],
)
def test_ucf_contradictions(tmp_path: Path, list_name: str, content: bytes, message: str) -> None:
    videos, splits = make_ucf(tmp_path)
    put(splits / list_name, content)
    with pytest.raises(ConfigError, match=message):
        find_ucf101([videos], splits, "1")


def test_ucf_missing_list(tmp_path: Path) -> None:
    videos, splits = make_ucf(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read the list .*trainlist02.txt.*--splits"):
        find_ucf101([videos], splits, "2")


def test_ucf_nothing_on_disk(tmp_path: Path) -> None:
    _, splits = make_ucf(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"none of the 3 listed videos is in .*empty"):
        find_ucf101([tmp_path / "empty"], splits, "1")
    with pytest.raises(ConfigError, match="missing does not exist; correct --videos"):
        find_ucf101([tmp_path / "missing"], splits, "1")


def test_folder_with_classes(tmp_path: Path) -> None:
    for name in ("walk/a.mp4", "run/b.AVI", "run/deep/c.mkv", "run/.hidden.mp4", "run/notes.txt"):
        put(tmp_path / name, name.encode())
    (only,) = find_folder([tmp_path])
    assert only.split == "train"
    assert only.classes == ("run", "walk")
    assert [(s.name, s.label) for s in only.sources] == [
        ("run/b.AVI", 0),
        ("run/deep/c.mkv", 0),
        ("walk/a.mp4", 1),
    ]
    assert only.notes == (
        "1 hidden or system files and folders are ignored: run/.hidden.mp4",
        "1 files are not videos by their names: run/notes.txt",
    )


def test_folder_without_classes(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", b"a")
    (only,) = find_folder([tmp_path])
    assert only.classes == ()
    assert [s.label for s in only.sources] == [-1]


def test_folder_of_both_kinds_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", b"a")
    put(tmp_path / "walk" / "b.mp4", b"b")
    with pytest.raises(ConfigError, match=r"videos beside them \(a.mp4\)"):
        find_folder([tmp_path])


def test_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no videos in"):
        find_folder([tmp_path])


def test_test_fraction_divides_every_class(tmp_path: Path) -> None:
    for name in ("walk", "run"):
        for number in range(10):
            put(tmp_path / name / f"{number}.mp4", f"{name}{number}".encode())
    train, test = find_folder([tmp_path], test_fraction=0.3, seed=1)
    for label in (0, 1):
        assert sum(s.label == label for s in train.sources) == 7
        assert sum(s.label == label for s in test.sources) == 3
    assert not {s.name for s in train.sources} & {s.name for s in test.sources}
    assert find_folder([tmp_path], test_fraction=0.3, seed=1) == [train, test]
    assert find_folder([tmp_path], test_fraction=0.3, seed=2) != [train, test]
    with pytest.raises(ConfigError, match=r"--test-fraction is 1.5"):
        find_folder([tmp_path], test_fraction=1.5)


def test_duplicates_in_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "run" / "a.mp4", b"same")
    put(tmp_path / "run" / "b.mp4", b"same")
    put(tmp_path / "run" / "c.mp4", b"size")
    put(tmp_path / "run" / "d.mp4", b"conflict")
    put(tmp_path / "walk" / "e.mp4", b"conflict")
    (only,) = find_folder([tmp_path])
    faults = {s.name: s.fault for s in only.sources if s.fault}
    assert faults == {
        "run/b.mp4": (FaultKind.DUPLICATE, "the same bytes as run/a.mp4"),
        "run/d.mp4": (
            FaultKind.DUPLICATE,
            "the same bytes as walk/e.mp4, and the labels differ",
        ),
        "walk/e.mp4": (
            FaultKind.DUPLICATE,
            "the same bytes as run/d.mp4, and the labels differ",
        ),
    }
    assert len(only.notes) == 2


def test_duplicates_in_official_lists_are_noted_and_kept(tmp_path: Path) -> None:
    videos, splits = make_ucf(tmp_path)
    put(videos / "Archery" / "v_Archery_g09_c01.avi", b"\x01" * 10)
    train = mark_duplicates(find_ucf101([videos], splits, "1")[0], reject=False)
    assert all(s.fault is None for s in train.sources)
    assert "the same video, with differing labels: Archery/v_Archery_g09" in train.notes[0]


@pytest.mark.parametrize(
    "name",
    ["run/a.mp4", "riding a bike/x.y.mp4", "跑/视频.mp4", "-" * 300 + ".mp4", "a'b/../c.avi"],
)
def test_keys_suit_tar_and_index(name: str) -> None:
    key = sample_key(name)
    assert key.isascii()
    assert key.replace("_", "").replace("-", "").isalnum()
    assert len(key) + len(".frames.i32") <= 100


def test_keys_differ_where_names_differ() -> None:
    names = ["a/b.mp4", "a_b.mp4", "a/b.avi", "a b.mp4", "A/b.mp4"]
    assert len({sample_key(n) for n in names}) == len(names)
