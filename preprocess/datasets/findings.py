"""What is found of a data set and what is missing, by kind, with the likely reason."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from strata.preprocess.datasets.folder import SourceSet
from strata.preprocess.datasets.listing import Listing, is_video_name, some_of

__all__ = ["archives_of", "findings"]

_ARCHIVES = frozenset({".rar", ".zip", ".7z", ".tar", ".tgz", ".gz", ".xz"})
_UNFINISHED = frozenset({".part", ".crdownload", ".ytdl", ".aria2", ".tmp", ".download"})
_REASONS = {
    "ucf101": "the copy is incomplete; unpack UCF101.rar again",
    "hmdb51": "the copy is incomplete; unpack the archive of the class again",
}
_KINETICS_REASON = "no longer on YouTube, or the download failed; CVDF's copy has most of them"


def _with_suffix(listing: Listing, suffixes: frozenset[str]) -> list[str]:
    return [f.name for f in listing.files if PurePosixPath(f.name).suffix.lower() in suffixes]


def archives_of(listing: Listing) -> str:
    """A remark on archives that are not unpacked; empty if there are none."""
    archives = _with_suffix(listing, _ARCHIVES)
    if not archives:
        return ""
    return f"{len(archives):,} archives are not unpacked: {some_of(archives)}"


def findings(sets: Sequence[SourceSet], listing: Listing) -> list[str]:
    """Lines for the dry run: each kind of what is found and missing, with the likely reason.

    Args:
        sets: What was made of the lists and the disk; a video that several sets have counts once.
        listing: The files on the disk.
    """
    sources = {s.name: s for each in sets for s in each.sources}
    classes = sets[0].classes
    present = {name for name, s in sources.items() if s.path is not None}
    there = {sources[name].label for name in present}
    lost = {k: [n for n, s in sources.items() if s.label == k] for k in {*range(len(classes))}}
    no_class = [k for k in sorted(lost) if lost[k] and k not in there]
    single = [n for n in sources if n not in present and sources[n].label in there]
    empty = [n for n in sorted(present) if not sources[n].num_bytes]
    used = {s.path for s in sources.values()}
    unlisted = [f.name for f in listing.files if is_video_name(f.name) and f.path not in used]
    unfinished = _with_suffix(listing, _UNFINISHED)
    lines = [f"found: {len(present):,} of {len(sources):,} videos"]

    def tell(what: str, names: Sequence[str], reason: str) -> None:
        if names:
            lines.append(f"  {what}: {some_of(names)}: {reason}")

    count = sum(len(lost[k]) for k in no_class)
    tell(
        f"missing, {count:,} videos of {len(no_class):,} classes without any",
        [classes[k] for k in no_class],
        "the folder or archive of the class was not downloaded or not unpacked",
    )
    reason = _REASONS.get(sets[0].dataset, _KINETICS_REASON)
    tell(f"missing, {len(single):,} videos of classes that have others", single, reason)
    tell(f"empty, {len(empty):,} files", empty, "the download or the copy broke off")
    tell(
        f"unfinished, {len(unfinished):,} files",
        unfinished,
        "the download was stopped; continue it",
    )
    tell(
        f"not listed, {len(unlisted):,} videos",
        unlisted,
        "of another split or version of the data set, or renamed",
    )
    archives = archives_of(listing)
    return [*lines, f"  {archives}"] if archives else lines
