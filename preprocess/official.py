"""The official lists of UCF101, HMDB51 and Kinetics, and where their videos are on the disk."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from strata.errors import ConfigError, FaultKind
from strata.preprocess.sources import (
    VIDEO_SUFFIXES,
    Source,
    SourceSet,
    files_below,
    make_set,
    read_lines,
    require_folder,
    some_of,
    source_at,
)
from strata.schema import NO_LABEL

__all__ = ["KINETICS_CLASSES", "Kinetics", "find_hmdb51", "find_kinetics", "find_ucf101"]

Kinetics = Literal["kinetics400", "kinetics600", "kinetics700"]

KINETICS_CLASSES: dict[str, int] = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700}
"""How many classes the official lists name."""

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "holdout": "test",
}


def _on_disk(videos: Path) -> dict[str, Path]:
    """All files by their relative names: one walk, as network disks answer single looks slowly."""
    return {p.relative_to(videos).as_posix(): p for p in files_below(videos)}


def _place(name: str, on_disk: dict[str, Path]) -> str:
    """Where a listed `<class>/<file>` is: in its class's folder, or beside the folders."""
    return name if name in on_disk else name.partition("/")[2]


def _check_any_present(sets: Sequence[SourceSet], videos: Path) -> None:
    if not any(s.present for s in sets):
        raise ConfigError(
            f"none of the {sum(len(s.sources) for s in sets):,} listed videos is in {videos}; "
            "--videos is the folder that holds the class folders"
        )


def _check_disjoint(sets: Sequence[SourceSet]) -> None:
    """No video may be in the training set and the test set of one split."""
    for train, test in zip(sets[::2], sets[1::2], strict=True):
        both = sorted({s.name for s in train.sources} & {s.name for s in test.sources})
        if both:
            raise ConfigError(
                f"{train.dataset}: {some_of(both)} in both {train.split} and {test.split}; "
                "mend the lists"
            )


def _mark_shared_files(sets: Sequence[SourceSet]) -> list[SourceSet]:
    """Reject sources for which one file was found, though the lists name several videos.

    That happens where the same file name is in two classes and the folder has no class folders.
    """
    names: defaultdict[Path, set[str]] = defaultdict(set)
    for source in (s for each in sets for s in each.present):
        if source.path is not None:
            names[source.path].add(source.name)

    def marked(source: Source) -> Source:
        if source.path is None or len(names[source.path]) == 1:
            return source
        others = sorted(names[source.path] - {source.name})
        detail = f"{source.path.name} is also what the lists call {some_of(others)}"
        return replace(source, fault=(FaultKind.CONFLICT, detail))

    return [replace(s, sources=tuple(map(marked, s.sources))) for s in sets]


def _note_unlisted(
    sets: Sequence[SourceSet], on_disk: Iterable[str], listed: set[str], videos: Path
) -> list[SourceSet]:
    unlisted = sorted(set(on_disk) - listed)
    if not unlisted:
        return list(sets)
    note = f"{len(unlisted)} files in {videos} are in no list: {some_of(unlisted)}"
    return [replace(s, notes=(*s.notes, note)) for s in sets]


def _numbers(split: str) -> tuple[str, ...]:
    return ("1", "2", "3") if split == "all" else (split,)


def find_ucf101(videos: Path, splits: Path, split: str) -> list[SourceSet]:
    """Read UCF101's official lists.

    Args:
        videos: Folder of `<class>/v_*.avi`, or of the files without class folders.
        splits: Folder of `classInd.txt`, `trainlist0N.txt` and `testlist0N.txt`.
        split: `1`, `2`, `3` or `all`.

    Returns:
        For each split the training set and the test set, `train0N` and `test0N`.

    Raises:
        ConfigError: A folder or list is missing, a list contradicts the class list or itself, or
            none of its videos is on disk.
    """
    require_folder(videos, "--videos")
    require_folder(splits, "--splits")
    labels: dict[str, int] = {}
    index_path = splits / "classInd.txt"
    for line in read_lines(index_path):
        number, _, name = line.partition(" ")
        if not number.isdigit() or not name.strip():
            raise ConfigError(f"{index_path}: {line!r} is not a number and a class name")
        labels[name.strip()] = int(number) - 1
    if sorted(labels.values()) != list(range(len(labels))):
        raise ConfigError(f"{index_path}: the class numbers are not 1 to {len(labels)}")
    classes = sorted(labels, key=labels.__getitem__)

    on_disk = _on_disk(videos)
    listed: set[str] = set()
    sets = []
    for number in _numbers(split):
        for part in ("train", "test"):
            path = splits / f"{part}list0{number}.txt"
            sources = []
            for line in read_lines(path):
                name, _, given = line.partition(" ")
                class_name = name.partition("/")[0]
                if class_name not in labels:
                    raise ConfigError(f"{path}: class {class_name!r} is not in {index_path.name}")
                if given and given.strip() != str(labels[class_name] + 1):
                    raise ConfigError(
                        f"{path}: {name} has label {given.strip()}, "
                        f"{index_path.name} says {labels[class_name] + 1}"
                    )
                place = _place(name, on_disk)
                listed.add(place)
                sources.append(source_at(name, on_disk.get(place), labels[class_name]))
            sets.append(make_set("ucf101", f"{part}0{number}", classes, sources))
    _check_any_present(sets, videos)
    _check_disjoint(sets)
    sets = _mark_shared_files(sets)
    return _note_unlisted(sets, on_disk, listed, videos) if split == "all" else sets


def find_hmdb51(videos: Path, splits: Path, split: str) -> list[SourceSet]:
    """Read HMDB51's official lists.

    Args:
        videos: Folder of `<class>/*.avi`, or of the files without class folders.
        splits: Folder of `<class>_test_split{1,2,3}.txt`; in them 1 is training, 2 is test and 0 is
            not used in this split. The classes are those that have lists, in alphabetical order.
        split: `1`, `2`, `3` or `all`.

    Returns:
        For each split the training set and the test set, `train0N` and `test0N`.

    Raises:
        ConfigError: A folder or list is missing, a line is not one of theirs, a list contradicts
            itself, or none of its videos is on disk.
    """
    require_folder(videos, "--videos")
    require_folder(splits, "--splits")
    suffix = re.compile(r"(.+)_test_split[123]\.txt")
    found = (suffix.fullmatch(p.name) for p in splits.iterdir())
    classes = sorted({match[1] for match in found if match})
    if not classes:
        raise ConfigError(
            f"{splits} holds no <class>_test_split1.txt; --splits is the folder of HMDB51's lists"
        )
    on_disk = _on_disk(videos)
    listed: set[str] = set()
    sets = []
    for number in _numbers(split):
        parts: dict[str, list[Source]] = {"1": [], "2": []}
        for label, class_name in enumerate(classes):
            path = splits / f"{class_name}_test_split{number}.txt"
            seen: set[str] = set()
            for line in read_lines(path):
                file_name, _, code = line.rpartition(" ")
                file_name = file_name.strip()
                if not file_name or code not in ("0", "1", "2"):
                    raise ConfigError(f"{path}: {line!r} is not a file name and 0, 1 or 2")
                if file_name in seen:
                    raise ConfigError(f"{path} lists {file_name} twice; remove one line")
                seen.add(file_name)
                name = f"{class_name}/{file_name}"
                place = _place(name, on_disk)
                listed.add(place)
                if code in parts:
                    parts[code].append(source_at(name, on_disk.get(place), label))
        for part, code in (("train", "1"), ("test", "2")):
            sets.append(make_set("hmdb51", f"{part}0{number}", classes, parts[code]))
    _check_any_present(sets, videos)
    return _note_unlisted(_mark_shared_files(sets), on_disk, listed, videos)


@dataclass(frozen=True)
class _Clip:
    """A line of a Kinetics list."""

    label: str | None
    youtube_id: str
    start_s: int
    end_s: int

    @property
    def stem(self) -> str:
        return f"{self.youtube_id}_{self.start_s:06d}_{self.end_s:06d}"

    @property
    def stems(self) -> tuple[str, str, str]:
        """What the file may be called, the surest name first."""
        return self.stem, f"{self.youtube_id}_{self.start_s}_{self.end_s}", self.youtube_id


def _plain(name: str) -> str:
    """A class name as every spelling of it in folders comes out."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _read_clips(path: Path) -> Iterator[tuple[str, _Clip]]:
    """Splits and clips of one official csv.

    Raises:
        ConfigError: The file is not such a list.
    """
    lines = read_lines(path)
    reader = csv.DictReader(lines)
    missing = {"youtube_id", "time_start", "time_end"} - set(reader.fieldnames or ())
    if missing:
        raise ConfigError(
            f"{path}: no column {' and '.join(sorted(missing))}; give the official csv, whose "
            "first line is label,youtube_id,time_start,time_end,split"
        )
    by_name = re.sub(r"[^a-z]+", " ", path.stem.lower()).split()
    default = next((_SPLIT_NAMES[w] for w in by_name if w in _SPLIT_NAMES), None)
    for number, row in enumerate(reader, start=2):
        try:
            given = (row.get("split") or "").strip().lower()
            split = _SPLIT_NAMES.get(given, default) if given else default
            if split is None:
                raise ValueError(f"no split, or an unknown one: {given!r}")
            times = [float(row[c]) for c in ("time_start", "time_end")]
            clip = _Clip(
                label=(row.get("label") or "").strip().strip('"') or None,
                youtube_id=row["youtube_id"].strip(),
                start_s=int(times[0]),
                end_s=int(times[1]),
            )
            if not clip.youtube_id:
                raise ValueError("no youtube_id")
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{path}: line {number} is not a clip ({error})") from error
        yield split, clip


def _kinetics_classes(
    dataset: str, labels: set[str], splits: Path, given: Path | None
) -> list[str]:
    if given is not None:
        classes = read_lines(given, "--classes")
        twice = sorted({c for c in classes if classes.count(c) > 1})
        if twice:
            raise ConfigError(f"{given} names {some_of(twice)} twice; remove one line")
        unknown = sorted(labels - set(classes))
        if unknown:
            raise ConfigError(
                f"{splits}: {len(unknown)} labels are not in {given}: {some_of(unknown)}"
            )
    else:
        classes = sorted(labels)
        expected = KINETICS_CLASSES[dataset]
        if len(classes) != expected:
            raise ConfigError(
                f"the lists in {splits} name {len(classes)} classes, {dataset} has {expected}; so "
                "the labels would not be those of the whole set: give all its lists, or a file "
                "with one class name a line by --classes"
            )
    spellings: dict[str, str] = {}
    for name in classes:
        other = spellings.setdefault(_plain(name), name)
        if other != name:
            raise ConfigError(f"classes {other!r} and {name!r} cannot be told apart in folders")
    return classes


def find_kinetics(
    dataset: Kinetics, videos: Path, splits: Path, split: str, classes_file: Path | None = None
) -> list[SourceSet]:
    """Read the official csv files of a Kinetics set and find what there is of it.

    A file is looked for by its name, `<id>_<start:06d>_<end:06d>`, `<id>_<start>_<end>` or `<id>`,
    with any suffix of a video, wherever it is below `videos`. Folders of classes and splits decide
    where several files have one name.

    Args:
        dataset: Which Kinetics.
        videos: Folder of `<split>/<label>/*`, `<label>/*` or of the files alone.
        splits: A csv, or the folder that holds them.
        split: `train`, `val`, `test` or `all`.
        classes_file: The classes, one a line; without it all that the lists name.

    Returns:
        One set for each split that is asked for and listed.

    Raises:
        ConfigError: A folder or list is missing or not one of theirs, the classes are not
            complete, or none of the listed videos is on disk.
    """
    require_folder(videos, "--videos")
    paths = sorted(splits.glob("*.csv")) if splits.is_dir() else [splits]
    if not paths:
        raise ConfigError(f"{splits} holds no csv; --splits is the folder of the official lists")
    by_split: defaultdict[str, list[_Clip]] = defaultdict(list)
    for path in paths:
        for name, clip in _read_clips(path):
            by_split[name].append(clip)
    if split != "all" and split not in by_split:
        raise ConfigError(
            f"the lists in {splits} have no split {split!r}, only {', '.join(sorted(by_split))}"
        )
    labels = {clip.label for clips in by_split.values() for clip in clips} - {None}
    classes = _kinetics_classes(dataset, {c for c in labels if c}, splits, classes_file)
    finder = _KineticsFinder(videos, classes)
    sets = []
    for name in ("train", "val", "test"):
        if name in by_split and split in ("all", name):
            sets.append(finder.find(dataset, name, by_split[name]))
    _check_any_present(sets, videos)
    sets = _mark_shared_files(sets)
    every_stem = {stem for clips in by_split.values() for clip in clips for stem in clip.stems}
    unlisted = sorted(f for stem, fs in finder.stems.items() if stem not in every_stem for f in fs)
    note = f"{len(unlisted)} files in {videos} are in no list: {some_of(unlisted)}"
    notes = (*finder.notes(), *([note] if unlisted else []))
    return [replace(s, notes=(*s.notes, *notes)) for s in sets]


class _KineticsFinder:
    """Finds the file of a clip among those on disk, and remembers what was doubtful."""

    def __init__(self, videos: Path, classes: Sequence[str]) -> None:
        self._on_disk = _on_disk(videos)
        self._labels = {name: label for label, name in enumerate(classes)}
        self._classes = classes
        self._plain_labels = {_plain(name): label for label, name in enumerate(classes)}
        self.stems: defaultdict[str, list[str]] = defaultdict(list)
        """Relative names of files by their name without suffix."""
        self._others: list[str] = []
        self._by_id: list[str] = []
        for name, path in self._on_disk.items():
            if path.suffix.lower() in VIDEO_SUFFIXES:
                self.stems[path.stem].append(name)
            else:
                self._others.append(name)

    def notes(self) -> Iterator[str]:
        """What a person should know."""
        if self._others:
            names = sorted(self._others)
            yield f"{len(names)} files are not videos by their names: {some_of(names)}"
        if self._by_id:
            yield (
                f"{len(self._by_id)} files have no times in their names and are taken as the clips "
                f"themselves, not the whole videos: {some_of(self._by_id)}"
            )

    def find(self, dataset: str, split: str, clips: Sequence[_Clip]) -> SourceSet:
        """The set of one split."""
        by_name: dict[str, Source] = {}
        same: list[str] = []
        labels: defaultdict[str, set[str | None]] = defaultdict(set)
        for clip in clips:
            labels[clip.stem].add(clip.label)
        for clip in clips:
            name = f"{clip.label}/{clip.stem}.mp4" if clip.label else f"{clip.stem}.mp4"
            if name in by_name:
                same.append(name)
                continue
            source = self._source(clip, name, split)
            if len(labels[clip.stem]) > 1 and source.path is not None:
                told = some_of(sorted(str(x) for x in labels[clip.stem]))
                source = replace(source, fault=(FaultKind.CONFLICT, f"listed as {told}"))
            by_name[name] = source
        notes = []
        if same:
            notes.append(f"{len(same)} lines of {split} say the same twice: {some_of(same)}")
        return make_set(dataset, split, self._classes, by_name.values(), notes)

    def _source(self, clip: _Clip, name: str, split: str) -> Source:
        label = NO_LABEL if clip.label is None else self._labels[clip.label]
        stem = next((s for s in clip.stems if s in self.stems), None)
        if stem is None:
            return Source(name=name, path=None, label=label)
        files = sorted(self.stems[stem])
        fitting = [f for f in files if label == NO_LABEL or self._folder_label(f) in (label, None)]
        if not fitting:
            source = source_at(name, self._on_disk[files[0]], label)
            detail = f"listed as {clip.label!r}, found as {some_of(files)}"
            return replace(source, fault=(FaultKind.CONFLICT, detail))
        # Fewer is surer: first by the class's folder, then by the split's.
        for surer in (
            [f for f in fitting if self._folder_label(f) == label],
            [f for f in fitting if self._folder_split(f) == split],
        ):
            both = [f for f in fitting if f in surer]
            fitting = both or fitting
        source = source_at(name, self._on_disk[fitting[0]], label)
        if len(fitting) > 1:
            detail = f"several files may be it: {some_of(fitting)}"
            return replace(source, fault=(FaultKind.CONFLICT, detail))
        if stem == clip.youtube_id:
            self._by_id.append(fitting[0])
        return source

    def _folder_label(self, file: str) -> int | None:
        """The class whose folder a file is in, if its folder is a class's."""
        parts = file.split("/")
        return self._plain_labels.get(_plain(parts[-2])) if len(parts) > 1 else None

    def _folder_split(self, file: str) -> str | None:
        # A class may be called after a split: Kinetics has "training dog".
        folders = [f for f in file.split("/")[:-1] if _plain(f) not in self._plain_labels]
        words = (w for folder in folders for w in re.split(r"[^a-z]+", folder.lower()))
        return next((_SPLIT_NAMES[w] for w in words if w in _SPLIT_NAMES), None)
