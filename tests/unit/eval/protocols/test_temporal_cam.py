"""Temporal cues: the head against scikit-learn, maps that sum to the logit, what is drawn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from strata.dataload.config import DataConfig
from strata.dataload.loader import EvaluationLoader
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.errors import ConfigError
from strata.eval.protocols.temporal_cam import (
    CamConfig,
    activation_maps,
    direction_accuracy,
    fit_direction_head,
    overlay,
    shown_samples,
    video_cam,
)
from strata.train.models.backbones import BackboneConfig, build_backbone
from strata.train.representation.encode import VideoClips, encode_levels
from tests.support.shard_folders import make_shards, moving_picture

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(width=8)).eval()


def made_clips(num: int) -> torch.Tensor:
    pictures = [moving_picture(k, 16, 32, 32) for k in range(num)]
    return torch.from_numpy(np.stack(pictures))


def test_the_head_is_logistic_regression_without_intercept(rng: np.random.Generator):
    forth = rng.normal(0.3, 1, (60, 7)) * np.array([1, 10, 0.1, 1, 1, 1, 0])
    back = rng.normal(-0.1, 1, (60, 7)) * np.array([1, 10, 0.1, 1, 1, 1, 0])
    got = fit_direction_head(forth, back, 1e-2)
    rows = np.concatenate([forth, back])
    scale = np.sqrt(np.square(rows).mean(axis=0))
    scale[6] = 1
    # Their penalty is on the sum over samples, ours on the mean.
    theirs = LogisticRegression(fit_intercept=False, C=1 / (1e-2 * 120), tol=1e-10, max_iter=5000)
    theirs.fit(rows / scale, np.repeat([1, 0], 60))
    np.testing.assert_allclose(got, theirs.coef_[0] / scale, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("level", ["low", "mid", "high"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_map_sums_to_the_logit(backbone, level: str, backwards: bool, rng: np.random.Generator):
    clips = made_clips(3)
    weight = rng.normal(size=getattr(backbone.widths, level))
    maps = activation_maps(backbone, clips, weight, level, backwards=backwards)
    with torch.inference_mode():
        pooled = encode_levels(backbone, CPU, backwards=backwards)(clips[:, None])[level][:, 0]
    want = pooled.double().numpy() @ weight
    assert maps.dim() == 4
    np.testing.assert_allclose(maps.mean(dim=(1, 2, 3)).numpy(), want, rtol=2e-4, atol=1e-5)


def test_a_map_of_a_reversed_clip_is_in_the_order_of_the_clip(backbone):
    clips, weight = made_clips(1), np.linspace(-1, 1, backbone.widths.mid)
    forth = activation_maps(backbone, clips.flip(1), weight, "mid", backwards=False)
    back = activation_maps(backbone, clips, weight, "mid", backwards=True)
    assert back.shape[1] == 4
    torch.testing.assert_close(back, forth.flip(1))
    assert not torch.allclose(
        back, activation_maps(backbone, clips, weight, "mid", backwards=False)
    )


def test_the_direction_of_clips_and_videos():
    forth = np.array([[[2.0], [-1.0]], [[1.0], [1.0]]])
    back = np.array([[[-1.0], [-1.0]], [[3.0], [-1.0]]])
    assert direction_accuracy(np.ones(1), forth, back) == {"clips": 0.75, "videos": 0.75}
    # A head without information is right as often as chance.
    assert direction_accuracy(np.zeros(1), forth, back) == {"clips": 0.5, "videos": 0.5}


def test_held_out_clips_that_grow_brighter_are_distinguished_from_darker_ones(
    backbone, rng: np.random.Generator
):
    ramp = np.linspace(0, 120, 16)[:, None, None, None]
    clips = torch.from_numpy((rng.integers(40, 90, (24, 1, 32, 32, 3)) + ramp).astype(np.uint8))
    with torch.inference_mode():
        found = [
            encode_levels(backbone, CPU, backwards=b)(clips[:, None])["mid"].numpy()
            for b in (False, True)
        ]
    forth, back = found
    head = fit_direction_head(forth[:16, 0], back[:16, 0], 1e-3)
    assert direction_accuracy(head, forth[16:], back[16:]) == {"clips": 1.0, "videos": 1.0}
    # Both ways round the same: nothing to tell, half right.
    assert direction_accuracy(head, forth, forth)["clips"] == 0.5


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    folder = tmp_path_factory.mktemp("cam") / "set"
    make_shards(folder, num_videos=3, num_classes=2, shard_size=3, seed=3)
    return ShardReader(folder)


@pytest.mark.parametrize("max_clips", [32, 2])
def test_a_video_has_each_frame_once_and_overlapping_maps_are_averaged(
    backbone, reader: ShardReader, max_clips: int, rng: np.random.Generator
):
    clips = VideoClips(num_clips=10, stride=1, size=32, clip_frames=16, videos_per_batch=2)
    weight = rng.normal(size=backbone.widths.mid)
    made = video_cam(*(backbone, reader, 1, clips, weight, "mid"), max_clips=max_clips, device=CPU)
    # 34 frames: three clips begin at 0, 9 and 18; two alone at 0 and 18.
    assert made.logits.shape == (2, min(max_clips, 3))
    places = list(range(34)) if max_clips == 32 else [*range(16), *range(18, 34)]
    assert made.places.tolist() == places
    assert made.frames.shape == (len(places), 32, 32, 3)
    assert made.heat.shape == (2, len(places), 32, 32)
    assert made.middle == ((9, 25) if max_clips == 32 else (16, 32))
    assert made.video().shape == (len(places), 64, 3 * 64, 3)
    maps, numbers = single_maps(backbone, reader, clips, weight, made.logits.shape[1])
    for row, place in enumerate(places):
        covering = [m[n == place][0] for m, n in zip(maps, numbers, strict=True) if place in n]
        np.testing.assert_allclose(made.heat[0, row], np.mean(covering, axis=0), atol=1e-5)


def single_maps(backbone, reader: ShardReader, clips: VideoClips, weight: np.ndarray, num: int):
    """Maps of each clip of video 1, frame by frame, and the frames' numbers."""
    loader = EvaluationLoader(
        reader,
        DataConfig(shards=reader.location, size=32),
        world=World(),
        device=CPU,
        videos_per_batch=1,
        num_clips=num,
        stride=clips.stride,
        samples=[1],
    )
    with loader:
        (batch,) = loader
    (numbers,) = loader.frames_of([1])
    assert batch.samples.tolist() == [1]
    maps = activation_maps(backbone, batch.clips[0], weight, "mid", backwards=False)
    wide = functional.interpolate(maps[:, None], size=(16, 32, 32), mode="trilinear")
    return wide[:, 0].numpy(), numbers


def test_heat_is_red_for_the_original_and_blue_for_the_reversed():
    frames = np.full((1, 2, 2, 3), 100, np.uint8)
    heat = np.array([[[2.0, -2.0], [0.0, 1.0]]])
    drawn = overlay(frames, heat, top=2.0)[0].astype(int)
    assert drawn[1, 0].tolist() == [100, 100, 100]
    assert drawn[0, 0, 0] > 150 > drawn[0, 0, 2]
    assert drawn[0, 1, 2] > 150 > drawn[0, 1, 0]
    assert 100 < drawn[1, 1, 0] < drawn[0, 0, 0]


def test_shown_videos_are_spaced_evenly():
    assert shown_samples(100, 3) == [0, 50, 99]
    assert shown_samples(2, 8) == [0, 1]


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="weight_decay is 0; use more than 0"):
        CamConfig(weight_decay=0)
    with pytest.raises(ConfigError, match=r"cam\.videos"):
        CamConfig(videos=0)
