"""Files below a URL: downloads, uploads and lists, with time limits, retries and limits."""

import errno
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec.core
from fsspec.callbacks import Callback
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    wait_random_exponential,
)

from strata.errors import ConfigError, ShardError
from strata.logs import get_logger

__all__ = ["Store", "StoredFile", "WrongContentError", "as_url"]

logger = get_logger(__name__)

T = TypeVar("T")

_ATTEMPTS = 5
"""Attempts of a request that fails by a busy store or a broken connection."""
_SLOW_ATTEMPTS = 3
"""Attempts after a timeout or wrong content, each of which costs a timeout or a download."""
_RETRY_S = 1.0
"""Longest wait before the second attempt, uniform random; it doubles with each attempt."""
_MOST_RETRY_S = 20.0
_GRACE = 4
"""Number of time limits after which the rate of a transfer is checked."""
_SLOWEST = 10_000
"""Bytes per second below which a transfer is aborted."""
_TRY_AGAIN = (408, 425, 429)
"""HTTP statuses below 500 after which a request is tried again."""
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PART = ".part"


_URL = re.compile(r"^([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)


def as_url(given: str | Path) -> str | None:
    """The URL that a setting names, without a slash at its end; None for a local path.

    A URL that lost a slash by a conversion to `Path` is accepted.
    """
    text = os.fspath(given)
    match = _URL.match(text)
    if match is None:
        return None
    scheme = match[1].lower()
    root = "/" if scheme == "file" else ""
    return f"{scheme}://{root}{text[match.end() :]}".rstrip("/")


@dataclass(frozen=True)
class StoredFile:
    """A file or folder of a store.

    Args:
        name: Relative to the folder that was listed.
        num_bytes: Size; 0 of a folder.
        stamp: Size, and the content's hash or the time of change, as the store reports it.
        is_folder: Whether it is a folder.
    """

    name: str
    num_bytes: int
    stamp: str
    is_folder: bool


class WrongContentError(Exception):
    """The downloaded content is not the expected one."""


class _TooSlowError(Exception):
    """The transfer is too slow to finish."""


class _GivenUpError(Exception):
    """The store was closed during a request."""


class Store:
    """The files below a URL.

    Args:
        url: Without a slash at the end.
        timeout_s: Seconds without a byte after which a request is aborted.

    Raises:
        ConfigError: fsspec does not know the protocol, or needs a package for it.
    """

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._closed = threading.Event()
        try:
            found: Any = fsspec.core.url_to_fs(url, **_options(url, timeout_s))
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"shards at {url} cannot be opened: {error}; install the package that fsspec needs "
                "for it (s3:// s3fs, gs:// gcsfs, http:// aiohttp), or correct the URL"
            ) from error
        self._fs, self._path = found

    def close(self) -> None:
        """Abort active requests at their next bytes or before their next attempt."""
        self._closed.set()

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Size of each file in bytes; None where the store does not report it.

        Raises:
            ShardError: A file is missing or access is denied, or the store does not answer.
        """
        paths = [f"{self._path}/{name}" for name in names]
        # fsspec sends 128 requests at a time.
        limit_s = self._timeout_s * (_GRACE + len(paths) / 128)
        return self._persist(
            f"{self._url}: a shard", lambda: self._fs.sizes(paths, **self._within(limit_s))
        )

    def download(
        self,
        name: str,
        target: Path,
        *,
        limit: int,
        verify: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Download one file under a temporary name, verify it and rename it.

        Args:
            name: Name of the file below the URL.
            target: Local path of the file.
            limit: Maximum number of bytes of the file.
            verify: Function that raises `WrongContentError` if the content is wrong.

        Raises:
            ShardError: The file cannot be read, or its content is wrong.
        """
        grace_s = _GRACE * self._timeout_s

        def fetch() -> None:
            start_s = time.monotonic()

            def watch(announced: int | None, received: int) -> None:
                elapsed_s = time.monotonic() - start_s
                if self._closed.is_set():
                    raise _GivenUpError
                if (announced or 0) > limit:
                    raise WrongContentError(
                        f"{announced} bytes are announced, {limit} are expected"
                    )
                if received > limit:
                    raise WrongContentError(f"more than the {limit} expected bytes arrived")
                if elapsed_s > grace_s + received / _SLOWEST:
                    raise _TooSlowError(f"only {received} bytes in {elapsed_s:.0f} s")

            with _part_of(target) as part:
                self._get(name, str(part), watch, **self._within(grace_s + limit / _SLOWEST))
                size = part.stat().st_size
                if size > limit:
                    raise WrongContentError(f"{size} bytes arrived, at most {limit} are expected")
                verify(part)
                part.replace(target)

        self._persist(f"{self._url}/{name}", fetch)

    def info(self, name: str) -> StoredFile | None:
        """Facts of a file without its content; None if it is missing."""
        path = f"{self._path}/{name}"

        def ask() -> StoredFile:
            self._fs.invalidate_cache()
            return _stored(self._fs.info(path), path.rpartition("/")[0])

        return self._persist(f"{self._url}/{name}", ask, missing_ok=True)

    def listed(self, folder: str, *, deep: bool = False) -> list[StoredFile]:
        """Files and folders in a folder; with `deep` all files below it. Empty if there is none.

        Args:
            folder: Relative to the URL; empty for the URL itself.
            deep: Whether files in folders below are listed too.
        """
        path = f"{self._path}/{folder}".rstrip("/")

        def ask() -> list[StoredFile]:
            self._fs.invalidate_cache()
            found = self._fs.find(path, detail=True) if deep else self._fs.ls(path, detail=True)
            every = found.values() if isinstance(found, dict) else found
            return [_stored(each, path) for each in every if each["name"].rstrip("/") != path]

        return self._persist(f"{self._url}/{folder}", ask, missing_ok=True) or []

    def fetch(self, name: str, target: IO[bytes], pulse: Callable[[], None] = lambda: None) -> bool:
        """Download one file into an open file, which need not have a name.

        Args:
            name: Name of the file below the URL.
            target: Is written from its beginning, and is at its beginning afterwards.
            pulse: Called after each piece and before each new attempt.

        Returns:
            Whether the file exists.

        Raises:
            ShardError: The file cannot be read.
        """

        def request() -> bool:
            pulse()
            self._get(name, _path_of(target), lambda announced, received: pulse())
            target.seek(0)
            return True

        return bool(self._persist(f"{self._url}/{name}", request, missing_ok=True))

    def upload(self, source: IO[bytes], name: str) -> None:
        """Upload an open file completely; until then the name is absent or has its old content.

        Raises:
            ShardError: The file cannot be written.
        """
        source.flush()
        size = os.fstat(source.fileno()).st_size

        def request() -> None:
            self._fs.put_file(_path_of(source), f"{self._path}/{name}")
            self._fs.invalidate_cache()
            found = self._fs.info(f"{self._path}/{name}")["size"]
            if found != size:
                raise WrongContentError(f"{found} of {size} bytes arrived")

        self._persist(f"{self._url}/{name}", request)

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file unless it exists; one of several writers succeeds.

        Returns:
            Whether it has this content.

        Raises:
            ShardError: The store does not answer, or cannot write on a condition.
        """
        path = f"{self._path}/{name}"

        def request() -> bool:
            try:
                self._fs.pipe_file(path, content, mode="create")
            except Exception:  # Stores have their own errors for it.
                self._fs.invalidate_cache()
                if not self._fs.exists(path):
                    raise
                # An earlier attempt may have written it although its answer was lost.
                return self._fs.cat_file(path) == content
            return True

        return self._persist(f"{self._url}/{name}", request)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files and folders; those that are gone already are no error."""
        for name in names:
            self._persist(
                f"{self._url}/{name}",
                lambda name=name: self._fs.rm(f"{self._path}/{name}", recursive=True),
                missing_ok=True,
            )

    def _get(
        self, name: str, path: str, watch: Callable[[int | None, int], None], **options: Any
    ) -> None:
        """Download a file; `watch` gets the announced and the received bytes after each piece."""
        callback = Callback(hooks={"watch": watch})
        self._fs.get_file(f"{self._path}/{name}", path, callback=callback, **options)

    def _within(self, limit_s: float) -> dict[str, float]:
        """Time limit of a complete call, which fsspec supports for asynchronous stores."""
        return {"timeout": limit_s} if self._fs.async_impl else {}

    def _persist(self, what: str, request: Callable[[], T], *, missing_ok: bool = False) -> T:
        """Repeat a request until it succeeds or the error is permanent.

        With `missing_ok` it returns None if the file does not exist.
        """
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=self._stop,
            wait=wait_random_exponential(_RETRY_S, _MOST_RETRY_S),
            sleep=sleep_using_event(self._closed),
            before_sleep=lambda state: _tell(what, state),
            reraise=True,
        )
        try:
            return retrying(request)
        # Every store raises its own error types.
        except Exception as error:
            root = _root(error)
            if missing_ok and (isinstance(root, FileNotFoundError) or _status(root) == 404):
                return None  # pyright: ignore[reportReturnType]
            raise ShardError(_explain(what, _root(error), retrying)) from error

    def _stop(self, state: RetryCallState) -> bool:
        error = None if state.outcome is None else state.outcome.exception()
        return self._closed.is_set() or state.attempt_number >= _attempts(error)

    def remove_leftovers(self, root: Path) -> None:
        """Remove temporary files that killed processes left behind."""
        for path in root.glob(f"*/.*{_PART}"):
            with suppress(FileNotFoundError), path.open("rb") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # Another process is writing it.
                path.unlink(missing_ok=True)


def _path_of(file: IO[bytes]) -> str:
    """A path of an open file, also of one without a name: fsspec takes paths alone."""
    return f"/proc/self/fd/{file.fileno()}"


def _stored(info: dict[str, Any], folder: str) -> StoredFile:
    size = int(info.get("size") or 0)
    # S3 and Google have a hash of the content, others a time.
    versions = (
        info.get(k) for k in ("ETag", "md5Hash", "etag", "LastModified", "mtime", "created")
    )
    version = next((str(v).strip('"') for v in versions if v), "")
    name = info["name"].rstrip("/").removeprefix(f"{folder}/")
    return StoredFile(name, size, f"{size}:{version}", info.get("type") == "directory")


def _options(url: str, timeout_s: float) -> dict[str, Any]:
    """Time limits as options of the store's package, if it does not set them itself."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return {"client_kwargs": {"timeout": limits}}


@contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """A temporary file beside `target`, locked while this process writes it."""
    while True:
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PART}")
        with part.open("xb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                # It may have been removed as a leftover between the two lines above.
                if not part.exists():
                    continue
                yield part
                return
            finally:
                part.unlink(missing_ok=True)


def _tell(what: str, state: RetryCallState) -> None:
    error = None if state.outcome is None else state.outcome.exception()
    logger.warning("%s: %s; trying again", what, _in_words(error))


def _explain(what: str, error: BaseException | None, retrying: Retrying) -> str:
    """The error message of a failed request, with what to do."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return (
            f"{what} does not exist ({error}); upload the complete folder that tools/shard.py "
            "wrote, or correct the URL"
        )
    if status in (401, 403) or isinstance(error, PermissionError):
        return f"{what} may not be read ({_in_words(error)}); check the access rights"
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return f"{what} cannot be written to data.download.folder: {error}; free space"
    count = retrying.statistics.get("attempt_number", 1)
    return f"{what} was not read in {count} attempts: {_in_words(error)}"


def _root(error: BaseException | None) -> BaseException | None:
    """The original error: fsspec raises FileNotFoundError for any failed file query."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int | None:
    """HTTP status of a store's error, of aiohttp, botocore or gcsfs."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    for value in (getattr(error, "status", None), metadata.get("HTTPStatusCode")):
        if isinstance(value, int):
            return value
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    root = _root(error)
    status = _status(root)
    if status is not None:
        return status >= 500 or status in _TRY_AGAIN
    if isinstance(root, OSError) and root.errno in _LOCAL:
        return False
    final = (FileNotFoundError, PermissionError, NotImplementedError, ShardError, _GivenUpError)
    return isinstance(root, Exception) and not isinstance(root, final)


def _attempts(error: BaseException | None) -> int:
    slow = isinstance(_root(error), TimeoutError | WrongContentError | _TooSlowError)
    return _SLOW_ATTEMPTS if slow else _ATTEMPTS


def _in_words(error: BaseException | None) -> str:
    """An error in one line; some errors have no text."""
    root = _root(error)
    text = " ".join(str(root).split())
    if not text and isinstance(root, TimeoutError):
        return "no answer within the time limit"
    return text or type(root).__name__
