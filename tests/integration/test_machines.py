"""Machines that are not as a developer's: no shared memory, no temporary folder, few processes."""

import errno
import multiprocessing.heap
import os
import subprocess
import sys
import tempfile
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.format.manifest import read_manifest
from strata.preprocess import run
from strata.preprocess.command import main
from tests.support.commands import ROOT
from tests.support.source_videos import moving_scene, write_video

SMALL = ["--width", "64", "--height", "48", "--min-frames", "1", "--workers", "1", "--log", "none"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    write_video(tmp_path / "videos" / "a.mp4", moving_scene(4, 64, 48))
    return tmp_path / "videos"


def test_neither_shared_memory_nor_a_temporary_folder_is_needed(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python's own shared values are kept in.
    monkeypatch.setattr(multiprocessing.heap.Arena, "_dir_candidates", ["/proc/none"])
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: "/proc/none")
    monkeypatch.setattr(multiprocessing.heap.BufferWrapper, "_heap", multiprocessing.heap.Heap())
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    main(["folder", "--videos", str(videos), "--out", str(tmp_path / "out"), *SMALL])
    assert read_manifest(tmp_path / "out" / "train").num_samples == 1


def test_read_only_shared_memory(videos: Path, tmp_path: Path) -> None:
    call = ["unshare", "--mount", "sh", "-ec"]
    mount = "mount -t tmpfs -o ro none /dev/shm"
    if subprocess.run([*call, mount], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount here")
    words = [sys.executable, str(ROOT / "tools" / "shard.py"), "folder", "--videos", str(videos)]
    words += ["--out", str(tmp_path / "out"), *SMALL]
    call += [f'{mount}; export TMPDIR=/dev/shm; exec "$@"', "sh", *words]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "out" / "train").num_samples == 1


def test_a_worker_that_cannot_be_started_is_not_blamed_on_the_output(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(SpawnProcess, "start", fail)
    with pytest.raises(ConfigError, match=r"worker process 1 cannot be started \(Resource temp"):
        main(["folder", "--videos", str(videos), "--out", str(tmp_path / "out"), *SMALL])


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        (None, "/data/out/train"),
        ("/data/out/train/.progress/plan.json", "/data/out/train"),
        ("/data/out", "/data/out/train"),
        ("/tmp/pym-1-abc", "/tmp/pym-1-abc"),
    ],
)
def test_an_output_that_cannot_be_written_is_named(name: str | None, blamed: str) -> None:
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), name)
    message = str(run._cannot_write(Path("/data/out/train"), error))
    assert message.startswith(f"cannot write to {blamed}: Read-only file system; ")
