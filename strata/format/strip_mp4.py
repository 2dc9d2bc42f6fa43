"""Select frames of mp4 segments and put them into one small mp4, without decoding.

DALI's video decoder does not seek: it decodes everything before the first frame of a clip. Every
group of pictures of a segment is closed and no frame is reordered (docs/data-format.md), so the
packets of each group from its key frame to its last selected frame are a valid stream. They are put
behind a new header of a few hundred bytes, so that nothing else is decoded.
"""

import struct
from collections.abc import Sequence

import numpy as np

from strata.errors import ShardError
from strata.format.schema import Buffer, FrameTable, NormalForm, checksum

__all__ = ["assemble_mp4", "chosen_packets"]

_HEAD = struct.Struct(">I4s")
_PATH_TO_DESCRIPTION = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
_UNITY = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_RATE = 25
"""Frame rate that the header states; it is not used, frames are selected by number."""
_MAX_DESCRIPTION = 1 << 16
_SIZE_AT = 48
"""Offset in the stsd box of the width and height of its first entry, 16 bits each."""


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return _HEAD.pack(8 + len(content), kind) + content


def _full(kind: bytes, *parts: bytes) -> bytes:
    """A box with version 0 and no flags."""
    return _box(kind, bytes(4), *parts)


def _table(kind: bytes, *numbers: int) -> bytes:
    return _full(kind, struct.pack(f">{len(numbers)}I", *numbers))


def _description(segment: memoryview) -> bytes:
    """The sample description box (stsd), which the decoder needs.

    Raises:
        ShardError: The bytes are not an mp4 with this box.
    """
    start, stop = 0, len(segment)
    for wanted in _PATH_TO_DESCRIPTION:
        while True:
            if start + _HEAD.size > stop:
                raise ShardError(
                    f"mp4: no {wanted.decode()} box; the shard is damaged, shard the videos again"
                )
            size, kind = _HEAD.unpack_from(segment, start)
            if size < _HEAD.size or start + size > stop:
                raise ShardError(
                    "mp4: a box reaches beyond the file; the shard is damaged, shard the videos "
                    "again"
                )
            if kind == wanted:
                break
            start += size
        start, stop = start + _HEAD.size, start + size
    return bytes(segment[start - _HEAD.size : stop])


def _check_description(description: bytes, table: FrameTable) -> None:
    """Check that a sample description states the frame size of the table.

    Raises:
        ShardError: Its size is not the table's, or there is more than one.
    """
    size = description[_SIZE_AT : _SIZE_AT + 4]
    count = description[12:16]
    expected = struct.pack(">2H", table.width, table.height)
    if len(description) > _MAX_DESCRIPTION or size != expected or count != b"\x00\x00\x00\x01":
        raise ShardError(
            f"mp4: the segment does not describe pictures of {table.width} x {table.height} "
            "pixels; the shard is damaged, shard the videos again"
        )


def _check_head(segment: memoryview, number: int, table: FrameTable) -> None:
    """Compare the bytes around a segment's frames with their checksum.

    Raises:
        ShardError: It differs.
    """
    if table.checksums is None:
        return
    places = table.segment(number)
    first = max(int(table.offsets[places.start]), 0)
    end = max(int(table.offsets[places.stop - 1]) + int(table.lengths[places.stop - 1]), 0)
    around = b"".join([segment[:first], segment[end:]])
    if checksum(around) != table.checksums.heads[number]:
        raise ShardError(
            f"mp4: segment {number} is damaged, the checksum of its header differs; shard the "
            "videos again"
        )


def _parameter_sets(description: bytes) -> bytes:
    """H.264 parameter sets, which the decoder needs; other codecs have them in the packets."""
    place = description.find(b"avcC")
    if place < 0:
        return b""
    (size,) = struct.unpack_from(">I", description, place - 4)
    return description[place : place - 4 + size]


def chosen_packets(
    table: FrameTable, form: NormalForm, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the packets that must be decoded to get the given frames.

    Args:
        table: The frame table of the sample.
        form: The normal form, which states the distance of key frames.
        frames: Shape `[N]`, int64, ascending, each once.

    Returns:
        Frame numbers of the packets, ascending, and which of them are key frames; both `[P]`.
    """
    if form.codec == "mjpeg":
        return frames, np.ones(len(frames), bool)
    inside = frames % table.frames_per_segment
    keys = frames - inside % form.gop
    last_of_group = np.flatnonzero(np.diff(keys, append=-1) != 0)
    runs = [
        np.arange(key, last + 1)
        for key, last in zip(keys[last_of_group], frames[last_of_group], strict=True)
    ]
    packets = np.concatenate(runs)
    return packets, packets % table.frames_per_segment % form.gop == 0


def assemble_mp4(
    segments: Sequence[Buffer], table: FrameTable, form: NormalForm, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Build an mp4 with the packets that are needed to decode the given frames of a sample.

    Args:
        segments: The sample's mp4 members in order; those without a selected frame may be empty.
        table: The sample's `frames.i32` member.
        form: The set's normal form.
        frames: Shape `[N]`, int64, N at least 1, ascending, each once, each in [0, F).

    Returns:
        Shape `[B]`, uint8: an mp4 of one track; shape `[N]`, int32: the numbers of the given frames
        in it; and its number of frames.

    Raises:
        ShardError: A frame is out of range, a segment is no mp4 of this size, the table points
            outside it, or a checksum differs.
    """
    if frames[0] < 0 or frames[-1] >= table.num_frames:
        raise ShardError(
            f"mp4: frames {frames[0]} to {frames[-1]} asked for, the sample has "
            f"{table.num_frames}; indices start at 0"
        )
    packets, is_key = chosen_packets(table, form, frames)
    homes = packets // table.frames_per_segment
    if homes[-1] >= len(segments):
        raise ShardError(
            f"mp4: {len(segments)} segments, frame {frames[-1]} is in a later one; "
            "the shard is damaged, shard the videos again"
        )
    views = {h: memoryview(segments[h]) for h in np.unique(homes).tolist()}  # pyright: ignore[reportArgumentType]
    for home, view in views.items():
        _check_head(view, home, table)
    descriptions = [_description(view) for view in views.values()]
    for description in descriptions:
        _check_description(description, table)
    if len({_parameter_sets(d) for d in descriptions}) != 1:
        raise ShardError(
            "mp4: the segments of a sample were encoded differently; shard the videos again"
        )
    offsets, lengths = table.offsets[packets].tolist(), table.lengths[packets].tolist()
    if min(offsets) < 0 or min(lengths) < 1:
        raise ShardError("mp4: the frame table is damaged; shard the videos again")
    parts = [
        views[home][offset : offset + length]
        for home, offset, length in zip(homes.tolist(), offsets, lengths, strict=True)
    ]
    if sum(map(len, parts)) != sum(lengths):
        raise ShardError(
            "mp4: the frame table points outside its segment; "
            "the shard is damaged, shard the videos again"
        )
    if table.checksums is not None:
        expected = table.checksums.frames[packets].tolist()
        for packet, part, wanted in zip(packets.tolist(), parts, expected, strict=True):
            if checksum(part) != wanted:
                raise ShardError(
                    f"mp4: frame {packet} is damaged, its checksum differs; shard the videos again"
                )
    head = _header(descriptions[0], table, lengths, np.flatnonzero(is_key) + 1)
    joined = bytearray().join([head, *parts])
    places = np.searchsorted(packets, frames).astype(np.int32)
    return np.frombuffer(joined, np.uint8), places, len(packets)


def _header(
    description: bytes, table: FrameTable, lengths: Sequence[int], keys: np.ndarray
) -> bytes:
    """The bytes before the packets, by ISO/IEC 14496-12: one track, one chunk."""
    count = len(lengths)
    brand = _box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomiso2mp41")
    size = struct.pack(">2I", table.width << 16, table.height << 16)

    def movie(offset: int) -> bytes:
        samples = _box(
            b"stbl",
            description,
            _table(b"stts", 1, count, 1),
            _table(b"stss", len(keys), *keys.tolist()),
            _table(b"stsc", 1, 1, count, 1),
            _table(b"stsz", 0, count, *lengths),
            _table(b"stco", 1, offset),
        )
        here = _box(b"url ", b"\x00\x00\x00\x01")
        media = _box(
            b"mdia",
            _full(b"mdhd", struct.pack(">4I2H", 0, 0, _RATE, count, 0x55C4, 0)),
            _full(b"hdlr", bytes(4), b"vide", bytes(13)),
            _box(
                b"minf",
                _box(b"vmhd", b"\x00\x00\x00\x01", bytes(8)),
                _box(b"dinf", _full(b"dref", struct.pack(">I", 1), here)),
                samples,
            ),
        )
        track = _box(
            b"tkhd",
            b"\x00\x00\x00\x03",
            struct.pack(">5I", 0, 0, 1, 0, count),
            bytes(16),
            _UNITY,
            size,
        )
        movie_header = _full(
            b"mvhd",
            struct.pack(">4I", 0, 0, _RATE, count),
            struct.pack(">IH", 0x10000, 0x100),
            bytes(10),
            _UNITY,
            bytes(24),
            struct.pack(">I", 2),
        )
        return _box(b"moov", movie_header, _box(b"trak", track, media))

    # The header contains the packets' offset; its value does not change the header's length.
    start = len(brand) + len(movie(0)) + _HEAD.size
    return brand + movie(start) + _HEAD.pack(_HEAD.size + sum(lengths), b"mdat")
