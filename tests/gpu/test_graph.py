"""The graph on a GPU against the reference, and what its video decoder can; skipped without one."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from strata.dataload.config import DataConfig
from strata.dataload.graph_spec import ViewSlice
from strata.dataload.loader import Batch, EvaluationLoader, TrainLoader
from strata.dataload.pipeline import GpuPipeline, video_decoder_fault
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.dataload.reference import decode_strip, decode_video, reference_view
from strata.distributed import World
from strata.format.schema import NormalForm
from tests.support.graph_cases import (
    CASES,
    FRAMES,
    HEIGHT,
    IDENTITY,
    SIZE,
    encode,
    moving_pictures,
    rows_of,
    run_graph,
)
from tests.support.shard_folders import encode_segments, make_shards, moving_picture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
VIDEO_HEIGHT, VIDEO_WIDTH = 128, 176


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_operation_agrees_with_the_reference(name: str, maps: bool, decode: str):
    parameters = rows_of(name) if maps else dataclasses.replace(IDENTITY, **CASES[name])
    if not maps and ("gray" in CASES[name] or name == "per frame"):
        pytest.skip("a twist has no gray and is drawn once a clip: the loader asks for maps here")
    strip = encode(moving_pictures(1))
    cut = ViewSlice(0, FRAMES)
    (got,) = run_graph(
        [strip],
        [parameters],
        (cut,),
        GpuPipeline,
        decode=decode,
        augment="gpu",
        device_id=0,
        colour_maps=maps,
    )
    want = reference_view(
        decode_strip(strip, HEIGHT), cut, parameters, 0, SIZE, photometric=True, one_pass=True
    )
    gap = np.abs(got[0].astype(int) - want.astype(int))
    assert gap.mean() <= (0.3 if decode == "cpu" else 1.5)
    # nvJPEG upsamples chroma in its own way, which shows at edges of colour.
    assert gap[:, 1:-1, 1:-1].max() <= (3 if decode == "cpu" else 64)
    # At the border DALI repeats the crop's edge, see tests/unit/dataload/test_pipeline.py.
    assert gap.max() <= (6 if decode == "cpu" else 64)


def test_devices_give_the_same_views_of_the_same_frames():
    strips = [encode(moving_pictures(s)) for s in range(2)]
    rows = [rows_of("all"), rows_of("per frame")]
    names = [f.name for f in dataclasses.fields(rows[0])]
    both = dataclasses.replace(
        rows[0], **{n: np.concatenate([getattr(r, n) for r in rows]) for n in names}
    )
    cuts = (ViewSlice(0, FRAMES),)
    (on_cpu,) = run_graph(strips, [both], cuts)
    (on_gpu,) = run_graph(
        strips, [both], cuts, GpuPipeline, augment="gpu", device_id=0, colour_maps=True
    )
    gap = np.abs(on_cpu.astype(int) - on_gpu.astype(int))
    assert gap[:, :, 1:-1, 1:-1].max() <= 3


@pytest.mark.parametrize("choice", ["host", "device"])
def test_batches_from_a_cache_are_those_of_the_cpu_decoder(choice, shards: Path):
    def batches(**settings) -> list[Batch]:
        config = DataConfig(shards=shards / "train", batch_size=4, size=32, **settings)
        reader = ShardReader(config.shards)
        loader = TrainLoader(
            reader,
            config,
            open_plan(reader, config, 5),
            world=World(),
            device=torch.device("cuda", 0),
            epochs=(0, 2),
        )
        with loader:
            return list(loader)

    plain, kept = batches(decode="cpu"), batches(cache=choice)
    assert len(plain) == 12
    for one, two in zip(plain, kept, strict=True):
        assert torch.equal(one.short, two.short)
        assert one.long is not None
        assert two.long is not None
        assert torch.equal(one.long, two.long)
    assert all(b.frames_decoded == 0 for b in kept[6:])


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_video_is_decoded_as_the_reference_does(codec, tmp_path: Path):
    form = NormalForm(
        width=VIDEO_WIDTH, height=VIDEO_HEIGHT, payload="mp4", codec=codec, quantizer=4
    )
    frames = moving_picture(1, 40, VIDEO_HEIGHT, VIDEO_WIDTH)
    (segment,), _ = encode_segments(frames, form)
    fault = video_decoder_fault(np.frombuffer(segment, np.uint8), 0)
    if fault is not None:
        pytest.skip(f"this GPU does not decode {codec}: {fault}")
    make_shards(tmp_path / "set", num_videos=4, num_classes=2, shard_size=4, seed=1, form=form)
    reader = ShardReader(tmp_path / "set")
    loader = EvaluationLoader(
        reader,
        DataConfig(shards=tmp_path / "set", size=VIDEO_HEIGHT, decode="gpu"),
        world=World(),
        device=torch.device("cuda", 0),
        videos_per_batch=4,
        num_clips=1,
        stride=1,
    )
    with loader:
        batch = next(iter(loader))
    left = (VIDEO_WIDTH - VIDEO_HEIGHT) // 2
    for row in range(4):
        whole = decode_video(np.frombuffer(reader.member(row, "000.mp4"), np.uint8))
        start = round((int(reader.num_frames[row]) - 16) / 2)
        want = whole[start : start + 16, :, left : left + VIDEO_HEIGHT].astype(int)
        gap = np.abs(batch.clips[row, 0].cpu().numpy().astype(int) - want)
        # Chroma is upsampled in the hardware's own way; a wrong frame or range is off by more.
        assert gap.mean() <= 2
