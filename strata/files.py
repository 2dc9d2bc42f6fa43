"""Files that are complete or absent, and their hashes: the one home of both rules."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["encode_text", "open_atomic", "sha256_of", "sync_path", "write_atomic"]


def encode_text(text: str) -> bytes:
    r"""Text or JSON as UTF-8; a byte of a name that is not UTF-8 as JSON writes it, `\udce9`.

    In Python such a byte is a lone surrogate (`surrogateescape`), which UTF-8 cannot hold. Python's
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
    """Open a file for writing that appears under `path` only when the block ends without an error.

    The content goes to a temporary file in the same folder, which is then renamed. After an error,
    or a crash, `path` is what it was before. The file gets the permissions of the user's umask.

    Args:
        path: The final name; an existing file is replaced.
        sync: Force the content and the new name to the disk, so that they survive a power failure.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as content:
            yield content
            content.flush()
            if sync:
                os.fsync(content.fileno())
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
