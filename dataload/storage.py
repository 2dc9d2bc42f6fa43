"""Where shards are: a folder, or an object store with a local cache of bounded size.

A folder may be on any file system. A URL (`s3://`, `gs://`, `http://`, whatever fsspec knows) is
read through a cache: a shard is downloaded whole before its first use, under a temporary name,
compared with the manifest's size and SHA-256, and renamed; all ranks of a node share it. When the
cache is full, the shards that were not used for longest go. One that is open stays readable: its
name goes, its bytes stay until it is closed.
"""

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from strata.errors import ConfigError, ShardError
from strata.logs import get_logger
from strata.schema import INDEX_SUFFIX, MANIFEST_NAME, SAMPLES_NAME, SHARD_SUFFIX, ShardEntry

__all__ = ["DownloadConfig", "LocalFolder", "RemoteFolder", "ShardFolder", "open_folder", "sha256"]

logger = get_logger(__name__)

_HASH_CHUNK_BYTES = 1 << 24
_GIGABYTE = 10**9
_ATTEMPTS = 3
_RETRY_S = 1.0
_PARALLEL = 4
_URL = re.compile(r"^([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """The local cache of shards that are read from a URL; a folder is read in place."""

    folder: Path | None = None
    """Where shards are kept; by default strata/shards in XDG_CACHE_HOME or ~/.cache."""
    gigabytes: float = 200.0
    """Most that is kept, in 10^9 bytes, all data sets in the folder together."""

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: There is no room for anything.
        """
        if self.gigabytes <= 0:
            raise ConfigError(f"data.download.gigabytes is {self.gigabytes}; use more than 0")

    @property
    def num_bytes(self) -> int:
        """Most that is kept."""
        return int(self.gigabytes * _GIGABYTE)

    @property
    def path(self) -> Path:
        """The folder, with the default resolved."""
        if self.folder is not None:
            return self.folder
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(root) / "strata" / "shards"


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class ShardFolder(Protocol):
    """What the reader asks of a place that holds shards."""

    @property
    def location(self) -> str:
        """The folder or URL, for messages."""
        ...

    @property
    def manifest_folder(self) -> Path:
        """A local folder with manifest.json and samples.jsonl."""
        ...

    @property
    def limit_bytes(self) -> int | None:
        """How much of the set can be at hand at a time; None for all of it."""
        ...

    def check(self, entries: Sequence[ShardEntry], digest: str) -> None:
        """Compare the shards' sizes with the manifest's, whose digest is given.

        Raises:
            ShardError: One is missing or has another size.
        """
        ...

    def fetch(self, entry: ShardEntry) -> Path:
        """A local path of the shard, whole; its index is beside it."""
        ...

    def fetch_ahead(self, entries: Sequence[ShardEntry]) -> None:
        """Say which shards will be asked for soon."""
        ...

    def close(self) -> None:
        """Give up what is under way."""
        ...


def open_folder(given: str | Path, download: DownloadConfig | None = None) -> ShardFolder:
    """The place that a setting names.

    Args:
        given: A folder or URL. A URL that went through `Path` and lost a slash is understood too.
        download: Where to keep what a URL holds.

    Raises:
        ConfigError: fsspec does not know the URL's protocol, or needs a package for it.
        ShardError: The URL cannot be read or holds no manifest.
    """
    text = os.fspath(given)
    match = _URL.match(text)
    if match is None:
        return LocalFolder(Path(text))
    url = f"{match[1].lower()}://{text[match.end() :]}"
    if match[1].lower() == "file":
        url = f"file:///{text[match.end() :]}"
    return RemoteFolder(url.rstrip("/"), download or DownloadConfig())


class LocalFolder:
    """A folder of this machine, or of a file system mounted on it.

    Args:
        folder: The folder.
    """

    limit_bytes: int | None = None

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self.manifest_folder = folder

    def check(self, entries: Sequence[ShardEntry], digest: str) -> None:
        """Compare the shards' sizes with the manifest's."""
        for entry in entries:
            path = self.fetch(entry)
            if not path.is_file():
                if path.is_symlink():
                    raise ShardError(
                        f"shard {path} is a link to {os.readlink(path)}, which is not there; bring "
                        "the tar back, or index it where it is now"
                    )
                raise ShardError(f"shard {path} is missing; run the same tools/shard.py again")
            size = path.stat().st_size
            if size != entry.num_bytes:
                raise ShardError(
                    f"shard {path} has {size} bytes, the manifest says {entry.num_bytes}; "
                    "copy it again or run the same tools/shard.py again"
                )

    def fetch(self, entry: ShardEntry) -> Path:
        """The path of the shard."""
        return self.manifest_folder / entry.name

    def fetch_ahead(self, entries: Sequence[ShardEntry]) -> None:
        """Nothing: the kernel reads ahead."""

    def close(self) -> None:
        """Nothing."""


class RemoteFolder:
    """A URL, read through a local cache.

    Args:
        url: Without a slash at the end.
        download: Where to keep shards, and how many.

    Raises:
        ConfigError: fsspec does not know the protocol, or needs a package for it.
        ShardError: The manifest cannot be read.
    """

    def __init__(self, url: str, download: DownloadConfig) -> None:
        import fsspec.core

        self.location = url
        self.limit_bytes: int | None = download.num_bytes
        self._root = download.path
        try:
            found: Any = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"shards at {url} cannot be opened: {error}; install the package that fsspec needs "
                "for it (s3:// s3fs, gs:// gcsfs, http:// aiohttp), or mend the URL"
            ) from error
        self._fs, self._path = found
        self._shards = self._root / "unknown"
        self._lock = threading.Lock()
        self._pending: dict[str, Future[Path]] = {}
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="strata-download")
        self.manifest_folder = self._root / hashlib.sha256(url.encode()).hexdigest()[:16]
        try:
            self.manifest_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.download.folder {self._root} cannot be written: {error}"
            ) from error
        for name in (MANIFEST_NAME, SAMPLES_NAME):
            self._download(name, self.manifest_folder / name, None)

    def check(self, entries: Sequence[ShardEntry], digest: str) -> None:
        """Compare the sizes that the store tells with the manifest's; hashes when downloading."""
        self._shards = self._root / digest[:16]
        self._shards.mkdir(exist_ok=True)
        try:
            sizes = self._fs.sizes([f"{self._path}/{e.name}" for e in entries])
        except FileNotFoundError as error:
            raise ShardError(f"{self.location}: a shard is missing ({error})") from error
        except Exception as error:
            # Every store has errors of its own kind.
            raise ShardError(f"{self.location} cannot be read: {error}") from error
        for entry, size in zip(entries, sizes, strict=True):
            if size is not None and size != entry.num_bytes:
                raise ShardError(
                    f"shard {self.location}/{entry.name} has {size} bytes, the manifest says "
                    f"{entry.num_bytes}; upload it again"
                )

    def _get(self, entry: ShardEntry) -> Path:
        """Bring one shard and its index here, unless they are."""
        path = self._shards / entry.name
        index = path.with_suffix(INDEX_SUFFIX)
        with _locked(self._shards / f"{entry.name}.lock"):
            if not index.is_file():
                self._download(index.name, index, None)
            if not path.is_file() or path.stat().st_size != entry.num_bytes:
                with _locked(self._root / "evict.lock"):
                    self._make_room(entry.num_bytes)
                self._download(entry.name, path, entry)
            os.utime(path)
        return path

    def _submit(self, entry: ShardEntry) -> "Future[Path]":
        with self._lock:
            future = self._pending.get(entry.name)
            if future is None or (future.done() and not self._is_here(entry)):
                future = self._pool.submit(self._get, entry)
                self._pending[entry.name] = future
            return future

    def _is_here(self, entry: ShardEntry) -> bool:
        return (self._shards / entry.name).is_file()

    def fetch(self, entry: ShardEntry) -> Path:
        """A local path of the shard, downloaded if it is not here.

        Raises:
            ShardError: It cannot be downloaded, or is not what the manifest says.
        """
        path = self._submit(entry).result()
        os.utime(path)
        return path

    def fetch_ahead(self, entries: Sequence[ShardEntry]) -> None:
        """Start to download what will be asked for soon, as far as it fits."""
        room = (self.limit_bytes or 0) - max((e.num_bytes for e in entries), default=0)
        for entry in entries:
            room -= entry.num_bytes
            if room < 0:
                return
            self._submit(entry)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the shards that were not used for longest until `num_bytes` more fit."""
        kept = []
        for path in self._root.glob(f"*/*{SHARD_SUFFIX}"):
            status = path.stat()
            kept.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in kept) + num_bytes
        for _, size, path in sorted(kept):
            if total <= (self.limit_bytes or total):
                return
            path.unlink(missing_ok=True)
            total -= size

    def _download(self, name: str, target: Path, entry: ShardEntry | None) -> None:
        """Fetch one file under a temporary name, compare, rename."""
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
        remote = f"{self._path}/{name}"
        for attempt in range(_ATTEMPTS):
            try:
                self._fs.get_file(remote, str(temporary))
                if entry is not None:
                    self._compare(temporary, entry)
                temporary.replace(target)
                return
            except FileNotFoundError as error:
                raise ShardError(
                    f"{self.location}/{name} does not exist; upload the whole folder that "
                    "tools/shard.py wrote, or mend the URL"
                ) from error
            except Exception as error:
                # Every store has errors of its own kind; what is not a hiccup fails again.
                if attempt + 1 == _ATTEMPTS:
                    raise ShardError(
                        f"{self.location}/{name} was not read in {_ATTEMPTS} attempts: {error}"
                    ) from error
                logger.warning("download of %s/%s: %s; once more", self.location, name, error)
                time.sleep(_RETRY_S * attempt)
            finally:
                temporary.unlink(missing_ok=True)

    @staticmethod
    def _compare(path: Path, entry: ShardEntry) -> None:
        size = path.stat().st_size
        if size != entry.num_bytes:
            raise ShardError(f"{size} bytes arrived, the manifest says {entry.num_bytes}")
        if sha256(path) != entry.sha256:
            raise ShardError("what arrived is not what the manifest says (SHA-256 differs)")

    def close(self) -> None:
        """Give up downloads that have not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes and threads respect."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
