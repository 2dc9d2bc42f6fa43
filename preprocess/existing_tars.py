"""Read the samples of a tar with the place of each member, and make its index.

A sample's key is a member's name up to the first dot of its last part, as WebDataset has it. Where
that would leave a video under an extension with a dot, the names of that tar have dots in their
keys (`clip.0.mp4`): then all of its names part at the last dot.
"""

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from strata.errors import ShardError
from strata.format.index import escape_name, index_bytes
from strata.format.shard_tar import BLOCK
from strata.format.source_video import video_ext
from strata.preprocess.datasets.listing import is_ignored, some_of

__all__ = ["Member", "TarContent", "TarSample", "index_text", "read_tar"]

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -c"),
    b"BZh": ("bzip2", "bunzip2 -c"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
}
_SCANNED_BYTES = 1 << 20
_MOST_NAMING_BYTES = 1 << 20
_NAMING_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Members that hold names and attributes of those behind them; `tarfile` reads them at once."""


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Args:
        name: With its path.
        offset: Of the content, in bytes.
        size: Of the content, in bytes.
    """

    name: str
    offset: int
    size: int

    def read(self, path: Path) -> bytes:
        """The content, from the tar at a path."""
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class TarSample:
    """A run of members that share a key.

    Args:
        key: What they share.
        members: By extension, in the order of the tar.
    """

    key: str
    members: dict[str, Member]


@dataclass(frozen=True)
class TarContent:
    """The samples of a tar, and how many members belong to none.

    Args:
        samples: In the order of the tar.
        ignored: Names of hidden files, those of operating systems, and files without an extension.
    """

    samples: list[TarSample]
    ignored: list[str]


def read_tar(path: Path, *, dotted_keys: bool = True) -> TarContent:
    """The samples of a tar.

    Args:
        path: The tar.
        dotted_keys: Whether keys may have dots; those that Strata writes have none.

    Raises:
        ShardError: It is no plain tar, is cut off, or its members make no samples.
    """
    members, ignored = _members(path)
    parted = [_parted(m.name, first=True) for m in members]
    if dotted_keys and _have_dots(parted):
        parted = [_parted(m.name, first=False) for m in members]
    samples: list[TarSample] = []
    for (key, ext), member in zip(parted, members, strict=True):
        if not ext:
            ignored.append(member.name)
            continue
        if not samples or samples[-1].key != key:
            samples.append(TarSample(key, {}))
        if ext in samples[-1].members:
            raise ShardError(f"{path}: member {member.name} is there twice; write the tar again")
        samples[-1].members[ext] = member
    twice = [key for key, count in Counter(s.key for s in samples).items() if count > 1]
    if twice:
        raise ShardError(
            f"{path}: the members of {twice[0]} do not stand together, or two samples have this "
            "name; write the tar again, its members sorted (tar --sort=name)"
        )
    return TarContent(samples, ignored)


def index_text(samples: Iterable[TarSample]) -> bytes:
    """The index that belongs to a tar, as DALI's wds2idx makes it; names as `escape_name` has them.

    Args:
        samples: Of the tar, those to list.
    """
    return index_bytes(
        [
            " ".join(
                f"{escape_name(ext)} {m.offset} {m.size} {escape_name(m.name)}"
                for ext, m in sample.members.items()
            )
            for sample in samples
        ]
    )


def _parted(name: str, *, first: bool) -> tuple[str, str]:
    """Key and extension of a member: they part at the first or last dot of its last part."""
    head, last = posixpath.split(name)
    stem, _, ext = last.partition(".") if first else last.rpartition(".")
    if not stem:
        stem, ext = last, ""
    return posixpath.join(head, stem), ext


def _have_dots(parted: Iterable[tuple[str, str]]) -> bool:
    """Whether a sample's only videos have an extension with a dot."""
    plain: set[str] = set()
    dotted: set[str] = set()
    for key, ext in parted:
        if video_ext([ext]):
            plain.add(key)
        elif video_ext([ext.rpartition(".")[2]]):
            dotted.add(key)
    return bool(dotted - plain)


class _TooLongName(Exception):
    pass


class _Header(tarfile.TarInfo):
    """Refuses long names and attributes of a size that nobody writes, before they are read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _NAMING_TYPES and info.size > _MOST_NAMING_BYTES:
            raise _TooLongName(
                f"a member's name and attributes take {info.size:,} bytes, at most "
                f"{_MOST_NAMING_BYTES:,} are read"
            )
        return info


def _members(path: Path) -> tuple[list[Member], list[str]]:
    """The files of a tar, and the names of those that are never data."""
    found: list[Member] = []
    links: dict[str, str] = {}
    places: dict[str, Member] = {}
    ignored: list[str] = []
    try:
        _refuse_compressed(path)
        # Never through a decompressor, and names as bytes whatever the locale.
        with tarfile.open(
            path, "r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for info in tar:
                if info.isdir():
                    continue
                if any(is_ignored(p) for p in info.name.split("/") if p not in ("", ".", "..")):
                    ignored.append(info.name)
                    continue
                if ".." in info.name.split("/"):
                    raise ShardError(
                        f"{path}: member {info.name} has '..' in its name; write the tar again"
                    )
                if info.issparse():
                    raise ShardError(
                        f"{path}: member {info.name} is stored with holes; write the tar again "
                        "without --sparse"
                    )
                if info.islnk():
                    links[info.name] = info.linkname
                elif info.issym():
                    folder = posixpath.dirname(info.name)
                    links[info.name] = posixpath.normpath(posixpath.join(folder, info.linkname))
                elif not info.isfile():
                    ignored.append(info.name)
                    continue
                member = Member(info.name, info.offset_data, info.size)
                found.append(member)
                if info.name not in links:
                    places[posixpath.normpath(info.name)] = member
            end = tar.offset
        _check_end(path, end)
    except _TooLongName as error:
        raise ShardError(f"{path}: {error}; write the tar again") from error
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ShardError(f"{path} is not readable as a tar ({error}); copy it again") from error
    return [_resolved(path, m, links, places) for m in found], ignored


def _resolved(
    path: Path, member: Member, links: dict[str, str], places: dict[str, Member]
) -> Member:
    """A member, with the place of what it is a link to."""
    name, passed = member.name, set[str]()
    while name in links and name not in passed:
        passed.add(name)
        name = links[name]
    if not passed:
        return member
    target = places.get(posixpath.normpath(name))
    if target is None:
        raise ShardError(
            f"{path}: member {member.name} is a link to {some_of([links[member.name]])}, which is "
            "no file in this tar; write it again with the files themselves (tar --dereference "
            "--hard-dereference)"
        )
    return Member(member.name, target.offset, target.size)


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(8)
    for magic, (kind, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(
                f"{path} is compressed with {kind}, but the members of a shard are read in place; "
                f"decompress it: {command} {path.name} > NEW.tar"
            )


def _check_end(path: Path, end: int) -> None:
    """Check that a tar ends correctly after its last member.

    Otherwise a file that was cut between two members would look complete, and members after the
    end mark, as in tars joined by `cat`, would be ignored silently.
    """
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ShardError(
                f"{path} ends after {os.fstat(file.fileno()).st_size:,} bytes without the block "
                "that ends a tar: it was cut off; copy it again"
            )
        if any(block):
            raise ShardError(f"{path} is damaged at byte {end:,}; copy it again")
        while part := file.read(_SCANNED_BYTES):
            if any(part) and part.strip(b"\0"):
                raise ShardError(
                    f"{path} has more data behind its end at byte {end:,}, as if tars were joined "
                    "by cat; join them with tar --concatenate, or give each a file of its own"
                )
