"""Atomic file writing, SHA-256 of files, and a lock on a folder."""

import hashlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import msgspec

from strata.errors import StrataError
from strata.logs import get_logger
from strata.untrusted import decode_json

__all__ = [
    "FolderLock",
    "LockRecord",
    "encode_text",
    "open_atomic",
    "sha256_of",
    "sync_path",
    "write_atomic",
]

logger = get_logger(__name__)


def encode_text(text: str) -> bytes:
    r"""Encode text or JSON as UTF-8; a byte of a name that is not UTF-8 is escaped, `\udce9`.

    In Python such a byte is a lone surrogate (`surrogateescape`), not valid in UTF-8. Python's
    `json` and `strata.untrusted.decode_json` read the escape back as that surrogate.
    """
    return text.encode("utf-8", "backslashreplace")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def open_atomic(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a file that appears under `path` only when the block ends without an error.

    The content is written to a temporary file in the same folder, which can also be read and is
    renamed at the end. After an error or a crash `path` is unchanged. The file gets the permissions
    of the user's umask, also where a library writes to the handle's name and puts a file of its own
    there (safetensors makes those readable for their owner only).

    Args:
        path: The final name; an existing file is replaced.
        sync: Force the content and the new name to the disk, so that they survive a power failure.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x+b") as content:
            mode = os.fstat(content.fileno()).st_mode & 0o777
            yield content
        if temporary.stat().st_mode & 0o777 != mode:
            temporary.chmod(mode)
        if sync:
            sync_path(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_path(path.parent)


def write_atomic(path: Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write a file so that `path` holds either its old or its new content, never a part.

    Args:
        path: The file.
        content: Bytes, or text that is stored as UTF-8.
        sync: As in `open_atomic`.

    Raises:
        OSError: The file cannot be written.
    """
    data = encode_text(content) if isinstance(content, str) else content
    with open_atomic(path, sync=sync) as target:
        target.write(data)


class LockRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a lock file: the process that holds the folder."""

    host: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,255}\Z")]
    machine: Annotated[str, msgspec.Meta(max_length=200)]
    """Boot of the kernel and PID namespace, within which a process number is unique."""
    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    started: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    """Start time of the process, in the kernel's ticks since boot."""
    token: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    """Distinguishes two locks of one process."""

    @classmethod
    def own(cls) -> "LockRecord":
        """A record of this process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(
            host=re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())[:255] or "unknown",
            machine=f"{boot} {os.readlink('/proc/self/ns/pid')}",
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            token=secrets.token_hex(16),
        )

    def runs(self) -> bool:
        """Whether the process, one of this machine, still runs."""
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class FolderLock:
    """Context manager that locks a folder, so that only this process writes to it.

    The lock is a file that names its holder; the holder renews the file's modification time every
    `BEAT_S` seconds. This works on network file systems without a lock service:

    - If the holder is on the same machine, it is looked up by process number and start time. If it
      has ended, the lock is taken over at once.
    - The lock of another machine is watched: if it is renewed, its holder is alive. If it is not
      renewed for `STALE_S` seconds, its holder is assumed dead and the lock is taken over. So a
      job that a cluster restarts on another machine waits and then runs.

    If a holder was suspended so long that another process took its lock, `lost` is set, and it must
    not write any more.

    Args:
        folder: The folder; it must exist.
        work: What the holder does, for the message: "training".
        error: The error class to raise.
        advice: What to do if the folder is in use; the end of the message.
        name: Name of the lock file in the folder.
    """

    BEAT_S = 10.0
    STALE_S = 60.0
    _SETTLE_S = 0.2

    def __init__(
        self, folder: Path, work: str, error: type[StrataError], advice: str, name: str = ".lock"
    ) -> None:
        self._path, self._work, self._error, self._advice = folder / name, work, error, advice
        self._record = LockRecord.own()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="strata-lock", daemon=True)
        self.lost = False
        """Whether another process has taken the lock."""

    def __enter__(self) -> "FolderLock":
        """Take the lock.

        Raises:
            StrataError: Of class `error`; another process holds the lock.
            OSError: The folder cannot be written.
        """
        content = msgspec.json.encode(self._record)
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self._wait_until_stale()
            write_atomic(self._path, content, sync=False)
            # Others that found it stale at the same time have written by now; the last one has it.
            time.sleep(self._SETTLE_S)
            holder = self._look()[0]
            if holder != self._record:
                raise self._in_use(holder) from None
        else:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._look()[0] == self._record:
            self._path.unlink(missing_ok=True)

    def _look(self) -> tuple[LockRecord | None, int]:
        """The lock's record and the time of its renewal; None if it is absent or unreadable."""
        try:
            # Opened, not only stat: a network file system then asks its server.
            with self._path.open("rb") as file:
                changed, content = os.fstat(file.fileno()).st_mtime_ns, file.read(1 << 16)
        except FileNotFoundError:
            return None, -1
        try:
            return decode_json(content, LockRecord, self._path, self._error), changed
        except StrataError:
            return None, changed  # It is being written, or its writer was killed; waiting decides.

    def _wait_until_stale(self) -> None:
        first = holder, _ = self._look()
        deadline = time.monotonic() + self.STALE_S
        while True:
            if holder is not None and holder.machine == self._record.machine:
                if holder.runs():
                    raise self._in_use(holder)
                return
            if first[1] == -1 or time.monotonic() > deadline:
                return
            time.sleep(min(1.0, self.STALE_S / 10))
            now = self._look()
            if now[1] == -1:
                return
            if now != first:
                raise self._in_use(now[0])

    def _in_use(self, holder: LockRecord | None) -> StrataError:
        return self._error(
            f"{self._path.parent} is in use: {holder or 'another process'} is {self._work} there; "
            f"{self._advice}"
        )

    def _beat(self) -> None:
        while not self._over.wait(self.BEAT_S):
            try:
                if self._look()[0] != self._record:
                    self.lost = True
                    return
                os.utime(self._path)
            except OSError as error:
                # The server may be away for a while; the next renewal tries again.
                logger.warning("%s cannot be renewed: %s", self._path, error)


def _started(pid: int) -> int | None:
    """Start time of a process in ticks since boot; None if it does not run."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may contain any character, also spaces.
    state, *fields = line.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
