"""Read and write a shard's index file: the place of each member, in DALI's `wds2idx` form."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from strata.errors import ShardError
from strata.format.schema import ShardEntry
from strata.untrusted import checked_text

__all__ = [
    "INDEX_VERSION",
    "Place",
    "SampleMembers",
    "escape_name",
    "index_bytes",
    "parse_index",
    "read_index",
]

INDEX_VERSION = "v1.2"
"""Version of DALI's `wds2idx`."""
_BREAKS_LINES = re.compile(r"[\s\x00-\x20\x7f-\xa0\u2028\u2029\ud800-\udfff]")
_WORDS = 4
"""Words that describe a member: extension, offset, size, name."""

Place = tuple[int, int]
"""Offset in the shard and size, in bytes."""
SampleMembers = tuple[str, dict[str, Place]]
"""A sample's key, and the place of each of its members by extension."""


def escape_name(name: str) -> str:
    """Escape a name or key for the index.

    A space, a control character or a byte that is not UTF-8 would break the index's lines, so these
    characters are percent-encoded as in a URL, `%20`.
    """
    return _BREAKS_LINES.sub(
        lambda m: "".join(f"%{b:02X}" for b in m[0].encode("utf-8", "surrogateescape")), name
    )


def index_bytes(lines: Sequence[str]) -> bytes:
    """Make the content of an index from a line for each sample: `ext offset size name` ..."""
    return "".join([f"{INDEX_VERSION} {len(lines)}\n", *(f"{line}\n" for line in lines)]).encode()


def parse_index(content: bytes, where: object, num_bytes: int) -> list[SampleMembers]:
    """Parse an index into the keys and members of all samples.

    Args:
        content: The bytes of the index file.
        where: Its name, for the message.
        num_bytes: Size of the shard; no member may reach beyond it.

    Raises:
        ShardError: It is not an index, or a member is not inside the shard.
    """
    try:
        header, *lines = content.decode("utf-8").removesuffix("\n").split("\n")
        if header != f"{INDEX_VERSION} {len(lines)}":
            raise ShardError(f"its first line is {header[:40]!r}, but {len(lines)} lines follow")
        return [_parse_line(line.split(" "), where, num_bytes) for line in lines]
    except (ValueError, ShardError) as error:
        raise ShardError(
            f"index {where} is damaged ({error}); copy it again, or run the same tools/shard.py "
            "again"
        ) from error


def _parse_line(words: list[str], where: object, num_bytes: int) -> SampleMembers:
    if len(words) % _WORDS:
        raise ShardError(f"a line has {len(words)} words")
    # Keys of foreign shards may contain dots, so the extension decides where a name is split.
    key = words[3].removesuffix(f".{words[0]}")
    members: dict[str, Place] = {}
    for k in range(0, len(words), _WORDS):
        ext, offset, size, name = words[k : k + _WORDS]
        place = int(offset), int(size)
        if place[0] < 0 or place[1] < 0 or sum(place) > num_bytes:
            raise ShardError(f"member {name[:80]!r} is not inside the shard")
        if name != f"{key}.{ext}":
            raise ShardError(f"member {name[:80]!r} is listed as {ext[:80]!r} of {key[:80]!r}")
        members[ext] = place
    if len(members) * _WORDS != len(words):
        raise ShardError(f"a member of {key[:80]!r} is listed twice")
    checked_text(key, "key", where, ShardError, 1024)
    return key, members


def read_index(path: Path, entry: ShardEntry, keys: Sequence[str]) -> list[dict[str, Place]]:
    """Read the places of the members of all samples of a shard, by extension.

    Args:
        path: The index file.
        entry: The shard.
        keys: The keys that the manifest lists for it, in order.

    Raises:
        ShardError: The file is missing, damaged, or lists other samples.
    """
    try:
        # A member's line is not longer than its header and content in the tar, except for names.
        if path.stat().st_size > 2 * entry.num_bytes:
            raise ShardError(f"index {path} is larger than its shard; copy it again")
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"index {path} is missing or cannot be read ({error.strerror}); copy it again, or run "
            "the same tools/shard.py again"
        ) from error
    if entry.index_sha256 is not None and hashlib.sha256(content).hexdigest() != entry.index_sha256:
        raise ShardError(
            f"index {path} is damaged: its SHA-256 is not that of the manifest; copy it again, "
            "or run the same tools/shard.py again"
        )
    samples = parse_index(content, path, entry.num_bytes)
    if [key for key, _ in samples] != list(keys):
        raise ShardError(
            f"index {path} lists {len(samples)} samples, which are not the {len(keys)} of the "
            "manifest; run the same tools/shard.py again"
        )
    return [members for _, members in samples]
