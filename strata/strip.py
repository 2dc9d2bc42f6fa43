"""Cut frames out of a strip, and join cut frames to a new one, without decoding anything.

A strip is one tall baseline JPEG that holds frames stacked from top to bottom, with a restart
marker exactly at each frame's end. A restart resets the entropy coder and the DC prediction, so a
frame's coded bytes mean the same wherever they stand behind the same tables. What libjpeg does
after decoding is not quite local: its smooth chroma upsampling lets the first and the last row of a
frame see the chroma of the neighbour in the strip. All other rows of an assembled strip decode to
the same bits as in the full strip.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from strata.errors import ShardError
from strata.schema import MAX_JPEG_ROWS, FrameTable

__all__ = ["Buffer", "assemble_strip", "parse_strip"]

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF0, _DRI, _SOS = 0xC0, 0xDD, 0xDA
_RESTARTS = tuple(bytes((0xFF, 0xD0 + k)) for k in range(8))

Buffer = bytes | bytearray | memoryview | np.ndarray


def _find_headers(jpeg: bytes) -> dict[int, int]:
    """The offset of each marker before the coded data, by its second byte; -1 is where they end.

    Raises:
        ShardError: The bytes are not the beginning of a JPEG.
    """
    if jpeg[:2] != _SOI:
        raise ShardError("strip: not a JPEG; the shard is damaged, shard the videos again")
    found: dict[int, int] = {}
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        found[marker] = place
        place += 2 + (jpeg[place + 2] << 8 | jpeg[place + 3])
        if marker == _SOS:
            found[-1] = place
            return found
    raise ShardError("strip: the JPEG header is damaged; shard the videos again")


def parse_strip(jpeg: Buffer) -> tuple[np.ndarray, np.ndarray]:
    """Find where each frame's coded bytes are.

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
    # In coded data 0xFF is followed by a zero or is a marker, so two bytes decide.
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
    """Join any selection of a sample's frames to one strip, in the order given.

    Args:
        segments: The sample's JPEG members in order; those that no index touches may be empty,
            but not the first, whose header is used.
        table: The sample's `frames.i32` member.
        indices: Shape `[N]`, each in [0, F); any order, repeats allowed.

    Returns:
        Shape `[B]`, uint8, writable: a JPEG of N * height rows.

    Raises:
        ShardError: An index is out of range, there are none or more than fit one JPEG, or the
            table points outside its segment.
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
    header = bytearray(segments[0][: int(table.offsets[0])])
    size_at = _find_headers(bytes(header)).get(_SOF0)
    if size_at is None:
        raise ShardError("strip: the JPEG is not baseline; shard the videos again")
    header[size_at + 5 : size_at + 7] = num_rows.to_bytes(2, "big")

    starts = table.offsets[chosen]
    ends = starts + table.lengths[chosen]
    parts: list[Any] = [header]
    views = [memoryview(segment) for segment in segments]  # pyright: ignore[reportArgumentType]
    homes = (chosen // table.frames_per_segment).tolist()
    for k, (home, start, end) in enumerate(zip(homes, starts.tolist(), ends.tolist(), strict=True)):
        parts.append(views[home][start:end])
        parts.append(_RESTARTS[k & 7])
    parts[-1] = _EOI
    joined = bytearray().join(parts)
    # A slice beyond a segment's end is silently shorter: one comparison finds it.
    if len(joined) != len(header) + int((ends - starts).sum()) + 2 * count:
        raise ShardError(
            "strip: the frame table points outside its segment; "
            "the shard is damaged, shard the videos again"
        )
    return np.frombuffer(joined, np.uint8)
