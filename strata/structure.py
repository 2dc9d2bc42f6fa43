"""Read facts from a container's structure that FFmpeg does not report: length and frame count.

Only headers of boxes, chunks and elements are read, so this is fast.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["declared_frames", "missing_bytes"]

_SLACK = 16
"""Bytes by which a complete file may be shorter than stated: writers that count their own header
are common."""

_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = 0x18538067

_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_MAX_BOXES = 1 << 20


@contextmanager
def _opened(where: Path | bytes) -> Iterator[tuple[BinaryIO, int]]:
    """Open the file and return it with its size."""
    with io.BytesIO(where) if isinstance(where, bytes) else where.open("rb") as file:
        yield file, file.seek(0, io.SEEK_END)


def declared_frames(where: Path | bytes) -> int:
    """Number of frames that an mp4 or mov declares, in its tables or in its largest fragment.

    FFmpeg allocates memory for them before it reads one, and a few bytes can declare a billion.

    Args:
        where: The file, or its content.

    Returns:
        The largest number of any video track; 0 for other formats.
    """
    with _opened(where) as (file, size):
        file.seek(4)
        if file.read(4) not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
            return 0
        most, is_video = 0, False
        ends, place = [size], 0
        for _ in range(_MAX_BOXES):
            while len(ends) > 1 and place >= ends[-1]:
                ends.pop()
            if place + 8 > ends[-1]:
                break
            file.seek(place)
            head = file.read(28)
            length, kind, start = int.from_bytes(head[:4], "big"), head[4:8], 8
            if length == 1:
                length, start = int.from_bytes(head[8:16], "big"), 16
            end = ends[-1] if length < start else place + length
            body = head[start:]
            if kind == b"hdlr" and body[4:8] != b"dhlr":  # QuickTime has one for data too.
                is_video = body[8:12] == b"vide"
            elif kind in (b"stsz", b"stz2") and is_video:
                most = max(most, int.from_bytes(body[8:12], "big"))
            elif kind == b"trun":
                most = max(most, int.from_bytes(body[4:8], "big"))
            if kind in _PARENTS:
                ends.append(min(end, ends[-1]))
                place += start
            else:
                place = end
    return most


def missing_bytes(where: Path | bytes) -> int:
    """Number of bytes that a file lacks up to the end of its last chunk, element or object.

    Args:
        where: The file, or its content.

    Returns:
        0 if it lacks none or the format does not state it.
    """
    with _opened(where) as (file, size):
        file.seek(0)
        head = file.read(16)
        end = 0
        if head[:4] == b"RIFF":
            end = _end_of_riff(file, size)
        elif head[:4] == _EBML:
            end = _end_of_ebml(file, size)
        elif head == _ASF_HEADER:
            end = _end_of_asf(file, size)
    return end - size if end > size + _SLACK else 0


def _end_of_riff(file: BinaryIO, size: int) -> int:
    """The end of the last RIFF chunk; large AVIs have several in sequence."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        # An interrupted recorder leaves 0, and some write the largest number possible.
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            break
        place += 8 + length + length % 2
    return place


def _end_of_asf(file: BinaryIO, size: int) -> int:
    """The end of the last top-level object."""
    place = 0
    while place + 24 <= size:
        file.seek(place)
        length = int.from_bytes(file.read(24)[16:], "little")
        if length < 24:
            break
        place += length
    return place


def _end_of_ebml(file: BinaryIO, size: int) -> int:
    """The end of the segment or, if its length is unknown, of the last cluster."""
    place = 0
    while place < size:
        file.seek(place)
        element, length = _ebml_number(file, keep_marker=True), _ebml_number(file)
        if element is None or length is None:
            break
        unknown = length < 0
        if element == _SEGMENT and unknown:
            place = file.tell()
            continue
        if unknown:
            break  # Clusters of a live stream: the end of the last one is unknown.
        place = file.tell() + length
    return place


def _ebml_number(file: BinaryIO, *, keep_marker: bool = False) -> int | None:
    """Read a number of variable length: an identifier or a size; -1 unknown, None at the end."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()
    rest = file.read(length - 1)
    if len(rest) < length - 1:
        return None
    value = int.from_bytes(first + rest, "big")
    if keep_marker:
        return value
    value -= 1 << 7 * length
    return -1 if value == (1 << 7 * length) - 1 else value
