"""Find the files of the videos that an official list names.

Users re-encode, rename and move files. So a listed `<class>/<name>.avi` is found under any
extension of a video, in any case, with other characters for what is neither letter nor digit, and
at any depth below a folder of its class or below no class's folder. The file that fits best is
taken; names that differ from the list are counted and reported.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from strata.errors import ConfigError, FaultKind
from strata.preprocess.datasets.findings import archives_of
from strata.preprocess.datasets.folder import Source, SourceSet, source_at
from strata.preprocess.datasets.listing import (
    VIDEO_SUFFIXES,
    FoundFile,
    Listing,
    are_same_bytes,
    is_video_name,
    some_of,
)

__all__ = ["Finder", "check_any_present", "plain", "stem_of"]

_SPELLINGS = (
    "as listed",
    "in another case or Unicode form",
    "with other characters for what is neither letter nor digit",
)


def plain(name: str) -> str:
    """A name as every spelling of it comes out: case, spaces and punctuation do not count."""
    return re.sub(r"[\W_]+", "_", _folded(name)).strip("_")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def stem_of(name: str) -> str:
    """The last part of a path without the extensions of videos: `a.avi.mp4` gives `a`."""
    stem = PurePosixPath(name).name
    while PurePosixPath(stem).suffix.lower() in VIDEO_SUFFIXES:
        stem = PurePosixPath(stem).stem
    return stem


@dataclass(frozen=True)
class _Match:
    file: FoundFile
    fit: tuple[int, ...]
    """Lower is better: spelling, folder of the class, extension, depth."""


class Finder:
    """Finds the files of listed videos, `<class>/<file>`, and notes which differ from the list.

    Args:
        listing: What is on the disk.
        classes: Class names; a folder of such a name, in any spelling, holds that class alone.
        names: All names that the lists have.
    """

    def __init__(self, listing: Listing, classes: Iterable[str], names: Iterable[str]) -> None:
        self._listing = listing
        self._classes = {plain(c) for c in classes}
        self._by_stem: defaultdict[str, list[FoundFile]] = defaultdict(list)
        for file in listing.files:
            self._by_stem[plain(stem_of(file.name))].append(file)
        self._elsewhere: dict[str, str] = {}
        self._fits = {name: self._fitting(name) for name in names}
        self._found: dict[str, tuple[_Match, tuple[FaultKind, str] | None]] = {}
        self._spare: dict[str, str] = {}
        self._same: dict[str, str] = {}
        self._choose()

    def _fitting(self, name: str) -> list[_Match]:
        """All files that may be it, the best first."""
        class_name, _, file_name = name.partition("/")
        found = []
        for file in self._by_stem.get(plain(stem_of(file_name)), []):
            home = next((f for f in reversed(file.folders) if plain(f) in self._classes), None)
            if home is not None and plain(home) != plain(class_name):
                self._elsewhere[name] = file.name
                continue
            stems = stem_of(file.name), stem_of(file_name)
            spelling = 0 if stems[0] == stems[1] else 2 - (_folded(stems[0]) == _folded(stems[1]))
            folder = 2 if home is None else int(home != class_name)
            suffixes = PurePosixPath(file.name).suffix, PurePosixPath(file_name).suffix
            extension = (
                0
                if suffixes[0] == suffixes[1]
                else 1 + (suffixes[0].lower() != suffixes[1].lower())
            )
            fit = (spelling, folder, extension, len(file.folders))
            found.append(_Match(file, fit))
        return sorted(found, key=lambda m: m.fit)

    def _choose(self) -> None:
        """One file for each name, and one name for each file."""
        claims: defaultdict[FoundFile, list[str]] = defaultdict(list)
        for name, fitting in self._fits.items():
            if fitting:
                claims[fitting[0].file].append(name)
        for file, names in claims.items():
            best = min(self._fits[n][0].fit[0] for n in names)
            # A name in another spelling does not take the file of the name that is spelled right.
            names = [n for n in names if self._fits[n][0].fit[0] == best]
            for name in names:
                match, fault = self._fits[name][0], self._several(name)
                others = sorted(set(names) - {name})
                if others:
                    detail = f"{file.name} is also what the lists call {some_of(others)}"
                    fault = (FaultKind.CONFLICT, detail)
                self._found[name] = (match, fault)

    def _several(self, name: str) -> tuple[FaultKind, str] | None:
        """Reject a listed video with several equally good files that differ; note the others."""
        first, *others = self._fits[name]
        equal = [m for m in others if m.fit == first.fit]
        if equal:
            files = [first.file, *(m.file for m in equal)]
            if not are_same_bytes(files):
                detail = "files that may be it differ: " + " and ".join(str(f.path) for f in files)
                return FaultKind.CONFLICT, detail
            self._same[name] = first.file.name
        if len(others) > len(equal):
            self._spare[name] = f"{first.file.name}, not {others[len(equal)].file.name}"
        return None

    def source(self, name: str, label: int) -> Source:
        """The source of a listed name."""
        match, fault = self._found.get(name, (None, None))
        return replace(source_at(name, match and match.file, label), fault=fault)

    def with_notes(self, source_set: SourceSet) -> SourceSet:
        """The set, with notes on the files that differ from the list."""
        counts: Counter[str] = Counter()
        example: dict[str, str] = {}
        for source in source_set.present:
            for how in self._differences(source.name):
                counts[how] += 1
                example.setdefault(how, f"{source.name} is {source.file}")
        notes = [f"{n} videos are found {how}: {example[how]}" for how, n in counts.items()]
        listed = {s.name for s in source_set.sources}
        for what, found in (
            ("are there several times with the same bytes, the first is taken", self._same),
            ("are there several times, the file whose name fits best is taken", self._spare),
        ):
            names = [n for n in found if n in listed]
            if names:
                notes.append(f"{len(names)} videos {what}: {some_of([found[n] for n in names])}")
        absent = [s.name for s in source_set.sources if s.path is None]
        lost = [f"{n} as {self._elsewhere[n]}" for n in absent if n in self._elsewhere]
        if lost:
            notes.append(f"{len(lost)} absent ones are in other classes' folders: {some_of(lost)}")
        return replace(source_set, notes=(*source_set.notes, *notes, *self._listing.notes))

    def _differences(self, name: str) -> list[str]:
        match, _ = self._found[name]
        spelling, folder, extension, depth = match.fit
        found = []
        if spelling:
            found.append(_SPELLINGS[spelling])
        if extension:
            found.append(
                "with another extension" if extension == 2 else "with the extension in another case"
            )
        if folder == 1:
            found.append("in a class folder of another spelling")
        # Without any folder is as common as in the class's.
        if depth > 1 or (folder == 2 and depth):
            found.append("in other folders")
        return found

    @property
    def unlisted(self) -> list[str]:
        """Videos that are in no list."""
        used = {m.file.path for fitting in self._fits.values() for m in fitting}
        return [f.name for f in self._listing.files if f.path not in used and is_video_name(f.name)]


def check_any_present(sets: Sequence[SourceSet], listing: Listing, looked_for: str) -> None:
    """Check that at least one listed video was found.

    Args:
        sets: What was made of the lists.
        listing: What is on the disk.
        looked_for: The rule by which files are found, for the message.

    Raises:
        ConfigError: None was found.
    """
    if any(s.present for s in sets):
        return
    listed = [s.name for each in sets for s in each.sources]
    videos = [f.name for f in listing.files if is_video_name(f.name)]
    others = [f.name for f in listing.files if not is_video_name(f.name)]
    found = " and ".join(
        f"{len(names):,} {what}" + (f" ({some_of(names)})" if names else "")
        for what, names in (("videos", videos), ("other files", others))
    )
    raise ConfigError(
        f"none of the {len(listed):,} listed videos is in {listing.places}: looked for "
        f"{some_of(listed, 2)} {looked_for}; found {found}; --videos is the folder that holds "
        f"the class folders{'; ' if archives_of(listing) else ''}{archives_of(listing)}"
    )
