"""Loading of foreign shards gives the frames of their videos, for any codec."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.writer import ShardWriter

from strata.counter_random import Stream, uniforms
from strata.dataload.augment import centre_crop, draw_view
from strata.dataload.clips import ClipSpec, evaluation_clips, training_window
from strata.dataload.config import DataConfig
from strata.dataload.decode_windows import choose_decoder, read_windows
from strata.dataload.graph_spec import ViewSlice
from strata.dataload.loader import Batch, EvaluationLoader, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import ClassificationRecipe, open_plan
from strata.dataload.reference import reference_view
from strata.distributed import World
from strata.errors import ConfigError, ShardError
from strata.format.manifest import read_manifest
from strata.format.source_video import decode_frames
from strata.preprocess.command import main
from tests.support import loader_batches
from tests.support.loader_batches import SEED
from tests.support.shard_folders import rewrite
from tests.support.source_videos import moving_scene, write_video

CPU = torch.device("cpu")
HEIGHT, WIDTH = 48, 64
KINDS = [
    ("mp4", {"codec": "libx264", "options": {"bf": "2", "g": "12"}}, (96, 64)),
    ("webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "30"}}, (80, 60)),
    ("avi", {"codec": "mpeg4"}, (64, 96)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of three codecs and sizes, with one too short and one broken between them."""
    root = tmp_path_factory.mktemp("foreign")
    (root / "set").mkdir()
    with ShardWriter(str(root / "set" / "x-%03d.tar"), maxcount=4, verbose=0) as writer:
        for k in range(6):
            ext, settings, (width, height) = KINDS[k % 3]
            scene = moving_scene(40 + k, width, height, seed=k)
            path = write_video(root / f"v.{ext}", scene, **settings)
            writer.write(
                {"__key__": f"v{k}", ext: path.read_bytes(), "cls": ("walk", "run")[k % 2]}
            )
            if k == 1:
                writer.write({"__key__": "broken", "mp4": b"no video", "cls": "run"})
                short = write_video(root / "s.mp4", moving_scene(9, 96, 64), codec="libx264")
                writer.write({"__key__": "short", "mp4": short.read_bytes(), "cls": "run"})
    limits = ["--min-frames", "33", "--max-rejects", "1"]
    main(["index", str(root / "set"), "--width", "64", "--height", "48", *limits])
    return root / "set"


def config_for(folder: Path) -> DataConfig:
    return DataConfig(
        shards=folder, batch_size=2, size=32, threads=2, clips=ClipSpec(max_stride=1.2)
    )


def batches(folder: Path, *, rank: int = 0, size: int = 1, **options) -> list[Batch]:
    world = World(rank=rank, size=size)
    return loader_batches.batches(config_for(folder), world=world, epochs=(0, 1), **options)


def full_video(reader: ShardReader, sample: int) -> np.ndarray:
    _, members = reader.members(sample)
    (ext,) = set(members) - {"cls"}
    count = int(reader.num_frames[sample])
    form = reader.manifest.form
    return decode_frames(reader.member(sample, ext), "", count, np.arange(count), form)[0]


def test_unusable_videos_are_not_in_the_set(folder: Path):
    reader = ShardReader(folder)
    assert reader.keys == tuple(f"v{k}" for k in range(6))
    assert reader.num_frames.tolist() == [40, 41, 42, 43, 44, 45]
    assert reader.manifest.classes == ("run", "walk")
    assert reader.labels.tolist() == [1, 0] * 3
    assert {r.source: r.reason for r in reader.manifest.rows if r.status == "rejected"} == {
        "x-000.tar/broken": "unreadable",
        "x-000.tar/short": "too-short",
    }


def test_batches_are_those_of_the_reference(folder: Path):
    reader, config = ShardReader(folder), config_for(folder)
    made = batches(folder)
    assert sorted(np.concatenate([b.samples for b in made]).tolist()) == list(range(6))
    for step, batch in enumerate(made):
        samples = batch.samples
        draws = uniforms(SEED, Stream.WINDOW, 0, samples, 0, 2)
        windows = training_window(reader.num_frames[samples], config.clips, draws)
        assert batch.frames_decoded < sum(reader.num_frames[samples])
        assert batch.bytes_read > 0
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
                assert gap.max() <= 4, f"step {step}, view {view}"
                assert gap.mean() <= 0.6


def test_evaluation_shows_the_frames_it_should(folder: Path):
    reader, config = ShardReader(folder), config_for(folder)
    loader = EvaluationLoader(
        reader, config, world=World(), device=CPU, videos_per_batch=3, num_clips=2, stride=2
    )
    with loader:
        batch = next(iter(loader))
    # Decoded once for both clips, and not beyond the last frame.
    assert batch.frames_decoded <= sum(reader.num_frames[:3])
    crop = centre_crop(1, height=HEIGHT, width=WIDTH)
    frames = evaluation_clips(reader.num_frames[:3], num_clips=2, clip_frames=16, stride=2)
    assert (frames[:, 0] != frames[:, 1]).all()
    for row, clip in itertools.product(range(3), range(2)):
        shown = full_video(reader, row)[frames[row, clip]]
        want = reference_view(shown, ViewSlice(0, 16), crop, 0, 32, photometric=False)
        gap = np.abs(batch.clips[row, clip].numpy().astype(int) - want.astype(int))
        assert gap.max() <= 2


def test_a_classifier_gets_its_clips(folder: Path):
    reader, config = ShardReader(folder), config_for(folder)
    recipe = ClassificationRecipe(clip_frames=16, stride=1)
    plan = open_plan(reader, config, SEED, recipe)
    loader = TrainLoader(
        reader, config, plan, world=World(), device=CPU, epochs=(0, 1), recipe=recipe
    )
    with loader:
        first = next(iter(loader))
    assert first.short.shape == (2, 1, 16, 32, 32, 3)


def test_streams_are_equal_after_a_stop_and_on_two_ranks(folder: Path):
    full = batches(folder)
    (last,) = batches(folder, start_step=2)
    assert torch.equal(last.short, full[2].short)
    parts = [batches(folder, rank=r, size=2)[0] for r in range(2)]
    assert torch.equal(full[0].short, torch.cat([p.short for p in parts]))


def test_decoding_them_on_a_gpu_is_refused(folder: Path):
    reader, gpu = ShardReader(folder), torch.device("cuda", 0)
    assert choose_decoder(reader, "auto", gpu, "gpu") == "cpu"
    with pytest.raises(ConfigError, match=r"has foreign videos, which only the CPU decodes"):
        choose_decoder(reader, "gpu", gpu, "gpu")


def test_a_damaged_sample_is_named(folder: Path, tmp_path: Path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    words = (copy / "x-000.idx").read_text().splitlines()[1].split()
    place = dict(zip(words[::4], zip(words[1::4], words[2::4], strict=True), strict=True))["mp4"]
    start, size = map(int, place)
    path = copy / "x-000.tar"
    content = bytearray(path.read_bytes())
    content[start : start + size // 2] = bytes(size // 2)
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"v0 in x-000\.tar: the video is damaged, its checksum"):
        read_windows(ShardReader(copy), [1, 0], [np.arange(3)] * 2, 2)
    # A set that was indexed without checksums, by an older version.
    manifest = read_manifest(copy)
    rows = tuple(dataclasses.replace(row, checksum=None) for row in manifest.rows)
    entries = tuple(dataclasses.replace(e, index_sha256=None) for e in manifest.shards)
    rewrite(dataclasses.replace(manifest, schema=1, rows=rows, shards=entries), copy)
    with pytest.raises(ShardError, match=r"v0 in x-000\.tar: unreadable: Invalid data"):
        read_windows(ShardReader(copy), [1, 0], [np.arange(3)] * 2, 2)
