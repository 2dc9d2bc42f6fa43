"""Files from a URL: with time limits, retries, and no more bytes than were promised."""

import errno
import fcntl
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

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

__all__ = ["Store", "WrongContentError"]

logger = get_logger(__name__)

T = TypeVar("T")

_ATTEMPTS = 5
"""Of a request that a busy store or a broken connection ended."""
_SLOW_ATTEMPTS = 3
"""Of one that a silent store or wrong content ended: each costs a time limit or a download."""
_RETRY_S = 1.0
"""Most before the second attempt, drawn at random; then twice as long each time."""
_MOST_RETRY_S = 20.0
_GRACE = 4
"""Time limits until a transfer must have shown a rate."""
_SLOWEST = 10_000
"""Bytes a second below which a transfer is given up."""
_TRY_AGAIN = (408, 425, 429)
"""The statuses below 500 that a later request may not meet."""
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PART = ".part"


class WrongContentError(Exception):
    """What arrived is not what was promised."""


class _TooSlowError(Exception):
    """Bytes come, but the file would take for ever."""


class _GivenUpError(Exception):
    """The folder was closed."""


class _Watch(Callback):
    """Ends a transfer that brings more than was promised, or hardly anything.

    Args:
        limit: Most bytes that may come.
        grace_s: Seconds after which the mean rate is looked at.
        closed: Set where nobody waits for the file any more.
    """

    def __init__(self, limit: int, grace_s: float, closed: threading.Event) -> None:
        super().__init__()
        self._limit, self._grace_s, self._closed = limit, grace_s, closed
        self._received, self._start_s = 0, time.monotonic()

    def set_size(self, size: int | None) -> None:
        """Told by the store before the first bytes, if it knows."""
        if size is not None and size > self._limit:
            raise WrongContentError(f"{size} bytes are announced, at most {self._limit} are due")

    def relative_update(self, inc: int = 1) -> None:
        """Told after each piece."""
        self._received += inc
        elapsed_s = time.monotonic() - self._start_s
        if self._closed.is_set():
            raise _GivenUpError
        if self._received > self._limit:
            raise WrongContentError(f"more than the {self._limit} bytes that are due arrived")
        if elapsed_s > self._grace_s + self._received / _SLOWEST:
            raise _TooSlowError(f"{self._received} bytes in {elapsed_s:.0f} s are too few")


class Store:
    """The files below a URL.

    Args:
        url: Without a slash at the end.
        timeout_s: Seconds without a byte after which a request is given up.

    Raises:
        ConfigError: fsspec does not know the protocol, or needs a package for it.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
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
        """End what is under way, at its next bytes or before its next attempt."""
        self._closed.set()

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of each file; None where the store does not tell.

        Raises:
            ShardError: One is missing or may not be read, or the store does not answer.
        """
        paths = [f"{self._path}/{name}" for name in names]
        # 128 requests at a time, fsspec's own number.
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
        """Fetch one file under a temporary name, verify it, rename it.

        Args:
            name: Of the file below the URL.
            target: Where it goes.
            limit: Most bytes that it may have.
            verify: Raises `WrongContentError` where the file's content is not right.

        Raises:
            ShardError: It cannot be read, or is not what it should be.
        """

        def fetch() -> None:
            with _part_of(target) as part:
                watch = _Watch(limit, _GRACE * self._timeout_s, self._closed)
                within = self._within(_GRACE * self._timeout_s + limit / _SLOWEST)
                self._fs.get_file(f"{self._path}/{name}", str(part), callback=watch, **within)
                size = part.stat().st_size
                if size > limit:
                    raise WrongContentError(f"{size} bytes arrived, at most {limit} are due")
                verify(part)
                part.replace(target)

        self._persist(f"{self._url}/{name}", fetch)

    def _within(self, limit_s: float) -> dict[str, float]:
        """The limit of a whole call, which fsspec takes for stores that it reads asynchronously."""
        return {"timeout": limit_s} if self._fs.async_impl else {}

    def _persist(self, what: str, request: Callable[[], T]) -> T:
        """Make a request until it succeeds or trying again cannot help."""
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
        # Every store has errors of its own kind.
        except Exception as error:
            raise ShardError(_explain(what, _root(error), retrying)) from error

    def _stop(self, state: RetryCallState) -> bool:
        error = None if state.outcome is None else state.outcome.exception()
        return self._closed.is_set() or state.attempt_number >= _attempts(error)

    def remove_leftovers(self, root: Path) -> None:
        """Remove the temporary files of processes that ended before they could."""
        for path in root.glob(f"*/.*{_PART}"):
            with suppress(FileNotFoundError), path.open("rb") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # Somebody writes it.
                path.unlink(missing_ok=True)


def _options(url: str, timeout_s: float) -> dict[str, Any]:
    """The time limits in the words of the store's own package, where it does not have them."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return {"client_kwargs": {"timeout": limits}}


@contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """A temporary file beside `target`, locked as long as this process writes it."""
    while True:
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PART}")
        with part.open("xb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                # Who removes leftovers may have come between the two lines above.
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
    """What went wrong in the end, and what to do."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return (
            f"{what} does not exist ({error}); upload the complete folder that tools/shard.py "
            "wrote, or correct the URL"
        )
    if status in (401, 403) or isinstance(error, PermissionError):
        return f"{what} may not be read ({_in_words(error)}); look at the access rights"
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return f"{what} cannot be kept in data.download.folder: {error}; free space"
    count = retrying.statistics.get("attempt_number", 1)
    return f"{what} was not read in {count} attempts: {_in_words(error)}"


def _root(error: BaseException | None) -> BaseException | None:
    """What really happened: fsspec says FileNotFoundError for any failed question about a file."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in a store's error: of aiohttp, botocore or gcsfs."""
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
    """An error in one line; some have no text of their own."""
    root = _root(error)
    text = " ".join(str(root).split())
    if not text and isinstance(root, TimeoutError):
        return "no answer within the time limit"
    return text or type(root).__name__
