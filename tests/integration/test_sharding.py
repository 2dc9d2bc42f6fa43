"""Videos to shards with real worker processes."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from strata.errors import ConfigError, ShardError
from strata.format.manifest import read_manifest
from strata.format.schema import FrameTable, NormalForm
from strata.format.strip_jpeg import assemble_strip
from strata.preprocess.command import main, run_command
from strata.preprocess.executors import WorkerError
from strata.preprocess.options import parse_command
from strata.preprocess.summary import closing_table
from tests.support.source_videos import moving_scene, write_video

REPOSITORY = Path(__file__).parents[2]
SMALL = ["--width", "64", "--height", "48", "--min-frames", "5", "--samples-per-shard", "4"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five good videos, and one broken file in each."""
    root = tmp_path_factory.mktemp("videos")
    for label, name in enumerate(("run", "walk")):
        for number in range(5):
            frames = moving_scene(8 + number, 96, 64, seed=10 * label + number)
            write_video(root / name / f"{number}.mp4", frames)
    (root / "run" / "broken.mp4").write_bytes(b"no video at all")
    write_video(root / "walk" / "short.mp4", moving_scene(4, 96, 64))
    return root


def shard(videos: Path, out: Path, *options: str, workers: int = 1) -> None:
    argv = ["folder", "--videos", str(videos), "--out", str(out), "--workers", str(workers)]
    main([*argv, *SMALL, "--max-rejects", "1", "--log", "none", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def shards(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    shard(videos, out)
    return out / "train"


def test_every_source_is_in_the_manifest(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert manifest.classes == ("run", "walk")
    assert len(manifest.shards) == 3
    assert manifest.num_samples == 10
    assert len(manifest.rows) == 12
    rejected = {r.source: r.reason for r in manifest.rows if r.status == "rejected"}
    assert rejected == {"run/broken.mp4": "unreadable", "walk/short.mp4": "too-short"}
    assert {r.label for r in manifest.written} == {0, 1}
    table = closing_table(manifest, shards, 1.0)
    assert "too-short" in table
    assert "run/broken.mp4" in table


def test_samples_read_back(shards: Path, videos: Path) -> None:
    wds = pytest.importorskip("webdataset")
    manifest = read_manifest(shards)
    rows = iter(manifest.written)
    for entry in manifest.shards:
        dataset = wds.WebDataset(str(shards / entry.name), shardshuffle=False, empty_check=False)
        for sample in dataset:
            row = next(rows)
            assert sample["__key__"] == row.key
            facts = json.loads(sample["json"])
            table = FrameTable.from_bytes(sample["frames.i32"])
            assert facts["source"] == row.source
            assert facts["label"] == table.label == row.label
            assert facts["class_name"] == row.source.partition("/")[0]
            assert facts["num_frames"] == table.num_frames == row.num_frames
            assert facts["source_bytes"] == (videos / row.source).stat().st_size
            chosen = [row.num_frames - 1, 0, 3]
            strip = assemble_strip([sample["000.jpg"]], table, chosen)
            picture = Image.open(io.BytesIO(strip.tobytes()))
            assert picture.size == (64, 3 * 48)
            label, number = row.label, int(Path(row.source).stem)
            scene = moving_scene(8 + number, 96, 64, seed=10 * label + number)[chosen]
            expected = [np.asarray(Image.fromarray(f).resize((64, 48))) for f in scene]
            error = np.asarray(picture).astype(int) - np.concatenate(expected)
            assert np.sqrt(np.mean(error**2)) < 12
    assert next(rows, None) is None


def test_dali_reads_the_shards(shards: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    manifest = read_manifest(shards)
    tars = [str(shards / e.name) for e in manifest.shards]
    pipeline = Pipeline(batch_size=10, num_threads=1, device_id=None)
    with pipeline:
        members = fn.readers.webdataset(
            paths=tars,
            index_paths=[t.replace(".tar", ".idx") for t in tars],
            ext=["frames.i32", "json"],
        )
        assert members is not None
        pipeline.set_outputs(*members)
    pipeline.build()
    outputs = pipeline.run()
    assert outputs is not None
    tables, facts = outputs
    for k, row in enumerate(manifest.written):
        table = FrameTable.from_bytes(np.array(tables.at(k)).tobytes())
        assert (table.num_frames, table.label) == (row.num_frames, row.label)
        assert json.loads(np.array(facts.at(k)).tobytes())["key"] == row.key


def test_bytes_do_not_depend_on_the_number_of_workers(
    videos: Path, shards: Path, tmp_path: Path
) -> None:
    shard(videos, tmp_path, workers=3)
    assert contents(tmp_path / "train") == contents(shards)


def test_other_seed_other_order(videos: Path, shards: Path, tmp_path: Path) -> None:
    shard(videos, tmp_path, "--seed", "1")
    again, first = read_manifest(tmp_path / "train"), read_manifest(shards)
    assert [r.key for r in again.written] != [r.key for r in first.written]
    assert {r.key for r in again.written} == {r.key for r in first.written}
    assert again.digest != first.digest


def test_a_rejected_video_moves_nothing_in_other_shards(
    videos: Path, shards: Path, tmp_path: Path
) -> None:
    for path in videos.rglob("*.mp4"):
        link = tmp_path / "videos" / path.relative_to(videos)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.write_bytes(path.read_bytes())
    manifest = read_manifest(shards)
    victim = next(r for r in manifest.written if r.shard == 1)
    (tmp_path / "videos" / victim.source).write_bytes(b"gone bad")
    shard(tmp_path / "videos", tmp_path / "out")
    after = read_manifest(tmp_path / "out" / "train")
    pairs = list(zip(manifest.shards, after.shards, strict=True))
    assert [a.sha256 == b.sha256 for a, b in pairs] == [True, False, True]


def test_second_run_does_nothing(videos: Path, shards: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in shards.iterdir()}
    shard(videos, shards.parent)
    assert {p: p.stat().st_mtime_ns for p in shards.iterdir()} == before


def test_other_settings_do_not_mix(videos: Path, shards: Path) -> None:
    with pytest.raises(ShardError, match="with other settings; remove it or choose another --out"):
        shard(videos, shards.parent, "--quality", "80")


def test_foreign_folder_is_left_alone(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("precious")
    with pytest.raises(ShardError, match="holds files that sharding did not write"):
        shard(videos, tmp_path)
    assert contents(tmp_path) == {"train/thesis.txt": b"precious"}


KILLED = """
import os, signal, sys
from pathlib import Path
from strata.preprocess.command import main

left = int(sys.argv[1])

def count(owner, name):
    plain = getattr(owner, name)
    def counted(*words, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*words, **options)
    setattr(owner, name, counted)

for name in ("fsync", "unlink", "rmdir"):
    count(os, name)
for name in ("replace", "unlink", "mkdir"):
    count(Path, name)
main(sys.argv[2:])
print(int(sys.argv[1]) - left)
"""
"""Sharding in a process that is killed before a given one of the calls that change the disk."""


def killed_run(videos: Path, out: Path, calls: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", KILLED, str(calls), "folder", "--videos", str(videos)]
    words += ["--out", str(out), "--workers", "1", "--max-rejects", "1", "--log", "none", *SMALL]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def calls_in_all(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    done = killed_run(videos, tmp_path_factory.mktemp("counted"), 1 << 30)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("share", [0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0])
def test_a_killed_run_resumes_to_the_same_bytes(
    videos: Path, shards: Path, tmp_path: Path, calls_in_all: int, share: float
) -> None:
    """From the first call on the disk to the last: the plan, then the manifest and the cleaning."""
    done = killed_run(videos, tmp_path, max(round(share * calls_in_all), 1))
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "train"
    for tar in folder.glob("*.tar"):  # What bears its name is whole.
        assert tar.read_bytes() == (shards / tar.name).read_bytes()
    if (folder / "manifest.json").exists():
        assert read_manifest(folder) == read_manifest(shards)
    elif folder.exists():
        with pytest.raises(ShardError, match=r"no manifest.json; sharding did not finish"):
            read_manifest(folder)
    shard(videos, tmp_path)
    assert contents(folder) == contents(shards)


def test_sources_that_change_before_a_resume_are_done_again(videos: Path, tmp_path: Path) -> None:
    own = tmp_path / "videos"
    shutil.copytree(videos, own)
    # Half of the parts, as if a run had been killed; one shard of three is joined.
    shard(own, tmp_path / "out", "--slice", "0/2", "--samples-per-part", "2")
    folder = tmp_path / "out" / "train"
    records = [".progress/*.tar.json", ".progress/*.part.json"]
    for record in (next(folder.glob(pattern)) for pattern in records):
        rows = json.loads(record.read_text())["rows"]
        path = own / next(row["source"] for row in rows if row["status"] == "written")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # The same size, another time of change.
        path.write_bytes(content)
    write_video(own / "walk" / "short.mp4", moving_scene(5, 96, 64))  # Another size.
    shard(own, tmp_path / "out", "--samples-per-part", "2")
    shard(own, tmp_path / "at-once")
    assert contents(folder) == contents(tmp_path / "at-once" / "train")


def test_fault_after_the_first_segment_takes_its_members_back(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "videos" / "bad.avi", moving_scene(300, 32, 32))
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) * 3 // 4])
    write_video(tmp_path / "videos" / "good.avi", moving_scene(20, 32, 32))
    # 512 rows: 127 frames to a segment, so one is sent before the fault shows.
    for seed in ("0", "1", "2"):
        out = tmp_path / seed
        shard(tmp_path / "videos", out, "--height", "512", "--seed", seed)
        manifest = read_manifest(out / "train")
        assert {r.source: r.reason for r in manifest.rows} == {
            "bad.avi": "truncated",
            "good.avi": None,
        }
        with tarfile.open(out / "train" / manifest.shards[0].name) as tar:
            keys = {m.name.partition(".")[0] for m in tar.getmembers()}
        assert keys == {manifest.written[0].key}


def test_hung_codec_costs_one_video(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "videos" / f"{number}.mp4"
        write_video(path, moving_scene(8, 96, 64, seed=number))
    os.mkfifo(tmp_path / "videos" / "hangs.mp4")  # Reading it never returns.
    shard(tmp_path / "videos", tmp_path / "out", "--timeout", "2")
    rows = {r.source: r for r in read_manifest(tmp_path / "out" / "train").rows}
    assert rows["hangs.mp4"].reason == "timeout"
    assert rows["hangs.mp4"].detail == "no packet, frame or segment in 2 s"
    assert [rows[f"{n}.mp4"].status for n in range(3)] == ["written"] * 3


class WorkerKiller(threading.Thread):
    """Kills so many workers of this process, each as soon as there is a new one."""

    def __init__(self, count: int) -> None:
        super().__init__(daemon=True)
        self.count = count
        self.start()

    def run(self) -> None:
        killed: set[psutil.Process] = set()
        while len(killed) < self.count:
            time.sleep(0.02)
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process().children():
                    if child not in killed and "spawn_main" in " ".join(child.cmdline()):
                        # Stopped while it starts, it cannot be done before it is killed.
                        child.suspend()
                        time.sleep(0.5)
                        child.kill()
                        killed.add(child)
                        break


def test_killed_worker_changes_nothing(videos: Path, shards: Path, tmp_path: Path) -> None:
    killer = WorkerKiller(1)
    shard(videos, tmp_path, workers=2)
    killer.join(60)
    assert not killer.is_alive()
    assert contents(tmp_path / "train") == contents(shards)


def test_a_video_that_kills_its_own_process_is_rejected_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "videos" / "good.mp4", moving_scene(8, 96, 64))
    os.mkfifo(tmp_path / "videos" / "bad.mp4")
    # The worker that has both, then that of bad.mp4 alone, the first with this seed.
    WorkerKiller(2)
    shard(tmp_path / "videos", tmp_path / "out", "--seed", "1", "--timeout", "60")
    bad, good = read_manifest(tmp_path / "out" / "train").rows
    assert (bad.source, bad.reason) == ("bad.mp4", "crash")
    assert bad.detail == "the codec ended its process (-9)"
    assert (good.source, good.status) == ("good.mp4", "written")
    said = capsys.readouterr().err
    assert "a worker process ended (-9) while it had 2 videos, bad.mp4 ... good" in said


def test_a_video_that_needs_more_than_the_bound_of_memory_is_rejected_by_name(
    tmp_path: Path,
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "good.mp4", moving_scene(8, 96, 64))
    with av.open(str(tmp_path / "videos" / "large.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8192, 8192, "yuvj420p"
        frame = av.VideoFrame(8192, 8192, "yuvj420p")  # 100 MB
        for frame.pts in range(3):
            container.mux(stream.encode(frame))
    shard(tmp_path / "videos", tmp_path / "out", "--min-frames", "1", "--worker-memory", "0.25")
    good, large = read_manifest(tmp_path / "out" / "train").rows
    assert (large.source, large.reason) == ("large.avi", "memory")
    assert large.detail == "it needs more than --worker_memory 0.25 GB"
    assert (good.source, good.status) == ("good.mp4", "written")


def test_a_fault_of_the_program_ends_the_run(videos: Path, tmp_path: Path) -> None:
    """It would reject every video, and nobody would know why."""
    command = parse_command(
        ["folder", "--videos", str(videos / "run"), "--out", str(tmp_path), "--log", "none"]
    )
    broken = dataclasses.replace(command.settings, form=NormalForm(payload="foreign", min_frames=1))
    with pytest.raises(WorkerError, match=r"\d.mp4: a bug of the program(.|\n)*AssertionError"):
        run_command(dataclasses.replace(command, settings=broken))
    assert not list((tmp_path / "train").glob("*.t*"))


def test_test_fraction_and_no_labels(videos: Path, tmp_path: Path) -> None:
    shard(videos, tmp_path / "a", "--test-fraction", "0.4")
    train, test = (read_manifest(tmp_path / "a" / s) for s in ("train", "test"))
    assert train.classes == test.classes
    assert len(test.rows) == 4
    assert not {r.source for r in train.rows} & {r.source for r in test.rows}
    shard(videos / "run", tmp_path / "b")
    alone = read_manifest(tmp_path / "b" / "train")
    assert alone.classes == ()
    assert {r.label for r in alone.rows} == {-1}


def test_too_many_rejects_fail_after_the_work(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"2 of 12 videos of train were rejected \(16.7%\)"):
        shard(videos, tmp_path, "--max-rejects", "0.1")
    assert read_manifest(tmp_path / "train").num_samples == 10


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["folder", "--videos", "nowhere", "--out", "o"], "folder nowhere does not exist"),
        (
            ["folder", "--videos", ".", "--out", "o", "--width", "171"],
            "use a multiple of 16",
        ),
        (["folder", "--videos", ".", "--out", "o", "--blur", "1"], "there is no setting blur"),
        (["folder", "--videos", ".", "--out", "o", "--workers", "-1"], "workers is -1"),
        (["folder", "--videos", ".", "--out", "o", "--worker_memory", "0.1"], "use 0.25 to 1e"),
        (["vimeo"], "one of ucf101, hmdb51, .*; got vimeo"),
    ],
)
def test_bad_arguments_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(argv)


def test_errors_are_one_line_with_status_2(tmp_path: Path) -> None:
    call = [sys.executable, str(REPOSITORY / "tools" / "shard.py"), "folder"]
    call += ["--videos", str(tmp_path / "no where"), "--out", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("no where does not exist; correct --videos")


def test_ucf101_official_test_split(
    tmp_path: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ucf = real_data / "ucf101"
    splits = tmp_path / "splits"
    splits.mkdir()
    # Three clips of each list, and one that is not there.
    for name in ("classInd.txt", "trainlist01.txt", "testlist01.txt"):
        lines = (ucf / "splits" / name).read_bytes().splitlines(keepends=True)
        if name != "classInd.txt":
            there = [x for x in lines if (ucf / "videos" / x.decode().split()[0]).exists()]
            lines = [lines[0], *there[:3]]
        (splits / name).write_bytes(b"".join(lines))
    argv = ["ucf101", "--videos", str(ucf / "videos"), "--splits", str(splits)]
    main([*argv, "--split", "1", "--out", str(tmp_path / "out"), "--workers", "1"])
    for split in ("train01", "test01"):
        manifest = read_manifest(tmp_path / "out" / split)
        assert manifest.num_samples == 3
        assert len(manifest.classes) == 101
        assert [r.status for r in manifest.rows].count("absent") == 1
    assert "absent                             1  " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="1 of 4 listed videos are not in"):
        main([*argv, "--split", "1", "--out", str(tmp_path / "strict"), "--strict"])


def test_odd_files_are_typed(tmp_path: Path, real_data: Path) -> None:
    odd = real_data / "odd"
    if not odd.is_dir():
        pytest.skip(f"no {odd}")
    argv = ["folder", "--videos", str(odd), "--out", str(tmp_path), "--workers", "1"]
    main([*argv, "--min-frames", "2", "--max-rejects", "1"])
    manifest = read_manifest(tmp_path / "train")
    reasons = {r.source: r.reason for r in manifest.rows if r.status == "rejected"}
    assert reasons == {
        "corrupted.mp4": "damaged",
        "empty.mp4": "unreadable",
        "text.mp4": "unreadable",
        "truncated_no_moov.mp4": "unreadable",
    }
    counts = {r.source: r.num_frames for r in manifest.written}
    assert counts["h265_10bits.mp4"] == 30
    assert counts["video_90.mov"] == 3
