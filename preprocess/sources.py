"""What a source is; plain folders of videos; the same video twice."""

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
from strata.schema import NO_LABEL

__all__ = [
    "VIDEO_SUFFIXES",
    "Source",
    "SourceSet",
    "files_below",
    "find_folder",
    "make_set",
    "mark_duplicates",
    "read_lines",
    "require_folder",
    "sample_key",
    "some_of",
    "source_at",
]

VIDEO_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "3gp asf avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts vob webm wmv".split()
    )
)
"""What counts as a video in a plain folder; official lists name their files themselves."""

_KEY_HEAD_CHARS = 60
"""The readable part of a key; with the hash and the longest extension it fits ustar's 100 bytes."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video that a list or a folder names."""

    name: str
    """Relative to the videos' folder, with forward slashes; as the official list spells it."""
    path: Path | None
    """The file, or None if it is not on disk."""
    label: int = NO_LABEL
    """Index into the set's classes, or -1."""
    num_bytes: int = 0
    """Size of the file."""
    fault: tuple[FaultKind, str] | None = None
    """Why it is rejected before anything is decoded: the reason and the detail."""


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
    """What a person should know: duplicates, skipped files."""

    @property
    def present(self) -> tuple[Source, ...]:
        """The sources that are on disk."""
        return tuple(s for s in self.sources if s.path is not None)


def sample_key(name: str) -> str:
    """The key of a source in its shard: stable, unique, without dots or spaces.

    A readable head and a hash of the whole name: the head alone may be cut or ambiguous.
    """
    head = re.sub(r"[^A-Za-z0-9]+", "_", os.path.splitext(name)[0]).strip("_")
    return f"{head[-_KEY_HEAD_CHARS:]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def require_folder(folder: Path, option: str) -> None:
    """See that a folder is there.

    Raises:
        ConfigError: It is not.
    """
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} does not exist; mend {option}")


def make_set(
    dataset: str,
    split: str,
    classes: Sequence[str],
    sources: Iterable[Source],
    notes: Sequence[str] = (),
) -> SourceSet:
    """Put sources in the order of their names.

    Raises:
        ConfigError: A name is there twice.
    """
    ordered = sorted(sources, key=lambda s: s.name)
    for first, second in pairwise(ordered):
        if first.name == second.name:
            raise ConfigError(
                f"{dataset} {split} lists {first.name} twice; remove one line from the lists"
            )
    return SourceSet(
        dataset=dataset,
        split=split,
        classes=tuple(classes),
        sources=tuple(ordered),
        notes=tuple(notes),
    )


def read_lines(path: Path, option: str = "--splits") -> list[str]:
    """Non-empty lines of an official list, whatever its line ends.

    Raises:
        ConfigError: The file is missing or not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the list {path} ({error}); mend {option}") from error
    return [line.strip() for line in lines if line.strip()]


def files_below(folder: Path) -> list[Path]:
    """All files but hidden ones, in no particular order."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found.extend(Path(parent, n) for n in names if not n.startswith("."))
    return found


def source_at(name: str, path: Path | None, label: int) -> Source:
    """A source with the size of its file, if there is one."""
    if path is None:
        return Source(name=name, path=None, label=label)
    try:
        num_bytes = path.stat().st_size
    except OSError:  # A link to nowhere: as good as not there.
        return Source(name=name, path=None, label=label)
    return Source(name=name, path=path, label=label, num_bytes=num_bytes)


def some_of(names: Sequence[str], count: int = 3) -> str:
    """The first names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def find_folder(videos: Path, *, test_fraction: float = 0.0, seed: int = 0) -> list[SourceSet]:
    """Take a folder of videos: one subfolder a class, or no subfolders and no labels.

    Args:
        videos: The folder.
        test_fraction: Share of each class, in [0, 1), that goes to a test set of its own.
        seed: Decides which videos those are.

    Returns:
        The set `train`, and `test` where a share is asked for.

    Raises:
        ConfigError: The folder is missing, holds no video, or holds videos beside class folders.
    """
    require_folder(videos, "--videos")
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"--test-fraction is {test_fraction}; use a share from 0 to below 1")
    sources: list[Source] = []
    others: list[str] = []
    names: set[str] = set()
    for path in files_below(videos):
        relative = path.relative_to(videos)
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            others.append(relative.as_posix())
            continue
        names.add(relative.parts[0] if len(relative.parts) > 1 else "")
        sources.append(source_at(relative.as_posix(), path, NO_LABEL))
    if not sources:
        raise ConfigError(f"no videos in {videos}; mend --videos")
    if "" in names and len(names) > 1:
        beside = sorted(s.name for s in sources if "/" not in s.name)
        raise ConfigError(
            f"{videos} holds both class folders and videos beside them ({some_of(beside)}); "
            "move those into a class folder, or give a folder of videos alone"
        )
    classes = sorted(names - {""})
    if classes:
        labels = {name: label for label, name in enumerate(classes)}
        sources = [replace(s, label=labels[s.name.partition("/")[0]]) for s in sources]
    notes = []
    if others:
        notes.append(
            f"{len(others)} files are not videos by their names: {some_of(sorted(others))}"
        )
    whole = mark_duplicates(make_set("folder", "train", classes, sources, notes))
    if not test_fraction:
        return [whole]

    test_names: set[str] = set()
    by_label: defaultdict[int, list[str]] = defaultdict(list)
    for source in whole.sources:
        if source.fault is None:
            by_label[source.label].append(source.name)
    for label, members in by_label.items():
        # A class with two videos or more is in both sets.
        count = min(max(round(test_fraction * len(members)), 1), len(members) - 1)
        order = permutation(seed, Stream.SHUFFLE, label + 1, len(members), view=1)
        test_names.update(members[k] for k in order[:count].tolist())
    train = tuple(s for s in whole.sources if s.name not in test_names)
    test = tuple(s for s in whole.sources if s.name in test_names)
    return [
        replace(whole, sources=train),
        replace(whole, split="test", sources=test, notes=()),
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mark_duplicates(source_set: SourceSet, *, reject: bool = True) -> SourceSet:
    """Find files that are equal byte for byte, reading only those of equal size.

    Of equal files with one label the first by name is kept. Where the labels differ nobody can say
    which is right, so all are rejected.

    Args:
        source_set: The set.
        reject: Whether duplicates are rejected; else they are only told in the notes, as the
            official lists must be kept.

    Returns:
        The set with faults and notes added.
    """
    by_size = Counter(s.num_bytes for s in source_set.present)
    groups: defaultdict[str, list[Source]] = defaultdict(list)
    for source in source_set.present:
        if source.path is not None and source.num_bytes and by_size[source.num_bytes] > 1:
            try:
                groups[_sha256(source.path)].append(source)
            except OSError:
                continue  # The worker meets it again and gives it its typed reason.
    faults: dict[str, tuple[FaultKind, str]] = {}
    notes = []
    for group in groups.values():
        if len(group) < 2:
            continue
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
