"""Which errors are faults of a video, and that reading and decoding report their progress."""

from pathlib import Path

import av
import pytest
from PIL import Image

from strata.format.schema import NormalForm
from strata.preprocess import container
from strata.preprocess.container import open_source
from strata.preprocess.datasets.folder import Source
from strata.preprocess.sample import Sample, is_media_fault
from strata.preprocess.settings import ShardSettings
from tests.support.source_videos import moving_scene, write_video


def raised_by(what: str) -> Exception:
    try:
        match what:
            case "ffmpeg":
                av.open("/nowhere/at/all.mp4")
            case "inside PyAV":
                av.VideoFrame(16, 16, "no such format")
            case "inside Pillow":
                Image.new("no such mode", (1, 1))
            case "memory":
                raise MemoryError
            case "ours":
                raise ValueError("a sum that is wrong")
            case "called wrongly":
                av.VideoFrame("wide", "high")  # pyright: ignore[reportArgumentType]
            case "assertion":
                raise AssertionError
    except Exception as error:
        return error
    raise AssertionError(what)


@pytest.mark.parametrize("what", ["ffmpeg", "inside PyAV", "inside Pillow", "memory"])
def test_faults_of_a_video(what: str) -> None:
    assert is_media_fault(raised_by(what))


@pytest.mark.parametrize("what", ["ours", "called wrongly", "assertion"])
def test_faults_of_the_program(what: str) -> None:
    assert not is_media_fault(raised_by(what))


def test_reading_reports_its_progress(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(3 << 20))
    pulses: list[int] = []
    with open_source(path, "a", lambda: pulses.append(1)) as content:
        assert (content.num_bytes, content.where, len(pulses)) == (3 << 20, bytes(3 << 20), 3)


def test_a_large_source_stays_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    with open_source(path, "a", lambda: None) as small:
        monkeypatch.setattr(container, "_MEMORY_BYTES", 99)
        with open_source(path, "a", lambda: None) as large:
            assert (small.where, large.where) == (bytes(100), path)
            assert small.sha256 == large.sha256


def test_every_frame_reports_its_progress(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", moving_scene(30, 96, 64))
    pulses: list[int] = []
    form = NormalForm(width=96, height=64, min_frames=1)
    settings = ShardSettings(form=form, read_back="all")
    sample = Sample(Source(name="a", path=path), (), settings, lambda: pulses.append(1))
    assert len(list(sample.members())) == 3
    assert (sample.num_frames, sample.notes) == (30, [])
    assert len(pulses) >= 1 + 2 * 30  # the file, its packets, its frames
