"""List the files below the user's folders; report what is ignored or cannot be read.

A name is text from here on: its bytes as UTF-8, and every byte that is not UTF-8 as a lone
surrogate (`surrogateescape`), in every locale.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from strata.errors import ConfigError
from strata.files import sha256_of
from strata.transfer import Store, as_url

__all__ = [
    "VIDEO_SUFFIXES",
    "FoundFile",
    "Listing",
    "are_same_bytes",
    "is_ignored",
    "is_video_name",
    "list_files",
    "name_of",
    "path_of",
    "paths_in",
    "read_lines",
    "require_folder",
    "some_of",
]

VIDEO_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "3gp asf avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts vob webm wmv".split()
    )
)
"""Extensions of videos, in any case."""

_SYSTEM_NAMES = frozenset(
    {
        "__macosx",
        "thumbs.db",
        "desktop.ini",
        "icon\r",
        "lost+found",
        "$recycle.bin",
        "system volume information",
        "@eadir",
    }
)
"""Files and folders that Windows, macOS, Linux and Synology create, in lower case."""

_NOT_SHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class FoundFile:
    """A file below one of the folders.

    Args:
        name: Relative to its folder, with forward slashes.
        path: The file, or its URL.
        num_bytes: Size, of a file at a URL.
        stamp: Size and the store's hash or time of change, of a file at a URL.
    """

    name: str
    path: Path
    num_bytes: int = 0
    stamp: str = ""

    @property
    def folders(self) -> tuple[str, ...]:
        """The names of the folders above it, the outermost first."""
        return tuple(self.name.split("/")[:-1])


@dataclass
class Listing:
    """The files and folders below the given folders."""

    roots: tuple[Path, ...]
    files: list[FoundFile] = field(default_factory=list)
    """By folder in the order given, then by name."""
    folders: list[str] = field(default_factory=list)
    """Relative names of all folders below."""
    ignored: list[str] = field(default_factory=list)
    """Hidden files and folders, and those of operating systems."""
    again: list[tuple[str, str]] = field(default_factory=list)
    """Links to folders that were reached by another name, with that name; empty for the root."""
    special: list[str] = field(default_factory=list)
    """Pipes, sockets and devices."""

    @property
    def places(self) -> str:
        """The folders, for a message."""
        return " and ".join(as_url(root) or str(root) for root in self.roots)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""
        notes = []
        if self.ignored:
            notes.append(
                f"{len(self.ignored)} hidden or system files and folders are ignored: "
                f"{some_of(sorted(self.ignored))}"
            )
        if self.again:
            links = [f"{link} -> {other or '.'}" for link, other in self.again]
            notes.append(
                f"{len(links)} links lead to folders that are read under another name and are not "
                f"followed: {some_of(links)}"
            )
        if self.special:
            notes.append(
                f"{len(self.special)} are pipes, devices or no paths: {some_of(self.special)}"
            )
        others = [f.name for f in self.files if not is_video_name(f.name)]
        if others:
            notes.append(f"{len(others)} files are not videos by their names: {some_of(others)}")
        return tuple(notes)


def name_of(path: str | os.PathLike[str]) -> str:
    """The text of a path: the same in every locale, and every byte is kept."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def path_of(name: str) -> Path:
    """The path of a name, in every locale."""
    return Path(os.fsdecode(name.encode("utf-8", "surrogateescape")))


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden or an operating system's, and never data."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_video_name(name: str) -> bool:
    """Whether a file is a video by its name."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def some_of(names: Sequence[str], count: int = 3) -> str:
    """The first names, for a message; line breaks, control characters and odd bytes escaped."""
    shown = [
        _NOT_SHOWN.sub(lambda m: m[0].encode("unicode_escape").decode(), name)
        for name in names[:count]
    ]
    return ", ".join(shown) + (", ..." if len(names) > count else "")


def require_folder(folder: Path, option: str) -> None:
    """Check that a folder exists.

    Raises:
        ConfigError: It does not.
    """
    try:
        found = stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        found = False
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not found:
        raise ConfigError(f"folder {folder} does not exist; correct {option}")


def paths_in(folder: Path) -> list[Path]:
    """The entries of a folder of lists, by name, without hidden and system files.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return sorted(p for p in folder.iterdir() if not is_ignored(name_of(p.name)))
    except OSError as error:
        raise _unreadable(folder, error) from error


def read_lines(path: Path, option: str = "--splits") -> list[str]:
    """Non-empty lines of a list, whatever its line ends; UTF-8, UTF-16 with a mark, or odd bytes.

    Raises:
        ConfigError: The file is missing or not text.
    """
    try:
        content = path.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = content.decode("utf-16")
        else:
            text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        if "\0" in text:
            raise ValueError("it is not text")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the list {path} ({error}); correct {option}") from error
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def are_same_bytes(files: Sequence[FoundFile]) -> bool:
    """Whether all files have the same content.

    Raises:
        ConfigError: One cannot be read.
    """
    if any(f.stamp for f in files):
        return len({f.stamp for f in files}) == 1
    try:
        sizes = {f.path.stat().st_size for f in files}
        if len(sizes) > 1 or sizes == {0}:
            return len(sizes) == 1
        return len({sha256_of(f.path) for f in files}) == 1
    except OSError as error:
        raise _unreadable(Path(error.filename or files[0].path), error) from error


def list_files(roots: Sequence[Path], option: str = "--videos") -> Listing:
    """List all files below some folders.

    Links to files and folders are followed. A folder that several names lead to is listed once:
    under its own name if that is below the folders, else under the first link by name.

    Args:
        roots: The folders.
        option: Which option names them.

    Raises:
        ConfigError: A folder is missing, cannot be read, is given twice or is inside another, or a
            link that is no video leads nowhere.
    """
    for root in roots:
        if as_url(root) is None:
            require_folder(root, option)
    real = [root.resolve() for root in roots]
    for k, first in enumerate(real):
        for second in real[k + 1 :]:
            if first.is_relative_to(second) or second.is_relative_to(first):
                raise ConfigError(
                    f"{option}: {first} and {second} are one folder, or one is inside the other; "
                    "give the outer one alone"
                )
    listing = Listing(tuple(roots))
    seen: dict[tuple[int, int], str] = {}
    for root in roots:
        url = as_url(root)
        if url is None:
            _walk(root, listing, seen)
        else:
            _list_url(root, url, listing, option)
    return listing


def _list_url(root: Path, url: str, listing: Listing, option: str) -> None:
    """List all files below a URL, with the store's facts on them."""
    found: list[FoundFile] = []
    for file in Store(url).listed("", deep=True):
        path = root / file.name
        if any(map(is_ignored, file.name.split("/"))):
            listing.ignored.append(file.name)
        elif _relative(path, root) != file.name:
            listing.special.append(file.name)  # As `a//b`, which is no path.
        else:
            found.append(FoundFile(file.name, path, file.num_bytes, file.stamp))
    if not found:
        raise ConfigError(f"there is no file below {url}; correct {option}")
    folders = {"/".join(f.folders[:k]) for f in found for k in range(1, len(f.folders) + 1)}
    listing.folders += sorted(folders)
    listing.files += sorted(found, key=lambda f: f.name)


def _walk(root: Path, listing: Listing, seen: dict[tuple[int, int], str]) -> None:
    found: list[FoundFile] = []
    todo, links = [root], []
    while todo or links:
        # Real folders first, so that a link never takes the place of the folder that it leads to.
        if not todo:
            links.sort()
            link = links.pop(0)
            other = seen.get(_identity(link))
            if other is not None:
                listing.again.append((_relative(link, root), other))
                continue
            todo.append(link)
        folder = todo.pop()
        seen[_identity(folder)] = _relative(folder, root)
        if folder != root:
            listing.folders.append(_relative(folder, root))
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda e: e.name)
        except OSError as error:
            raise _unreadable(folder, error) from error
        for entry in entries:
            path = folder / entry.name
            if is_ignored(name_of(entry.name)):
                listing.ignored.append(_relative(path, root))
                continue
            # Only links are checked one by one: each check is a round trip on a network disk.
            mode = _link_mode(path) if entry.is_symlink() else None
            if mode is not None and stat.S_ISDIR(mode):
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                todo.append(path)
            elif (
                entry.is_file(follow_symlinks=False)
                or (mode is not None and stat.S_ISREG(mode))
                or is_video_name(entry.name)  # Rejected by name, with the reason, like any other.
            ):
                found.append(FoundFile(_relative(path, root), path))
            else:
                listing.special.append(_relative(path, root))
    listing.files += sorted(found, key=lambda f: f.name)


def _relative(path: Path, root: Path) -> str:
    return "" if path == root else name_of(path.relative_to(root))


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _link_mode(path: Path) -> int:
    """File type of a link's target. A video's broken link counts as a file: it is absent."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_video_name(name_of(path)):
            return stat.S_IFREG
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    if path.is_symlink():
        reason = f"it is a link to {os.readlink(path)}: {reason}"
    return ConfigError(
        f"{path} cannot be read ({reason}): correct it or move it away, as what it holds would "
        "be missing without notice"
    )
