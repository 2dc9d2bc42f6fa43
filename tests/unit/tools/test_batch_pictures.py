"""Contact sheets and videos of a batch contain the batch's own pixels."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from strata.errors import ConfigError
from strata.eval.pictures import contact_sheet
from strata.tools.batch_pictures import side_by_side
from strata.tools.inspect_batch import main


def test_a_sheet_holds_every_frame_in_reading_order(rng: np.random.Generator):
    short = rng.integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
    long = rng.integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([("short", short), ("long", long)], "title", 4))
    assert sheet.shape == (14 + 14 + 24 + 14 + 48, 4 * 24, 3)
    np.testing.assert_array_equal(sheet[28:48, 72:92], short[3])
    np.testing.assert_array_equal(sheet[66 + 24 : 66 + 44, 24:44], long[5])


def test_shorter_views_are_repeated_beside_longer_ones(rng: np.random.Generator):
    short = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    long = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    video = side_by_side([short, long])
    assert video.shape == (4, 16, 2 * (8 + 4 + 8), 3)
    np.testing.assert_array_equal(video[3, ::2, :16:2], short[1])
    np.testing.assert_array_equal(video[3, ::2, 24::2], long[3])


def test_the_command_writes_a_picture_and_a_video_of_each_sample(shards: Path, tmp_path: Path):
    out = tmp_path / "out"
    args = ["--data.shards", str(shards / "train"), "--data.batch_size", "4", "--data.size", "32"]
    main([*args, "--out", str(out), "--num", "2"])
    pictures, videos = sorted(out.glob("*.png")), sorted(out.glob("*.mp4"))
    assert [p.stem for p in pictures] == [v.stem for v in videos]
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        # Two short views in a row each, the long one of 32 frames in two.
        assert picture.size == (16 * 36, 14 + 2 * (14 + 36) + 14 + 2 * 36)
    with av.open(str(videos[0])) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 32
    assert (frames[0].width, frames[0].height) == (2 * (3 * 32 + 2 * 4), 64)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num", "0"], "num is 0; use 1 or more"),
        (["--step", "6"], "step is 6, an epoch has 6 of 4 samples"),
        (["--data.colour", "1"], "colour"),
    ],
)
def test_bad_settings_are_named(shards: Path, tmp_path: Path, extra: list[str], message: str):
    args = ["--data.shards", str(shards / "train"), "--data.batch_size", "4"]
    with pytest.raises(ConfigError, match=message):
        main([*args, "--out", str(tmp_path), *extra])
