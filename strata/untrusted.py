"""Validation of names and JSON from files and networks that others may have written.

A name from outside passes `checked_name` before it touches a path, a page or a metric. Names that
may have other characters, such as those of classes, pass `checked_text`, and become part of a path
only through `file_stem`. A JSON text from outside passes `decode_json`, which checks types and
ranges before any code sees a value.
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

import msgspec

from strata.errors import StrataError

__all__ = [
    "Digest",
    "checked_name",
    "checked_text",
    "decode_json",
    "decode_json_lines",
    "file_stem",
]

T = TypeVar("T")
D = TypeVar("D")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)
_MAX_NAME_LENGTH = 255
_SHOWN_CHARACTERS = 80
_SHOWN_ERROR = 300
_UNSAFE_IN_NAME = re.compile(r"[^A-Za-z0-9._-]")
_STEM_LENGTH = 100
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udc7f\udd00-\udfff]")
"""Control characters, line separators and lone surrogates, which UTF-8 cannot store. The surrogates
that represent a byte of a name that is not UTF-8 are allowed, see `encode_text`."""

# Not `$`, which would accept a newline at the end.
Digest = msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")
"""Annotation of a field that holds a SHA-256 in hexadecimal: `Annotated[str, Digest]`."""


def checked_name(name: object, what: str, where: object, error: type[StrataError]) -> str:
    """Return `name` if it is safe as the last part of a path, and raise otherwise.

    Safe are ASCII letters, digits, dot, underscore and hyphen, without a dot at the beginning.

    Args:
        name: The name as it was read.
        what: What it names, for the message: "shard", "checkpoint".
        where: The file or URL that it was read from, for the message.
        error: The error class to raise.

    Raises:
        StrataError: Of class `error`; the name does not have this form.
    """
    if isinstance(name, str) and len(name) <= _MAX_NAME_LENGTH and _NAME.fullmatch(name):
        return name
    raise error(
        f"{where} contains the {what} name {_shown(name)}, which is not allowed: use 1 to "
        f"{_MAX_NAME_LENGTH} ASCII letters, digits, '.', '_' and '-', and no '.' at the beginning"
    )


def _shown(name: object) -> str:
    shown = repr(name)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."


def checked_text(
    text: str, what: str, where: object, error: type[StrataError], max_length: int = 255
) -> str:
    """Return a name that is only shown to people if it is one line of bounded length.

    Args:
        text: The name as it was read.
        what: What it names, for the message: "class", "key".
        where: The file or URL that it was read from, for the message.
        error: The error class to raise.
        max_length: The most characters it may have.

    Raises:
        StrataError: Of class `error`; it is empty, too long, or has control characters.
    """
    if 0 < len(text) <= max_length and not _CONTROL.search(text):
        return text
    raise error(
        f"{where} contains the {what} name {_shown(text)}, which is not allowed: use 1 to "
        f"{max_length} characters without control characters"
    )


def file_stem(name: str) -> str:
    """Make a safe part of a file name from a sample's key, which may contain any character.

    A key of safe characters is unchanged. Otherwise each unsafe character becomes `_`, and a hash
    of the key is appended, so that different keys have different names.
    """
    safe = _UNSAFE_IN_NAME.sub("_", name)
    if safe == name and len(name) <= _STEM_LENGTH and not name.startswith("."):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{safe[:_STEM_LENGTH].lstrip('.')}-{digest}"


def decode_json(
    data: bytes | str,
    kind: type[T],
    where: object,
    error: type[StrataError],
    *,
    max_bytes: int = 1 << 30,
) -> T:
    """Decode JSON into `kind` and check every type and range that `kind` declares.

    Args:
        data: The text.
        kind: A dataclass, `msgspec.Struct` or other type whose annotations state types and ranges.
        where: The file or URL that it was read from, for the message.
        error: The error class to raise.
        max_bytes: A longer text is refused before it is parsed.

    Raises:
        StrataError: Of class `error`; the text is not JSON, or a field has another type or range.
            The message names the file and the field.
    """
    return _decode(lambda: _parse(data, kind), len(data), where, error, max_bytes)


def decode_json_lines(
    data: bytes, kind: type[T], where: object, error: type[StrataError], *, max_bytes: int = 1 << 32
) -> list[T]:
    """Decode one JSON value a line; see `decode_json`.

    Raises:
        StrataError: Of class `error`; the message names the place of the line, from 0.
    """
    return _decode(lambda: _parse_lines(data, kind), len(data), where, error, max_bytes)


def _parse(data: bytes | str, kind: type[T]) -> T:
    if not _has_surrogate(data):
        return msgspec.json.decode(data, type=kind)
    return msgspec.convert(json.loads(data, parse_constant=_refuse_constant), type=kind)


def _parse_lines(data: bytes, kind: type[T]) -> list[T]:
    if not _has_surrogate(data):
        return msgspec.json.Decoder(kind).decode_lines(data)
    return [_parse(line, kind) for line in data.split(b"\n") if line.strip()]


def _has_surrogate(data: bytes | str) -> bool:
    """Whether a name is not UTF-8, see `encode_text`; msgspec's parser rejects its escape."""
    return "\\udc" in data if isinstance(data, str) else b"\\udc" in data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _decode(
    parse: Callable[[], D], size: int, where: object, error: type[StrataError], max_bytes: int
) -> D:
    if size > max_bytes:
        raise error(f"{where} has {size} bytes; at most {max_bytes} are allowed")
    try:
        return parse()
    except RecursionError as cause:
        raise error(f"{where} is not valid: its values are nested too deeply") from cause
    except (msgspec.MsgspecError, ValueError) as cause:
        raise error(f"{where} is not valid: {str(cause)[:_SHOWN_ERROR]}") from cause
