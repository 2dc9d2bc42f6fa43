"""The average over ten clips, against a plain loop over frames that PyAV decodes."""

import dataclasses
import io

import av
import numpy as np
import pytest
import torch
from torch.nn import functional

from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.eval.classifier.model import Classifier, video_probabilities
from strata.eval.protocols.features import FeatureConfig
from strata.eval.protocols.named import PROTOCOLS
from strata.format.schema import NormalForm
from strata.train.models.backbones import BackboneConfig, build_backbone
from tests.support.shard_folders import HEIGHT, WIDTH, make_shards

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """Four videos of 33 to 36 frames as MJPEG in mp4."""
    folder = tmp_path_factory.mktemp("ten") / "test"
    form = NormalForm(
        width=WIDTH, height=HEIGHT, payload="mp4", codec="mjpeg", quantizer=2, segment_frames=18
    )
    make_shards(folder, num_videos=4, num_classes=2, shard_size=4, seed=6, form=form)
    return ShardReader(folder)


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=8))
    settings = dataclasses.replace(PROTOCOLS["supplement"].linear, normalised=False)
    model = Classifier(backbone, 3, settings)
    # Far from equal probabilities, whose average would hide the clips.
    torch.nn.init.normal_(model.linear.weight, std=0.3)
    return model.eval()


def pictures(
    reader: ShardReader, sample: int, place: tuple[int, int] | None = None, mirrored: bool = False
) -> list[torch.Tensor]:
    """All frames of a stored video, `[3, SIZE, SIZE]` each, as anyone would prepare them.

    Of the largest centred square, or of a square of 36 pixels at a place.
    """
    members = sorted(e for e in reader.members(sample)[1] if e.endswith(".mp4"))
    prepared = []
    for name in members:
        with av.open(io.BytesIO(reader.member(sample, name)), "r") as container:
            for frame in container.decode(video=0):
                rgb = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float()
                left = (rgb.shape[2] - rgb.shape[1]) // 2
                square = rgb[:, :, left : left + rgb.shape[1]]
                if place is not None:
                    square = rgb[:, place[0] : place[0] + 36, place[1] : place[1] + 36]
                square = square.flip(2) if mirrored else square
                small = functional.interpolate(
                    square[None], size=(SIZE, SIZE), mode="bilinear", antialias=True
                )[0]
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
                prepared.append((small / 255 - mean) / std)
    assert len(prepared) == reader.num_frames[sample]
    return prepared


def plainly(
    model: Classifier, frames: list[torch.Tensor], clip_frames: int, shift: int = 0
) -> np.ndarray:
    """Ten clips from the first frame to the last, one after the other."""
    last = len(frames) - 1
    total = torch.zeros(3)
    for k in range(10):
        start = round(k * max(len(frames) - clip_frames, 0) / 9) + shift
        clip = torch.stack([frames[min(start + t, last)] for t in range(clip_frames)], dim=1)
        with torch.inference_mode():
            features = model.backbone(clip[None]).high.mean(dim=(2, 3, 4))
            total += model.linear(features).softmax(dim=1)[0]
    return (total / 10).numpy()


# Clips of 40 frames are longer than every video: the last frame is repeated.
@pytest.mark.parametrize("clip_frames", [16, 40])
def test_ten_clips_are_averaged(reader: ShardReader, model: Classifier, clip_frames: int):
    config = FeatureConfig(size=SIZE, clip_frames=clip_frames, videos_per_batch=3)
    assert config.num_clips == 10
    got = video_probabilities(model, reader, config.clips(), world=World(), device=CPU)
    films = [pictures(reader, sample) for sample in range(4)]
    want = np.stack([plainly(model, film, clip_frames) for film in films])
    shifted = np.stack([plainly(model, film, clip_frames, shift=3) for film in films])
    assert want.max() > 0.5
    # Decoders upsample chroma each in its own way; other frames are further off.
    np.testing.assert_allclose(got, want, atol=5e-3)
    assert np.abs(shifted - want).max() > 1e-2


def test_ten_crops_of_each_clip_are_averaged(reader: ShardReader, model: Classifier):
    config = FeatureConfig(size=SIZE, clip_frames=16, crop=0.75, videos_per_batch=1)
    clips = dataclasses.replace(config.clips(), num_crops=10)
    got = video_probabilities(model, reader, clips, world=World(), device=CPU)
    # Squares of 36 pixels of frames of 64x48: the centre and the corners.
    places = ((6, 14), (0, 0), (0, 28), (12, 0), (12, 28))
    each = [
        [plainly(model, pictures(reader, sample, place, flip), 16) for sample in range(4)]
        for place in places
        for flip in (False, True)
    ]
    want = np.array(each)
    np.testing.assert_allclose(got, want.mean(axis=0), atol=5e-3)
    # No crop alone gives this: each shows something else.
    assert np.abs(want - want.mean(axis=0)).max() > 2e-2
