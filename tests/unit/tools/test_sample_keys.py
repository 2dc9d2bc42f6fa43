"""Keys of foreign samples may hold any characters; what is written for them has safe names."""

import io
import tarfile
from pathlib import Path

import pytest

from strata.preprocess.command import main as shard_main
from strata.tools.inspect_batch import main as inspect_batch
from tests.support.source_videos import moving_scene, write_video

KEYS = ["part/00", "./dot/01", "a b/02", "<b>03"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    videos = tmp_path_factory.mktemp("videos")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for k, key in enumerate(KEYS):
            content = write_video(videos / "v.mp4", moving_scene(70, 64, 48, seed=k)).read_bytes()
            for ext, part in (("mp4", content), ("cls", str(k % 2).encode())):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    shard_main(["index", str(folder), "--width", "64", "--height", "48"])
    return folder


def test_a_batch_with_any_keys_is_written(folder: Path, tmp_path: Path):
    out = tmp_path / "a" / "b" / "out"
    argv = ["--data.shards", str(folder), "--data.batch_size", "4", "--data.size", "32"]
    inspect_batch([*argv, "--out", str(out), "--num", "4"])
    written = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(written) == 8
    assert all(p.parent == Path("a/b/out") for p in written)
    assert {p.name[:3] for p in written} == {"000", "001", "002", "003"}
