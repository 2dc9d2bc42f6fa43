"""Labels of others: integers in disguise work, what is no class is named with its member."""

import json
from pathlib import Path

import pytest

from strata.errors import ShardError
from strata.format.schema import MAX_CLASSES
from strata.preprocess.existing_labels import Label, number_classes, read_label
from strata.preprocess.existing_tars import read_tar
from tests.unit.preprocess.test_existing_tars import write_tar


def label_of(folder: Path, **members: bytes) -> Label | None:
    path = write_tar(folder / "0.tar", {f"s.{ext}": c for ext, c in members.items()})
    (sample,) = read_tar(path).samples
    return read_label(path, sample)


def as_json(value: object) -> bytes:
    return json.dumps({"label": value}).encode()


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"cls": b"3"}, "3"),
        ({"cls": b" 3\r\n"}, "3"),
        ({"cls": b"\xef\xbb\xbf3"}, "3"),
        ({"cls": b"003"}, "3"),
        ({"cls": b"3.0"}, "3"),
        ({"CLS": b"3"}, "3"),
        ({"cls": b"riding a bike\n"}, "riding a bike"),
        ({"cls": "跑".encode()}, "跑"),
        ({"cls": b""}, None),
        ({"cls": b" \n"}, None),
        ({"json": b'{"label": null, "cls": 3}'}, "3"),
        ({"cls": b"-1"}, None),
        ({"json": as_json(3)}, "3"),
        ({"json": as_json(3.0)}, "3"),
        ({"json": as_json("3")}, "3"),
        ({"json": as_json("3.0")}, "3"),
        ({"json": as_json(" run ")}, "run"),
        ({"json": as_json(None)}, None),
        ({"json": b'{"cls": 3}'}, "3"),
        ({"json": b'{"other": [1]}'}, None),
        ({"json": b"3"}, "3"),
        ({"json": b'"run"'}, "run"),
        ({"JSON": b'\xef\xbb\xbf{"label": 3}'}, "3"),
        ({"cls": b"3", "json": as_json(3.0)}, "3"),
        ({"cls": b"3", "json": b"[1, 2]"}, "3"),
        ({"json": b'{"class_name": "run"}'}, "run"),
        ({"json": b'{"label": null, "class_name": null}'}, None),
        ({"txt": b"a caption"}, None),
        ({"cls": str(MAX_CLASSES - 1).encode()}, str(MAX_CLASSES - 1)),
    ],
)
def test_labels_in_all_their_forms(
    tmp_path: Path, members: dict[str, bytes], text: str | None
) -> None:
    label = label_of(tmp_path, **members)
    assert (label and label.text) == text


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"cls": b"1000000007"},
            r"s\.cls: the label 1000000007 is no class number from 0 to 99,",
        ),
        ({"cls": b"9" * 3000}, r"s\.cls: the label 9{60}\.\.\. is no class number"),
        ({"cls": str(MAX_CLASSES).encode()}, "is no class number from 0 to"),
        ({"cls": b"-2"}, r"the label -2 is no class number"),
        ({"cls": b"3\n4"}, r"the label '3\\n4' has line breaks"),
        ({"cls": b"\xe9t\xe9"}, r"is not UTF-8 text"),
        ({"cls": b"\x80\x04K\x03."}, r"is not UTF-8 text"),
        ({"cls": b"x" * 5000}, r"has 5,000 bytes, too many for a label"),
        ({"json": as_json(2.5)}, r"s\.json: the label 2\.5 is not an integer"),
        ({"json": as_json(True)}, r"s\.json: the label True is a bool"),
        ({"json": as_json([3])}, r"s\.json: the label \[3\] is a list"),
        ({"json": as_json({"id": 3})}, r"is a dict"),
        ({"json": as_json(1e300)}, r"is no class number"),
        ({"json": b'{"label": NaN}'}, r"s\.json: the label nan is not an integer"),
        ({"json": b"{'label': 3}"}, r"s\.json is not valid"),
        ({"json": b"[3]"}, r"the label \[3\] is a list"),
        ({"json": b"true"}, r"is a bool"),
        (
            {"cls": b"3", "json": as_json(4)},
            r"'4' contradicts '3' in 0\.tar: member s\.cls",
        ),
        ({"cls": b"run", "json": as_json("walk")}, "contradicts"),
    ],
)
def test_what_is_no_label_is_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        label_of(tmp_path, **members)


def test_a_number_and_its_name(tmp_path: Path) -> None:
    for members in (
        {"cls": b"3", "json": as_json("run")},
        {"cls": b"run", "json": as_json(3)},
        {"json": b'{"label": 3, "class_name": "run"}'},
        {"cls": b"3", "json": b'{"class_name": "run"}'},
    ):
        label = label_of(tmp_path, **members)
        assert label is not None
        assert (label.number, label.class_name) == (3, "run")


def test_classes_of_numbers_and_names() -> None:
    numbers = [Label("2", "x", "run"), None, Label("0", "y")]
    assert number_classes(numbers, ()) == (["0", "1", "run"], {"2": 2, "0": 0})
    words = [Label("walk", "x"), Label("run", "y"), Label("walk", "z")]
    assert number_classes(words, ()) == (["run", "walk"], {"run": 0, "walk": 1})
    assert number_classes([None], ()) == ([], {})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([Label("1", "a.tar: b"), Label("run", "c.tar: d")], "c.tar: d: the label 'run' is a name"),
        ([Label("1", "a", "run"), Label("1", "b", "walk")], "b: the label 1 is called 'walk', and"),
    ],
)
def test_contradicting_labels_are_named(labels: list[Label], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        number_classes(labels, ())
