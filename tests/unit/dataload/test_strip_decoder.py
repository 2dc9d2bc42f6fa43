"""The decoder of strips: libjpeg's pixels, in memory that suits the processor; faults are named."""

import numpy as np
import pytest

from strata.dataload.faults import UndecodableError
from strata.dataload.reference import decode_strip
from strata.dataload.strip_decoder import StripDecoder
from tests.support.graph_cases import FRAMES, HEIGHT, WIDTH, encode, moving_pictures


def test_pixels_are_those_of_libjpeg_in_memory_used_again():
    decoder = StripDecoder(FRAMES, HEIGHT, WIDTH)
    for seed in range(3):
        strip = encode(moving_pictures(seed))
        frames = decoder.decode(strip)
        np.testing.assert_array_equal(frames, decode_strip(strip, HEIGHT))
        # At a multiple of 32 bytes libjpeg-turbo would write past the caches.
        assert {row.ctypes.data % 16 for row in frames.reshape(-1, WIDTH, 3)} == {8}
        assert np.shares_memory(frames, decoder.decode(encode(moving_pictures(9))))


def test_what_does_not_decode_is_named():
    good = encode(moving_pictures(1))
    # A restart marker is lost: libjpeg warns only, and its pixels are wrong.
    lost = good.copy()
    place = lost.tobytes().index(b"\xff\xd3")
    lost[place : place + 2] = 0
    # Half of the picture is missing.
    cases = {
        "Corrupt JPEG data": lost,
        "Premature end of JPEG file": good[: len(good) // 2],
        "Could not determine": good[:200],
    }
    decoder = StripDecoder(FRAMES, HEIGHT, WIDTH)
    for reason, strip in cases.items():
        with pytest.raises(UndecodableError, match=reason):
            decoder.decode(strip)
    np.testing.assert_array_equal(decoder.decode(good), decode_strip(good, HEIGHT))


@pytest.mark.parametrize("frames", [FRAMES - 1, FRAMES + 1])
def test_a_strip_of_another_size_is_refused(frames: int):
    strip = encode(moving_pictures(1))
    with pytest.raises(UndecodableError, match=r"expected|too small"):
        StripDecoder(frames, HEIGHT, WIDTH).decode(strip)
