"""The benchmark of loaders: all do the same work, and the ratios are what they say."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from strata.dataload.augment import AugmentSpec
from strata.dataload.reader import ShardReader
from strata.errors import ConfigError
from strata.format.schema import FRAMES_EXT, NormalForm, segment_ext
from strata.preprocess.encode_mp4 import encode_mp4
from strata.tools.bench import main
from strata.tools.benchmarks.contenders import check_equal_work
from strata.tools.benchmarks.data import summarize
from strata.tools.benchmarks.webdataset_loaders import DECODERS, PaperTransform, decode_mp4
from tests.support.shard_folders import HEIGHT, WIDTH, moving_picture


def test_all_loaders_are_measured_in_turns(tmp_path: Path):
    out = tmp_path / "out.json"
    sizes = ["--size", "32", "--workers", "1", "--peers", "mp4-pyav", "dali"]
    main(["data", "--quick", *sizes, "--out", str(out)])
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["summary"]] == ["strata", "mp4-pyav", "dali"]
    assert all(row["samples_per_s"] > 0 for row in found["summary"])
    assert {p["payload"] for p in found["parts"]} == {"jpeg", "mjpeg"}
    parts = {p["part"] for p in found["parts"]}
    assert parts == {"read", "checksums", "decode", "augment", "total", "cached"}
    assert found["threads"][0]["threads"] == 1
    assert all(row["samples_per_s"] > 0 for row in found["threads"])
    assert len(found["rounds"]) == 2
    assert all(turn["samples"] >= 2 for r in found["rounds"] for turn in r.values())


def test_peers_decode_the_frames_asked_for(shards: Path):
    reader = ShardReader(shards / "train")
    sample = {ext: reader.member(2, ext) for ext in (FRAMES_EXT, segment_ext(0))}
    window = np.array([0, 3, 3, 9, 34])
    want = moving_picture(1002, 35)[window].astype(int)
    for name in ("jpeg-pil", "jpeg-torchvision", "jpeg-complete"):
        got = DECODERS[name](sample, window).movedim(1, -1).numpy().astype(int)
        # JPEG of quality 90; border rows see a neighbour's chroma.
        assert np.abs(got - want)[:, 2:-2].mean() < 4


def test_the_mp4_peer_enters_at_a_key_frame():
    video = moving_picture(7, 60)
    luma = np.concatenate([video[..., 1], np.full((60, HEIGHT // 2, WIDTH), 128, np.uint8)], axis=1)
    form = NormalForm(width=WIDTH, height=HEIGHT, payload="mp4", quantizer=4)
    sample = {segment_ext(0, "mp4"): encode_mp4(luma, form, Fraction(25))}
    window = np.array([21, 22, 22, 50, 59])
    got = decode_mp4(sample, window).movedim(1, -1).numpy().astype(int)
    assert np.abs(got[..., 1] - video[window][..., 1].astype(int)).mean() < 3
    whole = decode_mp4(sample, np.arange(60))
    assert torch.equal(decode_mp4(sample, window), whole[torch.from_numpy(window)])


def test_the_recipe_draws_once_for_a_clip():
    picture = torch.from_numpy(moving_picture(1, 1)[0]).permute(2, 0, 1)
    clip = PaperTransform(AugmentSpec(blur=1.0), 32)(picture.expand(4, -1, -1, -1))
    assert clip.shape == (4, 3, 32, 32)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip, clip[:1].expand_as(clip))


def test_other_work_is_not_compared():
    views = (torch.randint(0, 256, (2, 16, 8, 8, 3), dtype=torch.uint8),) * 2
    same = tuple(v.movedim(-1, 2) for v in views)
    check_equal_work({"one": views, "two": same})
    with pytest.raises(AssertionError, match="two makes"):
        check_equal_work({"one": views, "two": tuple(v[:, :8] for v in views)})
    with pytest.raises(AssertionError, match="standard deviation 0"):
        check_equal_work({"one": views, "two": tuple(torch.zeros_like(v) for v in views)})


def test_ratios_are_taken_within_a_round():
    def turn(rate: float) -> dict[str, float]:
        return {"samples_per_s": rate, "cpu_ms_per_sample": 1000 / rate}

    rounds = [
        {"strata": turn(30), "peer": turn(10)},
        {"strata": turn(20), "peer": turn(10)},
        {"strata": turn(40), "peer": turn(10)},
    ]
    row = summarize(rounds)[1]
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (3, 2, 4)
    assert row["ratio_by_cpu"] == pytest.approx(3)


def test_an_unknown_peer_is_named():
    with pytest.raises(ConfigError, match="no peer torchcodec; use mp4-pyav"):
        main(["data", "--peers", "torchcodec"])


def test_no_videos(tmp_path: Path):
    with pytest.raises(ConfigError, match="no videos in"):
        main(["data", "--videos", str(tmp_path)])
