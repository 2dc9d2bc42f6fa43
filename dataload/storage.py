"""Access to shards in a folder, or at a URL with a local cache of bounded size.

A folder may be on any file system. A URL (`s3://`, `gs://`, `http://`, any protocol of fsspec) is
read through a cache: a shard is downloaded completely before its first use (strata/transfer.py),
compared with the manifest's size and SHA-256, and renamed; its index is compared with the
manifest's hash, or with the tar. So the cache contains only verified files. All ranks of a node
share it. When it is full, the least recently used shards are removed. An open shard stays
readable: its name is removed, but its bytes stay until it is closed.
"""

import fcntl
import hashlib
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from strata.errors import ConfigError, ShardError
from strata.files import sha256_of
from strata.format.schema import INDEX_SUFFIX, MANIFEST_NAME, SAMPLES_NAME, SHARD_SUFFIX, ShardEntry
from strata.transfer import Store, WrongContentError, as_url
from strata.untrusted import checked_name

__all__ = ["DownloadConfig", "LocalFolder", "RemoteFolder", "ShardFolder", "open_folder"]

_GIGABYTE = 10**9
_PARALLEL = 4
_MANIFEST_LIMIT = 1 << 28
"""Bytes that a manifest from a URL may have: 256 MiB, about a million shards."""
_ROWS_LIMIT = 1 << 31
"""Bytes that the rows of a set from a URL may have: 2 GiB, some ten million videos."""
_INDEX_LIMIT = 1 << 20
"""Bytes that any index may have; that of a larger shard may be as large as the shard."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """The local cache of shards that are read from a URL; a folder is read in place."""

    folder: Path | None = None
    """Folder of the cache; by default strata/shards in XDG_CACHE_HOME or ~/.cache."""
    gigabytes: float = 200.0
    """Maximum size of the cache in 10^9 bytes, for all data sets in the folder together."""
    timeout_s: float = 15.0
    """Seconds without a byte after which a request is aborted and tried again."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: The size or the time limit is out of range.
        """
        if not 0 < self.timeout_s <= 3600:
            raise ConfigError(
                f"data.download.timeout_s is {self.timeout_s}; use more than 0, up to 3600"
            )
        if self.gigabytes <= 0:
            raise ConfigError(f"data.download.gigabytes is {self.gigabytes}; use more than 0")

    @property
    def num_bytes(self) -> int:
        """Maximum size of the cache in bytes."""
        return int(self.gigabytes * _GIGABYTE)

    @property
    def path(self) -> Path:
        """The folder, with the default resolved."""
        if self.folder is not None:
            return self.folder
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(root) / "strata" / "shards"


class ShardFolder(Protocol):
    """Interface of a location with shards."""

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
        """Bytes of the set that can be available at a time; None for all of it."""
        ...

    def check(self, entries: Sequence[ShardEntry], digest: str) -> None:
        """Compare the shards' sizes with the manifest's, whose digest is given.

        Raises:
            ShardError: One is missing or has another size.
        """
        ...

    def fetch(self, entry: ShardEntry) -> Path:
        """A local path of the complete shard; its index is in the same folder."""
        ...

    def fetch_ahead(self, entries: Sequence[ShardEntry]) -> None:
        """Announce which shards will be needed soon."""
        ...

    def close(self) -> None:
        """Stop downloads that are in progress."""
        ...


def open_folder(given: str | Path, download: DownloadConfig | None = None) -> ShardFolder:
    """Open the location that a setting names.

    Args:
        given: A folder or URL. A URL that lost a slash by a conversion to `Path` is accepted.
        download: The local cache of shards from a URL.

    Raises:
        ConfigError: fsspec does not support the URL's protocol, or needs a package for it.
        ShardError: The URL cannot be read or has no manifest.
    """
    url = as_url(given)
    if url is None:
        return LocalFolder(Path(given))
    return RemoteFolder(url, download or DownloadConfig())


class LocalFolder:
    """Shards in a local folder or on a mounted file system.

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
                        f"shard {path} is a link to {os.readlink(path)}, which is missing; restore "
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
        """The path of the shard.

        Raises:
            ShardError: The manifest gives it a name that could lead out of the folder.
        """
        return self.manifest_folder / _checked_shard_name(entry, self.location)

    def fetch_ahead(self, entries: Sequence[ShardEntry]) -> None:
        """Do nothing: the kernel reads ahead."""

    def close(self) -> None:
        """Nothing."""


class RemoteFolder:
    """Shards at a URL, read through a local cache.

    Args:
        url: The URL, without a slash at the end.
        download: Folder and size of the cache.

    Raises:
        ConfigError: fsspec does not support the protocol, or needs a package for it.
        ShardError: The manifest cannot be read.
    """

    def __init__(self, url: str, download: DownloadConfig) -> None:
        self.location = url
        self.limit_bytes: int | None = download.num_bytes
        self._root = download.path
        self._store = Store(url, download.timeout_s)
        self._shards: Path | None = None
        self._lock = threading.Lock()
        self._pending: dict[str, Future[Path]] = {}
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="strata-download")
        self.manifest_folder = self._root / hashlib.sha256(url.encode()).hexdigest()[:16]
        try:
            self.manifest_folder.mkdir(parents=True, exist_ok=True)
            self._store.remove_leftovers(self._root)
        except OSError as error:
            raise ConfigError(
                f"data.download.folder {self._root} cannot be written: {error}"
            ) from error
        for name, limit in ((MANIFEST_NAME, _MANIFEST_LIMIT), (SAMPLES_NAME, _ROWS_LIMIT)):
            self._store.download(name, self.manifest_folder / name, limit=limit)

    def check(self, entries: Sequence[ShardEntry], digest: str) -> None:
        """Compare the sizes in the store with the manifest; hashes are checked on download.

        Raises:
            ShardError: A name or a digest in the manifest is not safe to be a path, a shard is
                missing or has another size, or the store does not answer.
        """
        self._shards = self._root / _checked_digest(digest, self.location)
        try:
            self._shards.mkdir(exist_ok=True)
        except OSError as error:
            raise self._not_kept(error) from error
        names = [_checked_shard_name(entry, self.location) for entry in entries]
        for entry, size in zip(entries, self._store.sizes(names), strict=True):
            if size is not None and size != entry.num_bytes:
                raise ShardError(
                    f"shard {self.location}/{entry.name} has {size} bytes, the manifest says "
                    f"{entry.num_bytes}; upload it again"
                )

    def _path(self, entry: ShardEntry) -> Path:
        if self._shards is None:
            raise AssertionError("check() comes before the first shard")
        return self._shards / _checked_shard_name(entry, self.location)

    def _get(self, entry: ShardEntry) -> Path:
        """Download one shard and its index, unless they are in the cache."""
        path = self._path(entry)
        index = path.with_suffix(INDEX_SUFFIX)
        with _locked(path.with_name(f"{path.name}.lock")):
            if not path.is_file() or path.stat().st_size != entry.num_bytes:
                with _locked(self._root / "evict.lock"):
                    self._make_room(entry.num_bytes)
                self._store.download(
                    path.name,
                    path,
                    limit=entry.num_bytes,
                    verify=lambda found: _compare(found, entry, self.location),
                )
            if not _is_right(index, path, entry):
                self._store.download(
                    index.name,
                    index,
                    limit=max(_INDEX_LIMIT, entry.num_bytes),
                    verify=lambda found: _compare_index(found, path, entry),
                )
            os.utime(path)
        return path

    def _submit(self, entry: ShardEntry) -> "Future[Path]":
        with self._lock:
            future = self._pending.get(entry.name)
            if future is None or (future.done() and not self._path(entry).is_file()):
                future = self._pool.submit(self._get, entry)
                self._pending[entry.name] = future
            return future

    def fetch(self, entry: ShardEntry) -> Path:
        """A local path of the shard, which is downloaded if it is not in the cache.

        Raises:
            ShardError: It cannot be downloaded, or does not agree with the manifest.
        """
        try:
            path = self._submit(entry).result()
        except OSError as error:
            raise self._not_kept(error) from error
        # Another process may have made room; who opens the path then asks again.
        with suppress(FileNotFoundError):
            os.utime(path)
        return path

    def _not_kept(self, error: OSError) -> ShardError:
        return ShardError(
            f"{self.location} cannot be kept in data.download.folder {self._root}: {error}; free "
            "space, or use another folder"
        )

    def fetch_ahead(self, entries: Sequence[ShardEntry]) -> None:
        """Start to download the shards that will be needed soon, as far as they fit."""
        room = (self.limit_bytes or 0) - max((e.num_bytes for e in entries), default=0)
        for entry in entries:
            room -= entry.num_bytes
            if room < 0:
                return
            self._submit(entry)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used shards until `num_bytes` more fit."""
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

    def close(self) -> None:
        """Cancel downloads that have not started; active ones stop at their next bytes."""
        self._store.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _checked_shard_name(entry: ShardEntry, location: str) -> str:
    """Check that the name of a shard is safe as a part of a path, and return it.

    Raises:
        ShardError: It is of another form.
    """
    name = checked_name(entry.name, "shard", f"{location}/{MANIFEST_NAME}", ShardError)
    if not name.endswith(SHARD_SUFFIX):
        raise ShardError(f"{location}/{MANIFEST_NAME} names the shard {name}, which is no .tar")
    return name


def _checked_digest(digest: str, location: str) -> str:
    """Check that a SHA-256 of a manifest is safe as a part of a path, and return it.

    Raises:
        ShardError: It is of another form.
    """
    if not _SHA256.fullmatch(digest):
        raise ShardError(
            f"{location}/{MANIFEST_NAME} contains the hash {digest[:80]!r}, which is not a SHA-256 "
            "in hexadecimal; copy or upload the set again"
        )
    return digest


def _compare(path: Path, entry: ShardEntry, location: str) -> None:
    expected = _checked_digest(entry.sha256, location)
    size = path.stat().st_size
    if size != entry.num_bytes:
        raise WrongContentError(f"{size} bytes arrived, the manifest says {entry.num_bytes}")
    if sha256_of(path) != expected:
        raise WrongContentError("what arrived is not what the manifest says (SHA-256 differs)")


def _is_right(index: Path, shard: Path, entry: ShardEntry) -> bool:
    """Whether an index in the cache is unchanged since it was verified."""
    if not index.is_file():
        return False
    try:
        _compare_index(index, shard, entry)
    except WrongContentError:
        return False
    return True


def _compare_index(path: Path, shard: Path, entry: ShardEntry) -> None:
    """Compare an index with the manifest's hash; in older sets without hashes, with the tar.

    The tar is already verified, so its headers state where each member is.

    Raises:
        WrongContentError: The file is not the index of this shard.
    """
    expected = entry.index_sha256
    if expected is not None:
        if sha256_of(path) != expected:
            raise WrongContentError("the index is not what the manifest says (SHA-256 differs)")
        return
    try:
        with tarfile.open(shard, "r:") as tar:
            members = {m.name: (m.offset_data, m.size) for m in tar}
        _, *lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            words = line.split(" ")
            for ext, offset, size, name in zip(*(iter(words),) * 4, strict=True):
                place = int(offset), int(size)
                if members.get(name) != place or not name.endswith(f".{ext}"):
                    raise WrongContentError(f"the index misplaces {name!r}")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise WrongContentError(f"the index is damaged: {error}") from error
    if len(lines) != entry.num_samples:
        raise WrongContentError(
            f"the index has {len(lines)} samples, the manifest says {entry.num_samples}"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes and threads."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
