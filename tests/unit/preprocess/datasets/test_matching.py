"""Videos of official sets under the names that people really have them."""

from pathlib import Path

import pytest

from strata.errors import ConfigError, FaultKind
from strata.preprocess.command import find_sets
from strata.preprocess.datasets.official import find_hmdb51, find_ucf101
from strata.preprocess.options import parse_command
from tests.unit.preprocess.datasets.test_folder import put

CLASSES = b"1 HandstandPushups\r\n2 YoYo\r\n"
TRAIN = b"HandstandPushups/v_HandStandPushups_g08_c01.avi 1\r\nYoYo/v_YoYo_g08_c01.avi 2\r\n"
TEST = b"YoYo/v_YoYo_g01_c01.avi\r\n"
LISTED = [
    "HandstandPushups/v_HandStandPushups_g08_c01.avi",
    "YoYo/v_YoYo_g08_c01.avi",
    "YoYo/v_YoYo_g01_c01.avi",
]


def lists(root: Path, train: bytes = TRAIN, test: bytes = TEST, classes: bytes = CLASSES) -> Path:
    put(root / "lists" / "classInd.txt", classes)
    put(root / "lists" / "trainlist01.txt", train)
    put(root / "lists" / "testlist01.txt", test)
    return root / "lists"


def found(root: Path, *videos: str, **content: bytes) -> tuple[dict[str, str], str]:
    """Which file each listed name got, and all notes."""
    splits = lists(root, **content)
    for name in videos:
        put(root / name, name.encode())
    folders = sorted({root / name.partition("/")[0] for name in videos})
    sets = find_ucf101(folders, splits, "1")
    files = {s.name: s.file for each in sets for s in each.present}
    return files, "\n".join(note for each in sets for note in each.notes)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (LISTED, ""),
        ([n.partition("/")[2] for n in LISTED], ""),
        ([n.replace(".avi", ".mp4") for n in LISTED], "are found with another extension: "),
        ([n.replace(".avi", ".avi.webm") for n in LISTED], "are found with another extension: "),
        ([n.replace(".avi", ".AVI") for n in LISTED], "with the extension in another case: "),
        ([n.lower() for n in LISTED], "are found in another case or Unicode form: "),
        (
            [n.replace("Handstand", "HandStand") for n in LISTED],
            "1 videos are found in a class folder of another spelling: ",
        ),
        ([f"train/{n}" for n in LISTED], "are found in other folders: "),
        ([f"UCF-101/split1/{n}" for n in LISTED], "are found in other folders: "),
        ([f"{n.partition('/')[0]}/{n}" for n in LISTED], "are found in other folders: "),
        ([f"all videos/{n.partition('/')[2]}" for n in LISTED], "are found in other folders: "),
    ],
    ids=[
        "as listed",
        "flat",
        "mp4",
        "avi.webm",
        "AVI",
        "lower case",
        "class folder's case",
        "split above",
        "two folders above",
        "class in class",
        "unknown folder",
    ],
)
def test_ucf101_as_people_have_it(tmp_path: Path, files: list[str], text: str) -> None:
    got, notes = found(tmp_path, *(f"videos/{f}" for f in files))
    assert got == dict(zip(LISTED, files, strict=True))
    assert text in notes
    assert bool(text) == bool(notes)


@pytest.mark.parametrize(
    "content",
    [
        {"train": b"\xef\xbb\xbf" + TRAIN.replace(b"\r\n", b"\n\n")},
        {"train": TRAIN.replace(b"/", b"\\")},
        {
            "train": TRAIN.replace(b"Handstand", b"./UCF-101/Handstand").replace(
                b"YoYo/", b"/data/YoYo/"
            )
        },
        {"train": TRAIN.replace(b" 1\r", b"\t1 \r")},
        {"train": TRAIN.replace(b"HandstandPushups/", b"HandStandPushups/")},
        {"classes": b"2\tYoYo\n1  HandstandPushups\n"},
    ],
    ids=["mark", "backslashes", "folders above", "tabs", "class's case", "order of classes"],
)
def test_ucf101_lists_as_people_have_them(tmp_path: Path, content: dict[str, bytes]) -> None:
    splits = lists(tmp_path, **content)
    for name in LISTED:
        put(tmp_path / "videos" / name, name.encode())
    train, test = find_ucf101([tmp_path / "videos"], splits, "1")
    assert train.classes == ("HandstandPushups", "YoYo")
    assert [(s.file, s.label) for s in train.present] == [(LISTED[0], 0), (LISTED[1], 1)]
    assert [(s.file, s.label) for s in test.present] == [(LISTED[2], 1)]


def test_a_list_without_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainlist01.txt: 'v.avi 1' is not <class>/<file>"):
        found(tmp_path, f"videos/{LISTED[0]}", train=b"v.avi 1\n")


def test_the_best_name_is_taken_with_a_note(tmp_path: Path) -> None:
    mp4 = LISTED[1].replace(".avi", ".mp4")
    got, notes = found(tmp_path, f"a/{mp4}", f"b/{LISTED[1]}", f"b/{LISTED[2]}")
    assert got == {LISTED[1]: LISTED[1], LISTED[2]: LISTED[2]}
    assert (
        "1 videos are there several times, the file whose name fits best is taken: "
        f"{LISTED[1]}, not {mp4}"
    ) in notes


def test_the_same_video_in_two_folders(tmp_path: Path) -> None:
    splits = lists(tmp_path)
    for folder in ("a", "b"):
        put(tmp_path / folder / LISTED[1], b"same")
        put(tmp_path / folder / LISTED[2], folder.encode())
    train, test = find_ucf101([tmp_path / "a", tmp_path / "b"], splits, "1")
    assert [s.fault for s in train.present] == [None]
    assert train.present[0].path == tmp_path / "a" / LISTED[1]
    text = "1 videos are there several times with the same bytes, the first is taken: "
    assert text + LISTED[1] in train.notes
    ((fault, detail),) = [s.fault for s in test.present if s.fault]
    assert fault == FaultKind.CONFLICT
    assert detail.startswith("files that may be it differ: ")


def test_a_video_in_another_class_is_not_it(tmp_path: Path) -> None:
    wrong = LISTED[1].replace("YoYo/", "HandstandPushups/")
    got, notes = found(tmp_path, f"videos/{wrong}", f"videos/{LISTED[2]}")
    assert got == {LISTED[2]: LISTED[2]}
    assert f"1 absent ones are in other classes' folders: {LISTED[1]} as {wrong}" in notes


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        found(tmp_path, "videos/some/clip.mp4", "videos/some/notes.txt")
    assert str(error.value) == (
        f"none of the 3 listed videos is in {tmp_path / 'videos'}: looked for {LISTED[0]}, "
        f"{LISTED[1]}, ... in any case, with any extension of a video, at any depth; found 1 "
        "videos (some/clip.mp4) and 1 other files (some/notes.txt); --videos is the folder that "
        "holds the class folders"
    )


def test_lists_one_folder_below_are_named(tmp_path: Path) -> None:
    splits = lists(tmp_path)
    put(tmp_path / "hmdb" / "inside" / "wave_test_split1.txt", b"a.avi 1\n")
    put(tmp_path / "videos" / LISTED[0], b"1")
    for find, folder, inside in (
        (find_ucf101, tmp_path, splits),
        (find_hmdb51, tmp_path / "hmdb", tmp_path / "hmdb" / "inside"),
    ):
        with pytest.raises(ConfigError, match=f"they are in {inside}: give that as --splits"):
            find([tmp_path / "videos"], folder, "1")


def test_hmdb51_names_with_special_characters(tmp_path: Path) -> None:
    splits, videos = tmp_path / "lists", tmp_path / "videos"
    listed = {
        "#1_Who's_there?_[x]_wave_f.avi": "wave/1_Who_s_there_x_wave_f.mp4",
        "a&b;(c)!_wave_f.avi": "wave/wave/a&b;(c)!_wave_f.avi",
        "a_b_c_wave_f.avi": "wave/a_b_c_wave_f.avi",
        "é_wave.avi": "wave/e\u0301_wave.avi",
        "with space_wave.avi": "wave/with space_wave.avi",
    }
    put(splits / "wave_test_split1.txt", "".join(f"{n} 1 \n" for n in listed).encode())
    put(splits / "dive_test_split1.txt", b"d_dive.avi 2\n")
    put(splits / "._dive_test_split1.txt", b"\0\5\x16\7")
    put(splits / "._clap_test_split1.txt", b"\0\5\x16\7")
    put(videos / "dive" / "d_dive.avi", b"d")
    for file in listed.values():
        put(videos / file, file.encode())
    train, test = find_hmdb51([videos], splits, "1")
    assert train.classes == ("dive", "wave")
    assert {s.name: s.file for s in train.sources} == {f"wave/{n}": f for n, f in listed.items()}
    assert [s.label for s in test.present] == [0]
    assert not [s for s in train.sources if s.fault]
    text = "1 videos are found with other characters for what is neither letter nor digit: "
    assert any(n.startswith(text) for n in train.notes)


def test_a_like_name_does_not_take_the_file_of_another(tmp_path: Path) -> None:
    splits, videos = tmp_path / "lists", tmp_path / "videos"
    put(splits / "wave_test_split1.txt", b"a#b.avi 1\na_b.avi 1\n")
    put(videos / "wave" / "a_b.avi", b"1")
    train, _ = find_hmdb51([videos], splits, "1")
    assert {s.name: s.file for s in train.present} == {"wave/a_b.avi": "wave/a_b.avi"}
    assert [s.name for s in train.sources if s.path is None] == ["wave/a#b.avi"]
    assert not [s for s in train.sources if s.fault]


@pytest.mark.parametrize(
    ("split", "counts"), [("1", (508, 209)), ("2", (513, 204)), ("3", (528, 189))]
)
def test_the_real_clips_of_two_folders(
    real_data: Path, split: str, counts: tuple[int, int]
) -> None:
    rest = real_data / "ucf101_rest" / "videos"
    if not rest.is_dir():
        pytest.skip("the rest of the real clips is not there")
    videos = real_data / "ucf101" / "videos"
    argv = ["ucf101", "--videos", str(videos), str(rest), "--split", split, "--out", "o"]
    command = parse_command([*argv, "--splits", str(real_data / "ucf101" / "splits")])
    train, test = find_sets(command)
    assert (len(train.present), len(test.present)) == counts
    assert not [s for s in (*train.sources, *test.sources) if s.fault]
    others = sum(s.file.endswith(".mp4") for s in train.present)
    assert f"{others} videos are found with another extension: " in "\n".join(train.notes)
