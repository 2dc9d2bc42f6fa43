"""Cutting frames out of mp4 segments: what comes out decodes to the same pictures, and no more."""

import dataclasses
import io

import av
import numpy as np
import pytest

from strata.errors import ShardError
from strata.format.schema import FrameTable, NormalForm
from strata.format.strip_mp4 import assemble_mp4, chosen_packets
from tests.support.shard_folders import HEIGHT, WIDTH, encode_segments, moving_picture

NUM_FRAMES, PER_SEGMENT, GOP = 44, 18, 8
CODECS = ("h264", "vp9", "mjpeg")


def form_of(codec) -> NormalForm:
    return NormalForm(
        width=WIDTH,
        height=HEIGHT,
        payload="mp4",
        codec=codec,
        quantizer=4,
        gop=GOP,
        segment_frames=PER_SEGMENT,
    )


def decode(video: bytes | np.ndarray) -> np.ndarray:
    content = video if isinstance(video, bytes) else video.tobytes()
    with av.open(io.BytesIO(content), "r") as container:
        return np.stack([f.to_ndarray() for f in container.decode(video=0)])


@pytest.fixture(scope="module", params=CODECS)
def sample(request: pytest.FixtureRequest) -> tuple[list[bytes], FrameTable, NormalForm]:
    form = form_of(request.param)
    segments, table = encode_segments(moving_picture(3, NUM_FRAMES), form)
    return segments, table, form


def test_any_frames_decode_to_the_same_pictures(sample, rng: np.random.Generator):
    segments, table, form = sample
    whole = np.concatenate([decode(s) for s in segments])
    choices = [np.arange(NUM_FRAMES), np.array([0]), np.array([NUM_FRAMES - 1]), np.arange(7, 9)]
    choices += [np.flatnonzero(rng.random(NUM_FRAMES) < share) for share in (0.1, 0.3, 0.9)]
    for frames in choices:
        video, places, count = assemble_mp4(segments, table, form, frames)
        got = decode(video)
        assert len(got) == count
        np.testing.assert_array_equal(got[places], whole[frames])


def test_nothing_is_decoded_that_is_not_needed():
    form = form_of("vp9")
    table = FrameTable(0, HEIGHT, WIDTH, PER_SEGMENT, np.zeros(44), np.zeros(44))
    # Groups begin at 0, 8, 16 of each segment of 18: frames 0 8 16, 18 26 34, 36.
    packets, is_key = chosen_packets(table, form, np.array([2, 9, 17, 20, 35]))
    assert packets.tolist() == [0, 1, 2, 8, 9, 16, 17, 18, 19, 20, 34, 35]
    assert packets[is_key].tolist() == [0, 8, 16, 18, 34]
    packets, is_key = chosen_packets(table, form_of("mjpeg"), np.array([2, 9, 35]))
    assert packets.tolist() == [2, 9, 35]
    assert is_key.all()


def test_segments_without_chosen_frames_need_not_be_there(sample):
    segments, table, form = sample
    frames = np.arange(20, 30)
    video, _, _ = assemble_mp4([b"", segments[1], b""], table, form, frames)
    np.testing.assert_array_equal(video, assemble_mp4(segments, table, form, frames)[0])


def test_faults_are_named(sample):
    segments, table, form = sample
    with pytest.raises(ShardError, match="frames 3 to 44 asked for, the sample has 44"):
        assemble_mp4(segments, table, form, np.array([3, 44]))
    with pytest.raises(ShardError, match="1 segments, frame 20 is in a later one"):
        assemble_mp4(segments[:1], table, form, np.array([20]))
    table = dataclasses.replace(table, checksums=None)
    with pytest.raises(ShardError, match=r"no moov box|a box reaches beyond the file"):
        assemble_mp4([bytes(2000), *segments[1:]], table, form, np.array([0]))
    with pytest.raises(ShardError, match="a box reaches beyond the file"):
        assemble_mp4([segments[0][:-100], *segments[1:]], table, form, np.array([0]))
    outside = dataclasses.replace(table, offsets=table.offsets + 10_000_000)
    with pytest.raises(ShardError, match="the frame table points outside its segment"):
        assemble_mp4(segments, outside, form, np.array([0]))


def test_any_flipped_byte_of_what_is_used_is_found(sample):
    segments, table, form = sample
    good, places, _ = assemble_mp4(segments, table, form, np.array([0]))
    random = np.random.default_rng(0)
    end = int(table.offsets[17] + table.lengths[17])
    around = [*range(int(table.offsets[0])), *range(end, len(segments[0]))]
    used = [*random.choice(around, 60), *range(int(table.offsets[0]), int(table.offsets[1]), 7)]
    for place in used:
        damaged = bytearray(segments[0])
        damaged[place] ^= 1 << int(place) % 8
        with pytest.raises(ShardError, match=r"mp4: (segment 0|frame 0) is damaged"):
            assemble_mp4([damaged, *segments[1:]], table, form, np.array([0]))
    damaged = bytearray(segments[0])
    damaged[int(table.offsets[17])] ^= 1  # Of a frame that is not decoded.
    video, again, _ = assemble_mp4([damaged, *segments[1:]], table, form, np.array([0]))
    np.testing.assert_array_equal(video, good)
    np.testing.assert_array_equal(again, places)


def test_pictures_of_another_size_are_refused(sample):
    segments, table, form = sample
    old = dataclasses.replace(table, checksums=None)
    place = segments[0].index(b"stsd") + 44
    damaged = bytearray(segments[0])
    damaged[place : place + 4] = b"\xff\xdc\xff\xdc"
    with pytest.raises(ShardError, match="does not describe pictures of 64 x 48 pixels"):
        assemble_mp4([damaged, *segments[1:]], old, form, np.array([0]))
