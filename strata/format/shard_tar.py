"""Writes the tar members of samples with webdataset's `TarWriter`, always with the same bytes."""

import importlib
import importlib.util
import sys
import tarfile
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

__all__ = ["ARCHIVE_END", "BLOCK", "MemberPlace", "append_members", "member_header"]

BLOCK = 512
"""Bytes of a header; contents are padded to a multiple of it."""
ARCHIVE_END = bytes(2 * BLOCK)
"""The end of a shard, behind its last member."""
_MODE = 0o644

MemberPlace = tuple[str, int, int]
"""Name of a member, offset of its content in the file and size of its content, in bytes."""


def _tar_writer_class() -> "type[TarWriter]":
    """Import `TarWriter` without the rest of webdataset.

    The package's `__init__` imports torch: 1.6 s of CPU time and 260 MB of memory in every worker
    process, which uses neither. So its modules are imported under the name of an empty package.
    """
    name = "strata_webdataset_modules"
    if name not in sys.modules:
        spec = importlib.util.find_spec("webdataset")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("webdataset is not installed; run: pip install webdataset")
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
    return importlib.import_module(f"{name}.writer").TarWriter


def append_members(
    file: BinaryIO, key: str, members: Iterable[tuple[str, bytes]]
) -> list[MemberPlace]:
    """Append members of one sample to a shard, or to a part of one.

    Owner, time and mode are fixed, so names and contents alone determine the bytes. No end of an
    archive is written: the bytes of several calls, joined in order and followed by `ARCHIVE_END`,
    are a shard.

    Args:
        file: Open for writing, at its end; stays open.
        key: The sample's.
        members: Extension and content of each, in the order of the format.

    Returns:
        The place of each member in the file.

    Raises:
        ValueError: A name has over 100 bytes or is not ASCII, so its header would not be one block.
        OSError: The file cannot be written.
    """
    places: list[MemberPlace] = []
    end = file.tell()
    with _tar_writer_class()(
        file, user="", group="", mode=_MODE, mtime=0, encoder=False, compress=False
    ) as tar:
        for ext, content in members:
            name = f"{key}.{ext}"
            if len(name) > tarfile.LENGTH_NAME or not name.isascii():
                raise ValueError(f"{name!r} is no name for a shard: use up to 100 ASCII characters")
            # One member a call: `write` would sort them, and the 1001st segment is not the last.
            tar.write({"__key__": key, ext: content})
            places.append((name, end + BLOCK, len(content)))
            end += BLOCK + len(content) + -len(content) % BLOCK
    # Closing wrote the end of an archive and padding; more members may follow here.
    file.seek(end)
    file.truncate()
    return places


def member_header(name: str, num_bytes: int) -> bytes:
    """Compute the header that `append_members` writes for a member, to compare with one read."""
    header = tarfile.TarInfo(name)
    header.size = num_bytes
    header.mode = _MODE
    return header.tobuf(tarfile.USTAR_FORMAT)
