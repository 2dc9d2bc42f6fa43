"""Loading of the mp4 payload, and errors for codecs that cannot be decoded."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from strata.counter_random import Stream, uniforms
from strata.dataload.augment import centre_crop, draw_view
from strata.dataload.clips import ClipSpec, evaluation_clips, training_window
from strata.dataload.config import DataConfig
from strata.dataload.decode_windows import choose_decoder, refuse_mixed_payloads
from strata.dataload.graph_spec import ViewSlice
from strata.dataload.loader import Batch, EvaluationLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.dataload.reference import decode_video, reference_view
from strata.distributed import World
from strata.errors import ConfigError, ShardError
from strata.format.schema import NormalForm
from tests.support import loader_batches
from tests.support.loader_batches import SEED
from tests.support.shard_folders import HEIGHT, WIDTH, make_shards

CPU = torch.device("cpu")
CODECS = ("vp9", "mjpeg")


def make(folder: Path, codec, num_videos: int = 6) -> Path:
    form = NormalForm(
        width=WIDTH,
        height=HEIGHT,
        payload="mp4",
        codec=codec,
        quantizer=4,
        gop=8,
        segment_frames=18,
    )
    make_shards(folder, num_videos=num_videos, num_classes=2, shard_size=4, seed=1, form=form)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mp4")
    made = {codec: make(root / codec, codec) for codec in CODECS}
    return made | {"h264": make(root / "h264", "h264", num_videos=2)}


def config_for(folder: Path) -> DataConfig:
    # Strides up to 33 / 32 and an odd window, so that frames repeat and cross segments.
    return DataConfig(
        shards=folder, batch_size=2, size=32, threads=1, clips=ClipSpec(clip_frames=16)
    )


def batches(folder: Path, *, rank: int = 0, size: int = 1, **options) -> list[Batch]:
    world = World(rank=rank, size=size)
    return loader_batches.batches(config_for(folder), world=world, epochs=(0, 1), **options)


def full_video(reader: ShardReader, sample: int) -> np.ndarray:
    """Decode all frames of all segments by PyAV."""
    frames = []
    for k in range(-(-int(reader.num_frames[sample]) // 18)):
        content = reader.member(sample, f"{k:03d}.mp4")
        frames.append(decode_video(np.frombuffer(content, np.uint8)))
    return np.concatenate(frames)


@pytest.mark.parametrize("codec", CODECS)
def test_batches_are_those_of_the_reference(folders: dict[str, Path], codec: str):
    folder = folders[codec]
    reader, config = ShardReader(folder), config_for(folder)
    batch = batches(folder)[1]
    samples = open_plan(reader, config, SEED).batch(0, 1, 0, 1)
    np.testing.assert_array_equal(batch.samples, samples)
    draws = uniforms(SEED, Stream.WINDOW, 0, samples, 0, 2)
    windows = training_window(reader.num_frames[samples], config.clips, draws)
    assert batch.long is not None
    for view, cut in enumerate((ViewSlice(0, 16), ViewSlice(16, 16), ViewSlice(0, 32))):
        parameters = draw_view(
            config.views,
            height=HEIGHT,
            width=WIDTH,
            size=32,
            frames=cut.num_frames,
            seed=SEED,
            epoch=0,
            samples=samples,
            view=view,
        )
        for row, sample in enumerate(samples.tolist()):
            frames = full_video(reader, sample)[windows[row]]
            want = reference_view(frames, cut, parameters, row, 32, photometric=True)
            got = batch.short[row, view] if view < 2 else batch.long[row]
            gap = np.abs(got.numpy().astype(int) - want.astype(int))
            # One level more than a strip: the decoder's conversion to RGB rounds differently.
            assert gap.max() <= 5
            assert gap.mean() <= 0.6


@pytest.mark.parametrize("codec", CODECS)
def test_evaluation_shows_the_frames_it_should(folders: dict[str, Path], codec: str):
    reader, config = ShardReader(folders[codec]), config_for(folders[codec])
    loader = EvaluationLoader(
        reader, config, world=World(), device=CPU, videos_per_batch=3, num_clips=2, stride=3
    )
    with loader:
        batch = next(iter(loader))
    crop = centre_crop(1, height=HEIGHT, width=WIDTH)
    frames = evaluation_clips(reader.num_frames[:3], num_clips=2, clip_frames=16, stride=3)
    # A clip of 46 frames ends beyond these videos: their last frame repeats.
    assert (frames[:, :, -1] == frames[:, :, -2]).all()
    for row, clip in itertools.product(range(3), range(2)):
        shown = full_video(reader, row)[frames[row, clip]]
        want = reference_view(shown, ViewSlice(0, 16), crop, 0, 32, photometric=False)
        gap = np.abs(batch.clips[row, clip].numpy().astype(int) - want.astype(int))
        assert gap.max() <= 2


def test_streams_are_equal_after_a_stop_and_on_two_ranks(folders: dict[str, Path]):
    full = batches(folders["vp9"])
    assert len(full) == 3
    (last,) = batches(folders["vp9"], start_step=2)
    assert torch.equal(last.short, full[2].short)
    parts = [batches(folders["vp9"], rank=r, size=2, count=1)[0] for r in range(2)]
    assert torch.equal(full[0].short, torch.cat([p.short for p in parts]))


def test_only_what_is_needed_is_decoded(folders: dict[str, Path]):
    (mjpeg, *_), (vp9, *_) = batches(folders["mjpeg"]), batches(folders["vp9"])
    assert mjpeg.frames_decoded <= 2 * 32
    assert mjpeg.frames_decoded <= vp9.frames_decoded <= 2 * 37


def test_h264_without_a_gpu_is_refused(folders: dict[str, Path]):
    with pytest.raises(ConfigError, match=r"h264 video, which DALI decodes on a GPU's video.*jpeg"):
        batches(folders["h264"])


def test_mixed_payloads_are_refused(folders: dict[str, Path], shards: Path):
    readers = {name: ShardReader(folder) for name, folder in folders.items()}
    jpeg = ShardReader(shards / "train")
    refuse_mixed_payloads([readers["vp9"], readers["vp9"]])
    with pytest.raises(ConfigError, match=r"different payloads, mp4 \(vp9\) and jpeg"):
        refuse_mixed_payloads([readers["vp9"], jpeg])
    with pytest.raises(ConfigError, match=r"mp4 \(mjpeg\) and mp4 \(vp9\)"):
        refuse_mixed_payloads([readers["mjpeg"], readers["vp9"]])


def test_a_gpu_without_video_decoder_is_logged_once_or_rejected(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The GPU's answer is simulated here; tests/gpu uses a real one."""
    monkeypatch.setattr("strata.dataload.pipeline.video_decoder_fault", lambda *_: "no libnvcuvid")
    monkeypatch.setattr("strata.logs._warned", set())
    gpu = torch.device("cuda", 0)
    vp9, h264 = ShardReader(folders["vp9"]), ShardReader(folders["h264"])
    assert [choose_decoder(vp9, "auto", gpu, "gpu") for _ in range(2)] == ["cpu", "cpu"]
    assert caplog.text.count("this GPU does not decode vp9 video (no libnvcuvid)") == 1
    with pytest.raises(ConfigError, match=r"data\.decode is gpu.*use data\.decode auto or cpu"):
        choose_decoder(vp9, "gpu", gpu, "gpu")
    with pytest.raises(ConfigError, match="this rank has none; shard the videos again"):
        choose_decoder(h264, "auto", gpu, "gpu")
    monkeypatch.setattr("strata.dataload.pipeline.video_decoder_fault", lambda *_: None)
    assert choose_decoder(h264, "auto", gpu, "gpu") == "gpu"


def test_a_damaged_sample_is_named(folders: dict[str, Path], tmp_path: Path):
    copy = Path(shutil.copytree(folders["mjpeg"], tmp_path / "mjpeg"))
    index = (copy / "shard-000000.idx").read_text().splitlines()[2].split()
    start, size = int(index[1]), int(index[2])
    assert index[0] == "000.mp4"
    path = copy / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(bytes(content))
    with pytest.raises(ShardError, match=r"video-0001 in shard-000000\.tar"):
        batches(copy)
