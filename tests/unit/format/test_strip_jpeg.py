import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from strata.errors import ShardError
from strata.format.schema import FrameTable, NormalForm
from strata.format.strip_jpeg import assemble_strip, parse_strip
from tests.support.shard_folders import old_table, table_of

HEIGHT, WIDTH = 32, 48


def make_frames(count: int, seed: int = 0) -> np.ndarray:
    """Noise over a gradient, so that no two frames have equal coded bytes; `[F, H, W, 3]`."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 150, WIDTH)[None, None, :, None]
    noise = random.integers(0, 100, (count, HEIGHT, WIDTH, 3))
    return (ramp + noise).astype(np.uint8)


def encode(frames: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(frames.reshape(-1, WIDTH, 3))
    settings = {
        "quality": 90,
        "subsampling": "4:2:0",
        "restart_marker_rows": HEIGHT // 16,
        **options,
    }
    picture.save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def decode(jpeg: np.ndarray | bytes) -> np.ndarray:
    picture = np.asarray(Image.open(io.BytesIO(bytes(jpeg))))
    return picture.reshape(-1, HEIGHT, WIDTH, 3)


def make_sample(count: int, per_segment: int) -> tuple[list[bytes], FrameTable]:
    frames = make_frames(count)
    segments = [encode(frames[k : k + per_segment]) for k in range(0, count, per_segment)]
    form = NormalForm(width=WIDTH, height=HEIGHT, segment_frames=per_segment)
    return segments, table_of(segments, [parse_strip(s) for s in segments], form, label=3)


def assert_same_away_from_seams(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found[:, 1:-1], expected[:, 1:-1])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_parse_finds_every_frame(count: int) -> None:
    jpeg = encode(make_frames(count))
    offsets, lengths = parse_strip(jpeg)
    assert offsets.dtype == lengths.dtype == np.int32
    assert len(offsets) == len(lengths) == count
    between = [jpeg[end : end + 2] for end in offsets + lengths]
    assert between == [bytes((0xFF, 0xD0 + k % 8)) for k in range(count - 1)] + [b"\xff\xd9"]
    np.testing.assert_array_equal(offsets[1:], (offsets + lengths)[:-1] + 2)


def test_all_frames_in_order_give_back_the_same_bytes() -> None:
    segments, table = make_sample(20, 20)
    assert assemble_strip(segments, table, range(20)).tobytes() == segments[0]


@pytest.mark.parametrize(
    "indices",
    [[0], [19], [5, 6, 7, 8], [19, 0, 7, 7, 7, 3], list(range(19, -1, -1)) * 2],
    ids=["first", "last", "run", "any-order", "long"],
)
def test_selection_decodes_like_the_full_strip(indices: list[int]) -> None:
    segments, table = make_sample(20, 20)
    full = decode(segments[0])
    assert_same_away_from_seams(decode(assemble_strip(segments, table, indices)), full[indices])


def test_selection_across_segments() -> None:
    segments, table = make_sample(20, 6)
    assert len(segments) == table.num_segments == 4
    full = np.concatenate([decode(segment) for segment in segments])
    indices = np.array([18, 2, 7, 6, 5, 19, 13])
    assert_same_away_from_seams(decode(assemble_strip(segments, table, indices)), full[indices])


def test_segments_may_be_memory_maps_or_arrays() -> None:
    segments, table = make_sample(20, 6)
    plain = assemble_strip(segments, table, [1, 12])
    views = assemble_strip([memoryview(s) for s in segments], table, [1, 12])
    arrays = assemble_strip([np.frombuffer(s, np.uint8) for s in segments], table, [1, 12])
    assert plain.tobytes() == views.tobytes() == arrays.tobytes()
    assert plain.flags.writeable


def test_only_the_first_and_the_chosen_segment_are_read() -> None:
    segments, table = make_sample(20, 6)
    expected = assemble_strip(segments, table, [13]).tobytes()
    assert assemble_strip([segments[0], b"", segments[2], b""], table, [13]).tobytes() == expected


@pytest.mark.parametrize("version", [1, 2])
def test_table_survives_its_bytes(version: int) -> None:
    segments, table = make_sample(20, 6)
    again = FrameTable.from_bytes(old_table(table) if version == 1 else table.to_bytes())
    assert again.num_frames == 20
    assert again.label == 3
    assert (again.checksums is None) == (version == 1)
    expected = assemble_strip(segments, table, [4, 9])
    np.testing.assert_array_equal(assemble_strip(segments, again, [4, 9]), expected)


def test_any_flipped_bit_of_a_table_is_found() -> None:
    content = make_sample(20, 6)[1].to_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ShardError, match="frame table: "):
            FrameTable.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, 3), (0, 0), (1, -2), (2, 10**9), (2, 0), (2, -1), (5, 9), (6, 0), (6, -1), (7, 1)],
)
def test_numbers_of_an_old_table_are_checked(index: int, value: int) -> None:
    numbers = np.frombuffer(old_table(make_sample(20, 6)[1]), "<i4").copy()
    numbers[index] = value
    with pytest.raises(ShardError, match="frame table: "):
        FrameTable.from_bytes(numbers.tobytes())


def test_any_flipped_bit_of_what_is_used_is_found() -> None:
    segments, table = make_sample(6, 6)
    first = int(table.offsets[0])
    used = [*range(first), *range(int(table.offsets[3]), int(table.offsets[3] + table.lengths[3]))]
    for place in used:
        damaged = bytearray(segments[0])
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ShardError, match="is damaged, its checksum differs"):
            assemble_strip([damaged], table, [3])
    damaged = bytearray(segments[0])
    damaged[int(table.offsets[2])] ^= 1  # Of a frame that is not used.
    np.testing.assert_array_equal(
        assemble_strip([damaged], table, [3]), assemble_strip(segments, table, [3])
    )


@pytest.mark.parametrize(
    ("marker", "offset", "new"),
    [
        (b"\xff\xc0", 7, b"\xff\xdc"),
        (b"\xff\xc0", 7, b"\x00\x00"),
        (b"\xff\xc0", 4, b"\x0c"),
        (b"\xff\xc0", 9, b"\x01"),
        (b"\xff\xc0", 11, b"\x11"),
        (b"\xff\xc0", 1, b"\xc2"),
        (b"\xff\xdd", 4, b"\x00\x00"),
        (b"\xff\xda", 4, b"\x01"),
        (b"\xff\xe0", 1, b"\xee"),
    ],
    ids=["wide", "none", "12-bit", "gray", "4:4:4", "progressive", "no-restart", "scan", "adobe"],
)
def test_a_header_of_another_picture_is_refused(marker: bytes, offset: int, new: bytes) -> None:
    """Also where there is no checksum, so that no decoder gives another size."""
    segments, table = make_sample(6, 6)
    damaged = bytearray(segments[0])
    place = damaged.index(marker) + offset
    damaged[place : place + len(new)] = new
    with pytest.raises(
        ShardError, match=r"strip: (the header is not that|not a baseline|the JPEG)"
    ):
        assemble_strip([damaged], dataclasses.replace(table, checksums=None), [3])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([20], "frame 20 asked for, the sample has 20"),
        ([0, -1], "frame -1 asked for"),
        ([], "0 frames of 32 rows asked for; use 1 to 2046"),
        ([0] * 2047, "2047 frames of 32 rows"),
    ],
)
def test_bad_indices_are_named(indices: list[int], message: str) -> None:
    segments, table = make_sample(20, 6)
    with pytest.raises(ShardError, match=message):
        assemble_strip(segments, table, indices)


def test_table_beyond_its_segment_is_found() -> None:
    segments, table = make_sample(20, 6)
    table = dataclasses.replace(table, checksums=None)
    with pytest.raises(ShardError, match="points outside its segment"):
        assemble_strip([segments[0][:-200], *segments[1:]], table, [0, 5])


def test_missing_segment_is_found() -> None:
    segments, table = make_sample(20, 6)
    with pytest.raises(ShardError, match="3 segments, frame 19 is in a later one"):
        assemble_strip(segments[:3], table, [0, 19])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JPEG"),
        (b"RIFF1234", "not a JPEG"),
        (b"\xff\xd8\xff\xe0\x00\x10", "header is damaged"),
    ],
)
def test_other_bytes_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        parse_strip(content)


def test_cut_off_strip_is_refused() -> None:
    with pytest.raises(ShardError, match="cut off"):
        parse_strip(encode(make_frames(4))[:-10])


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 0}])
def test_other_jpegs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ShardError, match="not a baseline JPEG with restart markers"):
        parse_strip(encode(make_frames(4), **options))


def test_restarts_out_of_order_are_refused() -> None:
    jpeg = bytearray(encode(make_frames(4)))
    offsets, _ = parse_strip(jpeg)
    jpeg[offsets[2] - 1] ^= 4
    with pytest.raises(ShardError, match="out of order"):
        parse_strip(jpeg)
