"""The official lists of UCF101 and HMDB51."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from strata.errors import ConfigError
from strata.preprocess.datasets.folder import SourceSet, make_set
from strata.preprocess.datasets.listing import (
    Listing,
    list_files,
    name_of,
    path_of,
    paths_in,
    read_lines,
    require_folder,
    some_of,
)
from strata.preprocess.datasets.matching import Finder, check_any_present, plain

__all__ = ["find_hmdb51", "find_ucf101"]

_LOOKED_FOR = "in any case, with any extension of a video, at any depth"

_Entry = tuple[str, int]
"""A listed video, `<class>/<file>`, and its label."""


def _numbers(split: str) -> tuple[str, ...]:
    return ("1", "2", "3") if split == "all" else (split,)


def _refuse_parent(splits: Path, pattern: str) -> None:
    """Refuse a folder whose lists are one level below, as after unpacking an archive."""
    below = sorted({str(p.parent) for p in splits.glob(f"*/{pattern}")})
    if below and not any(splits.glob(pattern)):
        raise ConfigError(
            f"{splits} holds no {pattern}, they are in {some_of(below)}: give that as --splits"
        )


def _ucf101_classes(path: Path) -> list[str]:
    """The classes in the order of their numbers, whatever the order of the lines."""
    labels: dict[str, int] = {}
    for line in read_lines(path):
        number, _, name = line.replace("\t", " ").partition(" ")
        name = name.strip()
        if not number.isdecimal() or not name:
            raise ConfigError(f"{path}: {line!r} is not a number and a class name")
        if name in labels:
            raise ConfigError(f"{path}: class {name} is listed twice; remove one line")
        labels[name] = int(number) - 1
    if sorted(labels.values()) != list(range(len(labels))):
        raise ConfigError(f"{path}: the class numbers are not 1 to {len(labels)}")
    return sorted(labels, key=labels.__getitem__)


def _ucf101_entries(path: Path, classes: Sequence[str], index_name: str) -> list[_Entry]:
    """The lines of a list: a path, of which the last two parts count, and perhaps a number."""
    labels = {plain(name): label for label, name in enumerate(classes)}
    entries = []
    for line in read_lines(path):
        match = re.fullmatch(r"(.+?)(?:\s+(\d+))?", line)
        given, number = match.groups() if match else (line, None)
        parts = [p for p in given.replace("\\", "/").split("/") if p not in ("", ".")]
        if len(parts) < 2:
            raise ConfigError(f"{path}: {line!r} is not <class>/<file>; use the official list")
        class_name, file_name = parts[-2:]
        label = labels.get(plain(class_name))
        if label is None:
            raise ConfigError(f"{path}: class {class_name!r} is not in {index_name}")
        if number is not None and int(number) != label + 1:
            raise ConfigError(f"{path}: {given} has label {number}, {index_name} says {label + 1}")
        entries.append((f"{class_name}/{file_name}", label))
    return entries


def find_ucf101(videos: Sequence[Path], splits: Path, split: str) -> list[SourceSet]:
    """Read UCF101's official lists.

    Args:
        videos: Folders of the videos; `matching` says where in them a file is found.
        splits: Folder of `classInd.txt`, `trainlist0N.txt` and `testlist0N.txt`.
        split: `1`, `2`, `3` or `all`.

    Returns:
        For each split the training set and the test set, `train0N` and `test0N`.

    Raises:
        ConfigError: A folder or list is missing, a list contradicts the class list or itself, or
            none of its videos is on disk.
    """
    require_folder(splits, "--splits")
    index_path = splits / "classInd.txt"
    _refuse_parent(splits, index_path.name)
    listing = list_files(videos)
    classes = _ucf101_classes(index_path)
    lists = {
        f"{part}0{number}": _ucf101_entries(
            splits / f"{part}list0{number}.txt", classes, index_path.name
        )
        for number in _numbers(split)
        for part in ("train", "test")
    }
    names = {name for entries in lists.values() for name, _ in entries}
    finder = Finder(listing, classes, names)
    sets = _sets("ucf101", classes, lists, finder, listing)
    _check_disjoint(sets)
    return _note_unlisted(sets, finder, listing) if split == "all" else sets


def find_hmdb51(videos: Sequence[Path], splits: Path, split: str) -> list[SourceSet]:
    """Read HMDB51's official lists.

    Args:
        videos: Folders of the videos; `matching` says where in them a file is found.
        splits: Folder of `<class>_test_split{1,2,3}.txt`; in them 1 is training, 2 is test and 0 is
            not used in this split. The classes are those that have lists, in alphabetical order.
        split: `1`, `2`, `3` or `all`.

    Returns:
        For each split the training set and the test set, `train0N` and `test0N`.

    Raises:
        ConfigError: A folder or list is missing, a line is not one of theirs, a list contradicts
            itself, or none of its videos is on disk.
    """
    require_folder(splits, "--splits")
    _refuse_parent(splits, "*_test_split[123].txt")
    suffix = re.compile(r"(.+)_test_split[123]\.txt")
    matches = [suffix.fullmatch(name_of(p.name)) for p in paths_in(splits)]
    classes = sorted({match[1] for match in matches if match})
    if not classes:
        raise ConfigError(
            f"{splits} holds no <class>_test_split1.txt; --splits is the folder of HMDB51's lists"
        )
    listing = list_files(videos)
    lists: dict[str, list[_Entry]] = {}
    names: set[str] = set()
    for number in _numbers(split):
        parts: dict[str, list[_Entry]] = {"0": [], "1": [], "2": []}
        for label, class_name in enumerate(classes):
            for name, code in _hmdb51_lines(splits, class_name, number):
                names.add(name)
                parts[code].append((name, label))
        lists |= {f"train0{number}": parts["1"], f"test0{number}": parts["2"]}
    finder = Finder(listing, classes, names)
    return _note_unlisted(_sets("hmdb51", classes, lists, finder, listing), finder, listing)


def _hmdb51_lines(splits: Path, class_name: str, number: str) -> list[tuple[str, str]]:
    """The videos of a class's list, with their codes."""
    path = splits / path_of(f"{class_name}_test_split{number}.txt")
    codes: dict[str, str] = {}
    for line in read_lines(path):
        match = re.fullmatch(r"(.+)\s+([012])", line)
        if match is None:
            raise ConfigError(f"{path}: {line!r} is not a file name and 0, 1 or 2")
        name = f"{class_name}/{match[1].strip().replace(chr(92), '/').rpartition('/')[2]}"
        if name in codes:
            raise ConfigError(f"{path} lists {name.partition('/')[2]} twice; remove one line")
        codes[name] = match[2]
    return list(codes.items())


def _sets(
    dataset: str,
    classes: Sequence[str],
    lists: dict[str, list[_Entry]],
    finder: Finder,
    listing: Listing,
) -> list[SourceSet]:
    sets = [
        make_set(dataset, split, classes, [finder.source(*entry) for entry in entries])
        for split, entries in lists.items()
    ]
    check_any_present(sets, listing, _LOOKED_FOR)
    return [finder.with_notes(s) for s in sets]


def _check_disjoint(sets: Sequence[SourceSet]) -> None:
    """Check that no video is in both the training set and the test set of a split."""
    for train, test in zip(sets[::2], sets[1::2], strict=True):
        both = sorted({s.name for s in train.sources} & {s.name for s in test.sources})
        if both:
            raise ConfigError(
                f"{train.dataset}: {some_of(both)} in both {train.split} and {test.split}; "
                "correct the lists"
            )


def _note_unlisted(sets: Sequence[SourceSet], finder: Finder, listing: Listing) -> list[SourceSet]:
    unlisted = finder.unlisted
    if not unlisted:
        return list(sets)
    note = f"{len(unlisted)} videos in {listing.places} are in no list: {some_of(unlisted)}"
    return [replace(s, notes=(*s.notes, note)) for s in sets]
