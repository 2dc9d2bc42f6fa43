"""Select frames of a strip (a tall JPEG of stacked frames) without decoding it.

A strip is one tall baseline JPEG that holds frames stacked from top to bottom, with a restart
marker exactly at each frame's end. A restart resets the entropy coder and the DC prediction, so a
frame's coded bytes decode to the same coefficients at any position after the same tables. Only
libjpeg's smooth chroma upsampling crosses the border: the first and the last row of a frame use the
chroma of the adjacent frame in the strip. All other rows of an assembled strip decode to the same
bits as in the full strip.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from strata.errors import ShardError
from strata.format.schema import MAX_JPEG_ROWS, Buffer, FrameTable, checksum

__all__ = ["assemble_strip", "check_head", "parse_strip"]

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF0, _DHT, _DQT, _DRI, _SOS, _APP0, _COM = 0xC0, 0xC4, 0xDB, 0xDD, 0xDA, 0xE0, 0xFE
_RESTARTS = tuple(bytes((0xFF, 0xD0 + k)) for k in range(8))
_MARKERS = frozenset({_SOF0, _DHT, _DQT, _DRI, _SOS, _APP0, _COM})
"""JPEG markers that are allowed in a header. Others change colours or the coding, or make libraries
parse data that no frame needs."""
_ONCE = frozenset({_SOF0, _DRI, _SOS})
_MAX_HEADER = 1 << 14
_BLOCK = 16
"""Rows and columns that one coded unit covers with 4:2:0."""


def _find_headers(jpeg: bytes) -> dict[int, int]:
    """Offset of each header marker by its second byte; key -1 is the start of coded data.

    Raises:
        ShardError: The bytes are not the beginning of a JPEG, or it has a marker that is not
            allowed in a strip.
    """
    if jpeg[:2] != _SOI:
        raise ShardError("strip: not a JPEG; the shard is damaged, shard the videos again")
    found: dict[int, int] = {}
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker not in _MARKERS or (marker in _ONCE and marker in found):
            raise ShardError(
                f"strip: not a baseline JPEG with restart markers (marker {marker:#04x}); "
                "shard the videos again"
            )
        found[marker] = place
        place += 2 + (jpeg[place + 2] << 8 | jpeg[place + 3])
        if marker == _SOS:
            found[-1] = place
            return found
    raise ShardError("strip: the JPEG header is damaged; shard the videos again")


@lru_cache(maxsize=1024)
def check_head(header: bytes, width: int, height: int) -> int:
    """Check that a header is that of a strip with frames of the given size.

    Args:
        header: The bytes before the first frame.
        width: Columns of a frame.
        height: Rows of a frame.

    Returns:
        Offset of the strip's number of rows, two bytes.

    Raises:
        ShardError: The header is not that of a baseline 4:2:0 JPEG of this width with a restart
            marker after each frame.
    """
    if len(header) > _MAX_HEADER:
        raise ShardError(f"strip: a header of {len(header)} bytes; the shard is damaged")
    found = _find_headers(header)
    size_at, restart_at, scan_at = (found.get(marker, -1) for marker in (_SOF0, _DRI, _SOS))
    if size_at < 0 or restart_at < 0:
        raise ShardError("strip: not a baseline JPEG with restart markers; shard the videos again")
    picture = header[size_at + 2 : size_at + 19]
    components = picture[8::3]
    scan = header[scan_at + 2 : found[-1]]
    units = (width // _BLOCK) * (height // _BLOCK)
    fine = (
        found[-1] == len(header)
        and len(picture) == 17
        and picture[:3] == b"\x00\x11\x08"
        and picture[5:7] == width.to_bytes(2, "big")
        and picture[7] == 3
        and picture[9::3] == b"\x22\x11\x11"
        and header[restart_at + 2 : restart_at + 6] == struct.pack(">2H", 4, units)
        and scan[:3] == b"\x00\x0c\x03"
        and scan[3:9:2] == components
        and scan[9:] == b"\x00\x3f\x00"
    )
    if not fine:
        raise ShardError(
            f"strip: the header is not that of frames of {width} x {height} pixels; the shard is "
            "damaged, shard the videos again"
        )
    return size_at + 5


def parse_strip(jpeg: Buffer) -> tuple[np.ndarray, np.ndarray]:
    """Find the coded bytes of each frame of a strip.

    Args:
        jpeg: A strip: baseline JPEG, one scan, a restart marker at each frame's end.

    Returns:
        Offsets from the JPEG's start and lengths without the restart marker, both `[F]`, int32.
        The bytes before the first offset are the header that all selections share.

    Raises:
        ShardError: The bytes are not such a JPEG, or are cut off.
    """
    coded = np.frombuffer(jpeg, np.uint8)
    headers = _find_headers(coded[:4096].tobytes())
    if _SOF0 not in headers or _DRI not in headers:
        raise ShardError("strip: not a baseline JPEG with restart markers; shard the videos again")
    start = headers[-1]
    if len(coded) < start + 2 or coded[-2:].tobytes() != _EOI:
        raise ShardError("strip: the JPEG is cut off; the shard is damaged, shard the videos again")
    # In coded data 0xFF is followed by a zero or is a marker, so two bytes are enough.
    after_ff = np.flatnonzero(coded[start:-2] == 0xFF) + (start + 1)
    restarts = after_ff[(coded[after_ff] & 0xF8) == 0xD0] - 1
    expected = np.arange(len(restarts)) % 8
    if not np.array_equal(coded[restarts + 1] & 7, expected):
        raise ShardError("strip: restart markers out of order; shard the videos again")
    offsets = np.concatenate([[start], restarts + 2]).astype(np.int32)
    ends = np.concatenate([restarts, [len(coded) - 2]])
    return offsets, (ends - offsets).astype(np.int32)


def assemble_strip(
    segments: Sequence[Buffer], table: FrameTable, indices: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Build a strip from any selection of a sample's frames, in the given order.

    Args:
        segments: The sample's JPEG members in order; those without a selected frame may be empty,
            except the first, whose header is used.
        table: The sample's `frames.i32` member.
        indices: Shape `[N]`, each in [0, F); any order, repeats allowed.

    Returns:
        Shape `[B]`, uint8, writable: a JPEG of N * height rows.

    Raises:
        ShardError: An index is out of range, there are none or more than fit one JPEG, the table
            points outside its segment, a checksum differs, or the header does not match the
            table.
    """
    chosen = np.asarray(indices, np.int64)
    count = len(chosen)
    num_rows = count * table.height
    if not 0 < num_rows <= MAX_JPEG_ROWS:
        raise ShardError(
            f"strip: {count} frames of {table.height} rows asked for; "
            f"use 1 to {MAX_JPEG_ROWS // table.height}"
        )
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= table.num_frames:
        raise ShardError(
            f"strip: frame {low if low < 0 else high} asked for, "
            f"the sample has {table.num_frames}; indices start at 0"
        )
    if high // table.frames_per_segment >= len(segments):
        raise ShardError(
            f"strip: {len(segments)} segments, frame {high} is in a later one; "
            "the shard is damaged, shard the videos again"
        )
    head = bytes(segments[0][: int(table.offsets[0])])
    sums = table.checksums
    if sums is not None and checksum(head) != sums.heads[0]:
        raise ShardError("strip: the header is damaged, its checksum differs; shard again")
    header = bytearray(head)
    rows_at = check_head(head, table.width, table.height)
    header[rows_at : rows_at + 2] = num_rows.to_bytes(2, "big")

    starts = table.offsets[chosen].astype(np.int64)
    lengths = table.lengths[chosen].astype(np.int64)
    if int(starts.min()) < 0 or int(lengths.min()) < 1:
        raise ShardError("strip: the frame table is damaged; shard the videos again")
    parts: list[Any] = [header]
    views = [memoryview(segment) for segment in segments]  # pyright: ignore[reportArgumentType]
    homes = (chosen // table.frames_per_segment).tolist()
    wanted = None if sums is None else sums.frames[chosen].tolist()
    for k, (home, start, end) in enumerate(
        zip(homes, starts.tolist(), (starts + lengths).tolist(), strict=True)
    ):
        part = views[home][start:end]
        if wanted is not None and checksum(part) != wanted[k]:
            raise ShardError(
                f"strip: frame {chosen[k]} is damaged, its checksum differs; shard again"
            )
        parts.append(part)
        parts.append(_RESTARTS[k & 7])
    parts[-1] = _EOI
    joined = bytearray().join(parts)
    # A slice beyond a segment's end is silently shorter; one comparison detects it.
    if len(joined) != len(header) + int(lengths.sum()) + 2 * count:
        raise ShardError(
            "strip: the frame table points outside its segment; "
            "the shard is damaged, shard the videos again"
        )
    return np.frombuffer(joined, np.uint8)
