"""Sources and sets of them; sets from plain folders of videos; duplicates."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from strata.counter_random import Stream, permutation
from strata.errors import ConfigError, FaultKind
from strata.files import sha256_of
from strata.format.schema import NO_LABEL
from strata.preprocess.datasets.listing import (
    VIDEO_SUFFIXES,
    FoundFile,
    Listing,
    are_same_bytes,
    is_video_name,
    list_files,
    name_of,
    some_of,
)
from strata.transfer import as_url
from strata.untrusted import checked_text

__all__ = [
    "Source",
    "SourceSet",
    "find_folder",
    "make_set",
    "mark_duplicates",
    "sample_key",
    "source_at",
]

_KEY_HEAD_CHARS = 60
"""The readable part of a key; with the hash and the longest extension it fits ustar's 100 bytes."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video that a list or a folder names."""

    name: str
    """With forward slashes; as the official list spells it, else relative to the videos' folder."""
    path: Path | None
    """The file, or None if it is not on disk."""
    file: str = ""
    """The file's name on the disk, relative to the videos' folder; empty if it is `name`."""
    label: int = NO_LABEL
    """Index into the set's classes, or -1."""
    num_bytes: int = 0
    """Size of the file."""
    stamp: str = ""
    """Size and time of change, to see whether it changes."""
    fault: tuple[FaultKind, str] | None = None
    """Reason and detail of a rejection before decoding; None if it is not rejected."""


@dataclass(frozen=True, kw_only=True)
class SourceSet:
    """All sources of one split, which becomes one shard folder."""

    dataset: str
    split: str
    """Also the name of the shard folder."""
    classes: tuple[str, ...]
    """Class names by label; empty for videos without labels."""
    sources: tuple[Source, ...]
    """In the order of their names."""
    notes: tuple[str, ...] = ()
    """Remarks for the user: duplicates, skipped files."""

    @property
    def present(self) -> tuple[Source, ...]:
        """The sources that are on disk."""
        return tuple(s for s in self.sources if s.path is not None)


def sample_key(name: str) -> str:
    """The key of a source in its shard: stable, unique, without dots or spaces.

    A readable head and a hash of the full name: the head alone may be cut or ambiguous.
    """
    head = re.sub(r"[^A-Za-z0-9]+", "_", os.path.splitext(name)[0]).strip("_")
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{head[-_KEY_HEAD_CHARS:]}-{digest[:10]}"


def make_set(
    dataset: str,
    split: str,
    classes: Sequence[str],
    sources: Iterable[Source],
    notes: Sequence[str] = (),
) -> SourceSet:
    """Put sources in the order of their names, and tell of classes that are not on the disk.

    Raises:
        ConfigError: A name is there twice, or a class has a name that no reader would take.
    """
    for name in classes:
        checked_text(name, "class", f"{dataset} {split}", ConfigError)
    ordered = sorted(sources, key=lambda s: s.name)
    for first, second in pairwise(ordered):
        if first.name == second.name:
            raise ConfigError(
                f"{dataset} {split} lists {first.name} twice; remove one line from the lists"
            )
    found = {s.label for s in ordered if s.path is not None}
    lost = [classes[k] for k in sorted({s.label for s in ordered} - found - {NO_LABEL})]
    if lost and found:
        told = f"{len(lost)} classes have no video on the disk: {some_of(lost)}"
        notes = [*notes, told]
    return SourceSet(
        dataset=dataset,
        split=split,
        classes=tuple(classes),
        sources=tuple(ordered),
        notes=tuple(notes),
    )


def source_at(name: str, found: FoundFile | None, label: int) -> Source:
    """A source with the size of its file, if there is one.

    Raises:
        ConfigError: The file exists and cannot be read.
    """
    if found is None:
        return Source(name=name, path=None, label=label)
    if found.stamp:
        return Source(
            name=name,
            path=found.path,
            file=found.name,
            label=label,
            num_bytes=found.num_bytes,
            stamp=found.stamp,
        )
    try:
        status = found.path.stat()
        if not os.access(found.path, os.R_OK, effective_ids=True):
            raise PermissionError("no permission to read it")
    except FileNotFoundError:  # A link without a target counts as a missing file.
        return Source(name=name, path=None, label=label)
    except OSError as error:
        raise ConfigError(
            f"video {found.path} cannot be read ({error.strerror or error}); give permission, or "
            "move it away"
        ) from error
    return Source(
        name=name,
        path=found.path,
        file=found.name,
        label=label,
        num_bytes=status.st_size,
        stamp=f"{status.st_size}:{status.st_mtime_ns}",
    )


_SPLIT_WORDS: tuple[str, ...] = tuple(
    "train training val valid validate validation test testing eval holdout".split()
)
"""Names of folders that divide a set, in the order in which the sets are made."""
_FILLER_WORDS = frozenset("set data split video videos clip clips".split())


def _split_word(folder: str) -> str | None:
    """The split that a folder's name means: `train`, `val_256`, `Test set`."""
    words = [w for w in re.split(r"[\W\d_]+", folder.lower()) if w and w not in _FILLER_WORDS]
    return words[0] if len(words) == 1 and words[0] in _SPLIT_WORDS else None


def _split_level(files: Sequence[FoundFile], places: str) -> int | None:
    """At which depth all videos are in folders of splits, from 0; None if they are not.

    Raises:
        ConfigError: Some folders of one depth are splits and others are not.
    """
    divided = 0
    for level in range(min(len(f.folders) for f in files)):
        names = sorted({f.folders[level] for f in files})
        splits = [n for n in names if _split_word(n)]
        if len(splits) == len(names):
            return level
        if len({_split_word(n) for n in splits}) > 1:
            others = [n for n in names if n not in splits]
            raise ConfigError(
                f"{places} holds folders of splits ({some_of(splits)}) beside others "
                f"({some_of(others)}); if they are splits, move the others away, and if they are "
                "classes, give them other names"
            )
        divided += len(names) > 1
        if divided == 2:  # Class folders, with other folders below them.
            return None
    return None


def find_folder(
    videos: Sequence[Path], *, test_fraction: float = 0.0, seed: int = 0
) -> list[SourceSet]:
    """Take folders of videos: one subfolder a class, or no subfolders and no labels.

    Where all videos are below folders of splits (`train`, `val`, ...), above the class folders or
    in them, each split becomes a set, and all have the same classes.

    Args:
        videos: The folders; class folders of one name are one class.
        test_fraction: Share of each class, in [0, 1), that goes to a test set of its own.
        seed: Decides which videos those are.

    Returns:
        The set `train`, and `test` where a share is asked for; or a set for each split.

    Raises:
        ConfigError: A folder is missing or cannot be read, holds no video, or holds videos beside
            class folders; or a share is asked for where there are splits.
    """
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"--test-fraction is {test_fraction}; use a share from 0 to below 1")
    words = {_split_word(name_of(folder.resolve().name)) for folder in videos}
    if len(words) > 1 and None not in words:
        raise ConfigError(
            f"{' and '.join(map(str, videos))} are splits, and would become one set; give the "
            "folder above them as --videos, which makes a set of each, or one of them alone"
        )
    listing = list_files(videos)
    files = [f for f in listing.files if is_video_name(f.name)]
    if not files:
        raise ConfigError(
            f"no videos in {listing.places}, {len(listing.files)} other files"
            + (f" ({some_of([f.name for f in listing.files])})" if listing.files else "")
            + f"; correct --videos (videos end in {' '.join(sorted(VIDEO_SUFFIXES))})"
        )
    level = _split_level(files, listing.places)
    if level is not None and test_fraction:
        splits = sorted({f.folders[level] for f in files})
        raise ConfigError(
            f"{listing.places} is divided into {some_of(splits)} already; leave out "
            "--test-fraction (or set test_fraction: 0)"
        )
    home = _homes(files, level)
    classes = _classes(listing, files, home)
    labels = {name: label for label, name in enumerate(classes)}
    sources, twice = _sources(files, labels, home)
    notes = [*listing.notes, *twice, *_doubts(listing, files, classes, level)]
    if level is None:
        every = mark_duplicates(
            make_set("folder", "train", classes, [s for _, s in sources], notes)
        )
        return _divided(every, test_fraction, seed) if test_fraction else [every]
    by_split: defaultdict[str, list[Source]] = defaultdict(list)
    for split, source in sources:
        by_split[split].append(source)
    notes += _note_shared([(split, s) for split, each in by_split.items() for s in each])
    for split, each in by_split.items():
        lacking = [c for c in classes if labels[c] not in {s.label for s in each}]
        if lacking:
            notes.append(f"{len(lacking)} classes have no video in {split}: {some_of(lacking)}")
    order = sorted(by_split, key=lambda n: (_SPLIT_WORDS.index(_split_word(n) or ""), n))
    return [
        mark_duplicates(make_set("folder", split, classes, by_split[split], notes))
        for split in order
    ]


def _homes(files: Sequence[FoundFile], level: int | None) -> dict[Path, tuple[str, str]]:
    """The folders of split and class that each video is in; empty where there is none."""
    if level is None:
        return {f.path: ("", f.folders[0] if f.folders else "") for f in files}
    # Class folders are above the splits if there are several above them, else below.
    if level and len({f.folders[level - 1] for f in files}) > 1:
        return {f.path: (f.folders[level], f.folders[level - 1]) for f in files}
    return {f.path: (f.folders[level], "".join(f.folders[level + 1 : level + 2])) for f in files}


def _classes(
    listing: Listing, files: Sequence[FoundFile], home: dict[Path, tuple[str, str]]
) -> list[str]:
    classes = {name for _, name in home.values()}
    if "" in classes and len(classes) > 1:
        beside = sorted(f.name for f in files if not home[f.path][1])
        raise ConfigError(
            f"{listing.places} holds both class folders and videos beside them "
            f"({some_of(beside)}); move those into a class folder, or give a folder of videos alone"
        )
    for link, other in listing.again:
        if "/" not in link + other and other not in ("", link):
            raise ConfigError(
                f"{link} and {other} in {listing.places} are one folder under two names; remove "
                "the link"
            )
    return sorted(classes - {""})


def _doubts(
    listing: Listing, files: Sequence[FoundFile], classes: Sequence[str], level: int | None
) -> list[str]:
    """Notes on unusual class folders."""
    notes = []
    if level is not None:
        splits = sorted({f.folders[level] for f in files})
        notes.append(f"the folders {some_of(splits, 9)} are taken as splits, each a set of its own")
    used = {"/".join(f.folders[:k]) for f in files for k in range(1, len(f.folders) + 1)}
    empty = sorted(set(listing.folders) - used)
    if empty:
        notes.append(f"{len(empty)} folders hold no video and are no classes: {some_of(empty)}")
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        spellings[" ".join(re.split(r"[\W_]+", name.casefold()))].append(name)
    alike = [" / ".join(names) for names in spellings.values() if len(names) > 1]
    if alike:
        notes.append(f"classes differ in spelling alone, and are kept apart: {some_of(alike)}")
    inside = {f.folders[1] for f in files if len(f.folders) > 1}
    if level is None and len(classes) == 1 and len(inside) > 1:
        notes.append(
            f"all videos are of one class, {some_of(classes)}; if its {len(inside)} folders are "
            f"the classes, give --videos {listing.roots[0] / files[0].path.parent.parent.name}"
        )
    return notes


def _sources(
    files: Sequence[FoundFile], labels: dict[str, int], home: dict[Path, tuple[str, str]]
) -> tuple[list[tuple[str, Source]], list[str]]:
    """Each video with its split; of those with one name in several folders one, or a conflict."""
    by_name: defaultdict[str, list[FoundFile]] = defaultdict(list)
    for file in files:
        by_name[file.name].append(file)
    sources, twice = [], []
    for name, group in by_name.items():
        split, class_name = home[group[0].path]
        source = source_at(name, group[0], labels.get(class_name, NO_LABEL))
        if len(group) > 1:
            if are_same_bytes(group):
                twice.append(name)
            else:
                paths = " and ".join(str(f.path) for f in group)
                source = replace(source, fault=(FaultKind.CONFLICT, f"{paths} differ"))
        sources.append((split, source))
    if not twice:
        return sources, []
    note = f"{len(twice)} videos are in several folders with the same bytes, and kept once: "
    return sources, [note + some_of(twice)]


def _divided(every: SourceSet, test_fraction: float, seed: int) -> list[SourceSet]:
    """A training set and a test set, with a share of each class."""
    test_names: set[str] = set()
    by_label: defaultdict[int, list[str]] = defaultdict(list)
    for source in every.sources:
        if source.fault is None:
            by_label[source.label].append(source.name)
    for label, members in by_label.items():
        # A class with two videos or more is in both sets.
        count = min(max(round(test_fraction * len(members)), 1), len(members) - 1)
        order = permutation(seed, Stream.TEST_SPLIT, label + 1, len(members), view=1)
        test_names.update(members[k] for k in order[:count].tolist())
    train = tuple(s for s in every.sources if s.name not in test_names)
    test = tuple(s for s in every.sources if s.name in test_names)
    return [
        replace(every, sources=train),
        replace(every, split="test", sources=test, notes=()),
    ]


def _same_bytes(sources: Iterable[Source]) -> list[list[Source]]:
    """Groups of sources whose files are equal, reading only those of equal size."""
    present = [s for s in sources if s.path is not None and s.num_bytes]
    by_size = Counter(s.num_bytes for s in present)
    groups: defaultdict[str, list[Source]] = defaultdict(list)
    for source in present:
        if source.path is not None and by_size[source.num_bytes] > 1:
            try:
                # A store reports the hash of the content.
                remote = as_url(source.path) is not None
                groups[source.stamp if remote else sha256_of(source.path)].append(source)
            except OSError:
                continue  # The worker will reject it with the right reason.
    return [group for group in groups.values() if len(group) > 1]


def _note_shared(sources: Sequence[tuple[str, Source]]) -> list[str]:
    """Note videos that are in two splits: results on the test set would be too good."""
    split_of = {s.name: split for split, s in sources}
    shared = [
        " = ".join(s.name for s in group)
        for group in _same_bytes(s for _, s in sources)
        if len({split_of[s.name] for s in group}) > 1
    ]
    if not shared:
        return []
    return [f"{len(shared)} videos are in several splits, and kept: {some_of(shared)}"]


def mark_duplicates(source_set: SourceSet, *, reject: bool = True) -> SourceSet:
    """Find files that are equal byte for byte, reading only those of equal size.

    Of equal files with one label the first by name is kept. Where the labels differ, it is unknown
    which is right, so all are rejected.

    Args:
        source_set: The set.
        reject: Whether duplicates are rejected; else they are only noted, as the
            official lists must be kept.

    Returns:
        The set with faults and notes added.
    """
    faults: dict[str, tuple[FaultKind, str]] = {}
    notes = []
    for group in _same_bytes(source_set.sources):
        conflict = len({s.label for s in group}) > 1
        told = "with differing labels" if conflict else "kept once" if reject else "kept"
        notes.append(f"the same video, {told}: {some_of([s.name for s in group], 5)}")
        if not reject:
            continue
        for source in group if conflict else group[1:]:
            other = next(s for s in group if s is not source)
            detail = f"the same bytes as {other.name}"
            if conflict:
                detail += ", and the labels differ"
            faults[source.name] = (FaultKind.DUPLICATE, detail)
    return replace(
        source_set,
        sources=tuple(replace(s, fault=faults.get(s.name, s.fault)) for s in source_set.sources),
        notes=(*source_set.notes, *notes),
    )
