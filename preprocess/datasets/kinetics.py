"""Read the official lists of Kinetics and find their clips on disk."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from strata.errors import ConfigError, FaultKind
from strata.format.schema import NO_LABEL
from strata.preprocess.datasets.folder import Source, SourceSet, make_set, source_at
from strata.preprocess.datasets.listing import (
    FoundFile,
    Listing,
    are_same_bytes,
    is_video_name,
    list_files,
    name_of,
    paths_in,
    read_lines,
    some_of,
)
from strata.preprocess.datasets.matching import check_any_present, plain, stem_of

__all__ = ["KINETICS_CLASSES", "Kinetics", "find_kinetics"]

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


_REPLACEMENT = re.compile(r"(^|[^a-z])replacements?([^a-z]|$)", re.IGNORECASE)
"""The folder of clips that stand for corrupt ones, `replacement_for_corrupted_k400` and so on."""

_LOOKED_FOR = "as <id>_<start>_<end> or <id>, with any extension of a video, at any depth"


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
        """Possible names of the file, the most specific first."""
        return self.stem, f"{self.youtube_id}_{self.start_s}_{self.end_s}", self.youtube_id


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
                "the labels would not be those of the complete set: give all its lists, or a file "
                "with one class name a line by --classes"
            )
    spellings: dict[str, str] = {}
    for name in classes:
        other = spellings.setdefault(plain(name), name)
        if other != name:
            raise ConfigError(f"classes {other!r} and {name!r} cannot be distinguished in folders")
    return classes


def find_kinetics(
    dataset: Kinetics,
    videos: Sequence[Path],
    splits: Path,
    split: str,
    classes_file: Path | None = None,
) -> list[SourceSet]:
    """Read the official csv files of a Kinetics set and find its clips.

    A file is looked for by its name, `<id>_<start:06d>_<end:06d>`, `<id>_<start>_<end>` or `<id>`,
    with any extension of a video, wherever it is below `videos`. Where several files have one name,
    one in a folder `replacement` goes before the others, then folders of classes and splits decide;
    of equal files the first is taken, and files that differ are a conflict.

    Args:
        dataset: Which Kinetics.
        videos: Folders of `<split>/<label>/*`, `<label>/*` or of the files alone.
        splits: A csv, or the folder that holds them.
        split: `train`, `val`, `test` or `all`.
        classes_file: The classes, one a line; without it all that the lists name.

    Returns:
        One set for each split that is asked for and listed.

    Raises:
        ConfigError: A folder or list is missing or not one of theirs, the classes are not
            complete, or none of the listed videos is on disk.
    """
    paths = [splits]
    if splits.is_dir():
        paths = [p for p in paths_in(splits) if p.suffix.lower() == ".csv"]
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
    listing = list_files(videos)
    finder = _KineticsFinder(listing, classes)
    sets = []
    for name in ("train", "val", "test"):
        if name in by_split and split in ("all", name):
            sets.append(finder.find(dataset, name, by_split[name]))
    check_any_present(sets, listing, _LOOKED_FOR)
    sets = _mark_shared_files(sets)
    every_stem = {stem for clips in by_split.values() for clip in clips for stem in clip.stems}
    unlisted = sorted(
        f.name for stem, fs in finder.stems.items() if stem not in every_stem for f in fs
    )
    note = f"{len(unlisted)} files in {listing.places} are in no list: {some_of(unlisted)}"
    notes = (*finder.notes(), *([note] if unlisted else []), *listing.notes)
    return [replace(s, notes=(*s.notes, *notes)) for s in sets]


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


def _with_root(file: FoundFile) -> tuple[str, ...]:
    """The names of the folders above a file, with the one that the user gave."""
    return (name_of(file.path.parents[len(file.folders)].name), *file.folders)


class _KineticsFinder:
    """Finds the file of a clip among those on disk, and collects notes on ambiguous ones."""

    def __init__(self, listing: Listing, classes: Sequence[str]) -> None:
        self._labels = {name: label for label, name in enumerate(classes)}
        self._classes = classes
        self._plain_labels = {plain(name): label for label, name in enumerate(classes)}
        self.stems: defaultdict[str, list[FoundFile]] = defaultdict(list)
        """Videos by their name without extension; the identifiers of YouTube heed case."""
        for file in sorted(listing.files, key=lambda f: f.name):
            if is_video_name(file.name):
                self.stems[stem_of(file.name)].append(file)
        self._by_id: list[str] = []
        self._replaced: list[str] = []
        self._same: list[str] = []

    def notes(self) -> Iterator[str]:
        """Notes for the user."""
        for what, names in (
            (
                "files have no times in their names and are taken as the clips themselves, not the "
                "videos that they are from",
                self._by_id,
            ),
            ("clips are taken from a replacement folder instead of another", self._replaced),
            ("clips are there several times with the same bytes, the first is taken", self._same),
        ):
            if names:
                yield f"{len(names)} {what}: {some_of(names)}"

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
        files = [f for stem in clip.stems for f in self.stems.get(stem, ())]
        if not files:
            return Source(name=name, path=None, label=label)
        fitting = [f for f in files if label == NO_LABEL or self._folder_label(f) in (label, None)]
        if not fitting:
            source = source_at(name, files[0], label)
            detail = f"listed as {clip.label!r}, found as {some_of([f.name for f in files])}"
            return replace(source, fault=(FaultKind.CONFLICT, detail))
        replacements = [f for f in fitting if self._is_replacement(f)]
        if replacements and len(replacements) < len(fitting):
            other = next(f for f in fitting if f not in replacements)
            self._replaced.append(f"{replacements[0].name}, not {other.name}")
            fitting = replacements
        # Narrow the choice by name, then by the class's folder, then by the split's.
        best = min(clip.stems.index(stem_of(f.name)) for f in fitting)
        for preferred in (
            [f for f in fitting if stem_of(f.name) == clip.stems[best]],
            [f for f in fitting if self._folder_label(f) == label],
            [f for f in fitting if self._folder_split(f) == split],
        ):
            both = [f for f in fitting if f in preferred]
            fitting = both or fitting
        source = source_at(name, fitting[0], label)
        if len(fitting) > 1:
            if not are_same_bytes(fitting):
                detail = f"several files may be it: {some_of([str(f.path) for f in fitting])}"
                return replace(source, fault=(FaultKind.CONFLICT, detail))
            self._same.append(fitting[0].name)
        if stem_of(fitting[0].name) == clip.youtube_id:
            self._by_id.append(fitting[0].name)
        return source

    def _folder_label(self, file: FoundFile) -> int | None:
        """The class whose folder a file is in, if its folder is a class's."""
        return self._plain_labels.get(plain(file.folders[-1])) if file.folders else None

    def _folder_split(self, file: FoundFile) -> str | None:
        # A class may be called after a split: Kinetics has "training dog".
        folders = [f for f in _with_root(file) if plain(f) not in self._plain_labels]
        words = (w for folder in folders for w in re.split(r"[^a-z]+", folder.lower()))
        return next((_SPLIT_NAMES[w] for w in words if w in _SPLIT_NAMES), None)

    def _is_replacement(self, file: FoundFile) -> bool:
        return any(
            _REPLACEMENT.search(f) and plain(f) not in self._plain_labels for f in _with_root(file)
        )
