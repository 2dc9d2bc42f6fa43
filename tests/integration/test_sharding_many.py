"""Sharding in slices on many machines, its log, full disks, and runs that only tell."""

import functools
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest

from strata.errors import ConfigError, ShardError
from strata.format.manifest import read_manifest
from strata.format.schema import SourceRow
from strata.preprocess import run
from strata.preprocess.command import main
from strata.preprocess.options import slice_of
from strata.preprocess.progress import JsonLog
from tests.integration.test_sharding import (
    REPOSITORY,
    SMALL,
    contents,
    shard,
    shards,
    videos,
)
from tests.support.commands import free_port, scrape
from tests.support.source_videos import moving_scene, write_video

__all__ = ["shards", "videos"]


def test_slices_and_merge_give_the_same_bytes(videos: Path, shards: Path, tmp_path: Path) -> None:
    for part in ("0/2", "1/2"):
        # The second machine has a disk of its own.
        shard(videos, tmp_path / part[0], "--slice", part, "--samples-per-part", "2")
        made = {p.name for p in (tmp_path / part[0] / "train").glob("*.tar")}
        # Six parts of two videos; the middle shard is in both slices.
        assert made == {f"shard-{2 * int(part[0]):06d}.tar"}
    folder = tmp_path / "0" / "train"
    with pytest.raises(ShardError, match=r"2 of 3 shards are not finished, first shard-000001"):
        main(["merge", str(folder)])
    shutil.copytree(tmp_path / "1" / "train", folder, dirs_exist_ok=True)
    (folder / ".shard-000001.tar.0123abcd.tmp").write_bytes(b"left by a killed slice")
    main(["merge", str(tmp_path / "0"), "--max-rejects", "1"])
    assert contents(folder) == contents(shards)
    main(["merge", str(folder), "--max-rejects", "1"])  # Once more does nothing.
    shard(videos, tmp_path / "0", "--slice", "0/2")
    assert contents(folder) == contents(shards)


def test_slices_at_the_same_time_in_one_folder(videos: Path, shards: Path, tmp_path: Path) -> None:
    call = [sys.executable, REPOSITORY / "tools" / "shard.py", "folder", "--videos", videos]
    call += ["--out", tmp_path, "--workers", "1", "--log", "none", *SMALL]
    # Torn apart wrongly on purpose: slices of 2 and of 1 both make shard 0.
    slices = ({"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": ""})
    processes = []
    for part in slices:
        whole = [] if part["RANK"] else ["--slice", "1/3"]
        environment = {**os.environ, **part}
        words = [*map(str, call), *whole, "--local_rank=0"]
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL))
    assert [p.wait(120) for p in processes] == [0, 0, 0]
    main(["merge", str(tmp_path), "--max-rejects", "1"])
    assert contents(tmp_path / "train") == contents(shards)


def test_slices_that_saw_other_videos_do_not_merge(videos: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "videos"
    shutil.copytree(videos, fewer)
    (fewer / "run" / "0.mp4").unlink()
    shard(videos, tmp_path / "a", "--slice", "0/2")
    shard(fewer, tmp_path / "b", "--slice", "1/2")
    records = tmp_path / "b" / "train" / ".progress"
    (records / "plan.json").unlink()
    shutil.copytree(tmp_path / "b" / "train", tmp_path / "a" / "train", dirs_exist_ok=True)
    with pytest.raises(ShardError, match="from a slice that saw other videos"):
        main(["merge", str(tmp_path / "a" / "train")])


def array(task: int, count: int, first: int, step: int) -> dict[str, str]:
    values = {"ID": task, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, (0, 1)),
        ("2/5", {"RANK": "0", "WORLD_SIZE": "2"}, (2, 5)),
        (None, {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "9"}, (3, 4)),
        (None, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1)),  # a batch script, no srun
        (None, array(7, 4, 5, 1), (2, 4)),
        (None, array(30, 3, 10, 10), (2, 3)),
        (None, array(1, 2, 0, 1) | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, (5, 8)),
        (None, array(7, 2, 0, 1), "SLURM_ARRAY_TASK_ID=7 .* is not a part"),  # --array=0,7
        ("1/3", array(7, 4, 5, 1), (1, 3)),
        ("5/5", {}, "--slice 5/5 is not a part"),
        ("half", {}, "use i/n"),
        (None, {"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x WORLD_SIZE=2: not numbers"),
    ],
)
def test_slice_of(
    given: str | None, environment: dict[str, str], expected: tuple[int, int] | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            slice_of(given, environment)
    else:
        assert slice_of(given, environment) == expected


def test_json_log(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(videos, tmp_path, "--log", "json")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["start", "rejected", "rejected", "end"]
    assert {line["set"] for line in lines} == {"train"}
    assert {(x["source"], x["reason"]) for x in lines if x["event"] == "rejected"} == {
        ("run/broken.mp4", "unreadable"),
        ("walk/short.mp4", "too-short"),
    }
    end = lines[-1]
    assert (end["done"], end["total"], end["rejected"], end["left_s"]) == (12, 12, 2, 0)


def test_json_log_has_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLog("train", 10, 4, every_s=0.0)
    log.done(SourceRow(source="a", status="written", num_frames=5))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[1]["event"] == "progress"
    assert lines[1]["videos_per_s"] > 0
    assert lines[1]["left_s"] is not None
    log.tick()
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (line["event"], line["done"]) == ("progress", 5)


def test_json_log_is_written_while_no_video_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "open_progress", functools.partial(run.open_progress, every_s=0.2))
    (tmp_path / "videos").mkdir()
    os.mkfifo(tmp_path / "videos" / "waits.mp4")
    shard(tmp_path / "videos", tmp_path / "out", "--log", "json", "--timeout", "2")
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events.index("progress") < events.index("rejected")
    assert "warning" in events  # the worker that the time limit ended, in JSON too


def test_it_answers_prometheus_while_it_works(videos: Path, tmp_path: Path) -> None:
    for name in ("run/0.mp4", "run/broken.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(videos / name, tmp_path / "videos" / name)
    os.mkfifo(tmp_path / "videos" / "run" / "waits.mp4")
    port, targets = free_port(), tmp_path / "targets"
    call = [sys.executable, REPOSITORY / "tools" / "shard.py", "folder", "--log", "none", *SMALL]
    call += ["--videos", tmp_path / "videos", "--out", tmp_path / "made", "--workers", "2"]
    call += ["--monitor-port", str(port), "--file-sd", targets, "--samples-per-part", "1"]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True) as process:
        try:
            found: dict[str, float] = {}
            deadline = time.monotonic() + 60
            while found.get('strata_videos_sharded_total{outcome="written"}') != 1:
                assert process.poll() is None
                assert time.monotonic() < deadline, found
                time.sleep(0.1)
                with suppress(OSError):
                    found = scrape(port)
                if 'strata_videos_sharded_total{outcome="rejected"}' not in found:
                    found = {}
            assert found["strata_frames_sharded_total"] > 0
            assert found["strata_process_resident_memory_bytes"] > 0
            (listed,) = [json.loads(p.read_text()) for p in targets.glob("*.json")]
            assert listed[0]["targets"] == [f"127.0.0.1:{port}"]
            assert listed[0]["labels"]["role"] == "preprocess"
        finally:
            process.kill()


def limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def assert_goes_on_after(process: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert f"error: cannot write to {folder}" in process.stderr
    with pytest.raises(ShardError, match="sharding did not finish"):
        read_manifest(folder)


def test_a_write_that_fails_leaves_nothing_that_looks_good(
    videos: Path, shards: Path, tmp_path: Path
) -> None:
    call = [sys.executable, REPOSITORY / "tools" / "shard.py", "folder", "--videos", videos]
    call += ["--out", tmp_path, "--workers", "1", "--log", "none", *SMALL]
    process = subprocess.run(
        list(map(str, call)),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: limit_files(20_000),
    )
    assert_goes_on_after(process, tmp_path / "train")
    assert not list((tmp_path / "train").glob("*.tar"))
    shard(videos, tmp_path)
    assert contents(tmp_path / "train") == contents(shards)


def test_full_disk(videos: Path, shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        call = [sys.executable, REPOSITORY / "tools" / "shard.py", "folder", "--videos", videos]
        call += ["--out", disk, "--workers", "1", "--log", "none", *SMALL]
        process = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=False)
        assert_goes_on_after(process, disk / "train")
        for tar in (disk / "train").glob("*.tar"):  # What bears its name is whole.
            assert tar.read_bytes() == (shards / tar.name).read_bytes()
        subprocess.run([*mount[:4], "remount,size=8m", "tmpfs", str(disk)], check=True)
        shard(videos, disk)
        assert contents(disk / "train") == contents(shards)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_dry_run_prints_and_writes_nothing(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(videos, tmp_path / "out", "--dry-run", "--test-fraction", "0.4")
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "folder train: 8 listed, 8 on disk, 0 absent" in text
    assert "folder test: 4 listed, 4 on disk" in text
    assert [line.split() for line in text.splitlines() if line.startswith("run ")] == [
        ["run", "4", "/", "4", "2", "/", "2"]
    ]
    assert "2 rejected" in text
    assert "estimate:" in text
    assert re.search(r"\([1-9]\d* us of CPU time and [1-9][\d,]* bytes a frame\), 2 rejected", text)


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_mp4_payload(tmp_path: Path, codec: str) -> None:
    frames = moving_scene(40, 96, 64)
    write_video(tmp_path / "videos" / "a.mkv", frames, codec="ffv1")
    options = ["--payload", "mp4", "--codec", codec, "--quantizer", "8", "--segment-frames", "24"]
    shard(tmp_path / "videos", tmp_path / "out", *options)
    manifest = read_manifest(tmp_path / "out" / "train")
    assert (manifest.form.payload, manifest.form.codec) == ("mp4", codec)
    wds = pytest.importorskip("webdataset")
    tar = str(tmp_path / "out" / "train" / manifest.shards[0].name)
    (sample,) = wds.WebDataset(tar, shardshuffle=False)
    for ext, count, first in (("000.mp4", 24, 0), ("001.mp4", 16, 24)):
        with av.open(io.BytesIO(sample[ext]), "r") as container:
            found = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(found) == count
        error = np.abs(np.mean(found, (0, 1, 2)) - frames[first : first + count].mean((0, 1, 2)))
        assert error.max() < 3


def test_hmdb51_and_kinetics_in_one_command_each(
    tmp_path: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hmdb, kinetics = real_data / "hmdb51", real_data / "kinetics400"
    if not (hmdb.is_dir() and kinetics.is_dir()):
        pytest.skip("no HMDB51 or Kinetics clips")
    common = ["--log", "none", "--workers", "2", "--max-rejects", "0"]
    argv = ["hmdb51", "--videos", hmdb / "videos", "--splits", hmdb / "splits"]
    main([*map(str, argv), "--split", "1", "--out", str(tmp_path / "hmdb"), *common])
    train, test = (read_manifest(tmp_path / "hmdb" / s) for s in ("train01", "test01"))
    assert len(train.classes) == 51
    assert (len(train.rows), len(test.rows)) == (70 * 51, 30 * 51)
    assert train.num_samples + test.num_samples == 3
    argv = ["kinetics400", "--videos", kinetics / "videos", "--splits", kinetics / "val.csv"]
    main([*map(str, argv), "--out", str(tmp_path / "k400"), *common])
    val = read_manifest(tmp_path / "k400" / "val")
    assert len(val.classes) == 400
    assert [r.status for r in val.rows].count("absent") == len(val.rows) - 3
    assert {val.classes[r.label] for r in val.written} == {"using segway"}
    assert "19,903  abseiling/0wR5jVB-WPk" in capsys.readouterr().out
