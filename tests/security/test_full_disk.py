"""A disk that takes nothing more: the log loses records, and the work continues or says so."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from strata import logs
from strata.distributed import World
from strata.logs import JsonLines, read_json_lines, set_up_logging
from strata.telemetry.metrics import ExporterConfig, Metrics
from strata.telemetry.serve import export_process
from tests.support.commands import ROOT, TINY, free_port
from tests.support.forked import ForkServer
from tests.support.shard_folders import moving_picture


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """While the list holds a number, so many bytes fit; then the disk is full."""
    room: list[int] = []
    write = os.write

    def limited(handle: int, data: bytes) -> int:
        if not room:
            return write(handle, data)
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(handle, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(logs.os, "write", limited)
    yield room
    room.clear()


@pytest.mark.parametrize("room", [0, 1, 20])
def test_lost_records_are_counted_and_reported_once(
    room: int, full: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    metrics = Metrics(tmp_path / "log.jsonl")
    metrics.record("step", step=1)
    full.append(room)
    for step in range(2, 7):
        metrics.record("step", step=step)
    assert caplog.text.count("cannot be written") == 1
    full.clear()
    metrics.record("step", step=7)
    metrics.record("step", step=8)
    assert caplog.text.count("can be written again; 5 records were lost") == 1
    found, torn = read_json_lines(tmp_path / "log.jsonl")
    assert [r["step"] for r in found] == [1, 7, 8]
    assert torn <= 1
    values = {s.name: s.value for m in metrics.registry.collect() for s in m.samples}
    assert values["strata_log_records_lost_total"] == 5
    metrics.close()


def test_a_line_that_a_kill_cut_off_does_not_swallow_the_next(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    log = JsonLines(path)
    log.append({"kind": "step", "step": 2})
    log.close()
    found, torn = read_json_lines(path)
    assert ([r["step"] for r in found], torn) == ([1, 2], 1)


def test_a_listener_on_a_full_disk_costs_figures_only(caplog: pytest.LogCaptureFixture):
    def listener(kind: str, fields: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = Metrics()
    metrics.add_listener(listener)
    metrics.record("step", step=1)
    metrics.record("step", step=2)
    assert caplog.text.count("figures cannot be written") == 1


def test_lines_for_people_that_cannot_be_written_are_dropped(monkeypatch: pytest.MonkeyPatch):
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        set_up_logging()
        logs.get_logger("strata.test").warning("a line")
        logs.SteadyStream().flush()
        monkeypatch.undo()
        set_up_logging()
        try:
            stream.close()
        except OSError:
            pass


def test_a_target_file_that_cannot_be_written_is_reported(caplog: pytest.LogCaptureFixture):
    config = ExporterConfig(port=free_port(), file_sd=Path("/proc/strata"))
    with export_process(config, role="evaluate", run="a", world=World(), places={}):
        pass
    assert "Prometheus does not find this process" in caplog.text


def test_a_run_whose_log_cannot_grow_trains_to_its_end(
    server: ForkServer, shards: Path, tmp_path: Path
):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    run = tmp_path / "run"
    said = server.finish(
        *("--config", path, "--data.shards", shards / "train", "--run", run),
        hook="tests.support.faults:log_full_from_the_fifth_record",
    )
    assert said.count("log.jsonl cannot be written: [Errno 28]") == 1
    assert "Traceback" not in said
    assert (run / "checkpoints" / "latest").read_text() == "step-000000018\n"
    assert len(read_json_lines(run / "log.jsonl")[0]) == 4


def shard_with_limit(videos: Path, out: Path, num_bytes: int) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return subprocess.run(
        [
            *(sys.executable, "tools/shard.py", "folder", "--videos", str(videos)),
            *("--out", str(out), "--workers", "1"),
        ],
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def make_videos(folder: Path) -> None:
    import av

    (folder / "a").mkdir(parents=True)
    for number in range(3):
        with av.open(str(folder / "a" / f"v{number}.mp4"), "w") as out:
            stream = out.add_stream("mpeg4", rate=25)
            stream.width, stream.height = 64, 48
            for picture in moving_picture(number, 40):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())


@pytest.mark.parametrize("num_bytes", [0, 1000, 100_000])
def test_sharding_under_a_limit_of_file_size_ends_with_one_line(num_bytes: int, tmp_path: Path):
    make_videos(tmp_path / "videos")
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    done = shard_with_limit(tmp_path / "videos", tmp_path / "out", num_bytes)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == 2, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "File too large" in lines[0]
