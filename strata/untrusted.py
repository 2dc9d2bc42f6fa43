"""Checks for everything that is read from files and networks that others may have written.

A name from outside passes `checked_name` before it touches a path, a page or a metric. A JSON text
from outside passes `decode_json`, which checks types and ranges before any code sees a value.
"""

import json
import re
from typing import NoReturn, TypeVar

import msgspec

from strata.errors import StrataError

__all__ = ["Digest", "checked_name", "decode_json"]

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)
_MAX_NAME_LENGTH = 255
_SHOWN_CHARACTERS = 80

Digest = msgspec.Meta(pattern="^[0-9a-f]{64}$")
"""Annotation of a field that holds a SHA-256 in hexadecimal: `Annotated[str, Digest]`."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def checked_name(
    name: object, what: str, where: object, error: type[StrataError], max_length: int = 255
) -> str:
    """Return `name` if it is safe as the last part of a path, and raise otherwise.

    Safe are ASCII letters, digits, dot, underscore and hyphen, without a dot at the beginning.

    Args:
        name: The name as it was read.
        what: What it names, for the message: "shard", "checkpoint".
        where: The file or URL that it was read from, for the message.
        error: The error class to raise.
        max_length: The most characters it may have, at most 255.

    Raises:
        StrataError: Of class `error`; the name is of another form.
    """
    limit = min(max_length, _MAX_NAME_LENGTH)
    if isinstance(name, str) and len(name) <= limit and _NAME.fullmatch(name):
        return name
    shown = repr(name)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    raise error(
        f"{where} contains the {what} name {shown}, which is not allowed: use 1 to {limit} ASCII "
        "letters, digits, '.', '_' and '-', and no '.' at the beginning"
    )


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
    if len(data) > max_bytes:
        raise error(f"{where} has {len(data)} bytes; at most {max_bytes} are allowed")
    try:
        if "\\udc" in data if isinstance(data, str) else b"\\udc" in data:
            # Bytes of a name that is not UTF-8, see `encode_text`; msgspec's parser refuses them.
            content = json.loads(data, parse_constant=_refuse_constant)
            return msgspec.convert(content, type=kind, str_keys=True)
        return msgspec.json.decode(data, type=kind)
    except RecursionError as cause:
        raise error(f"{where} is not valid: its values are nested too deeply") from cause
    except (msgspec.MsgspecError, ValueError) as cause:
        raise error(f"{where} is not valid: {cause}") from cause
