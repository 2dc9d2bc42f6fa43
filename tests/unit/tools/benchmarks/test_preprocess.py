"""The benchmark of sharding times what it says, and measures the quality of payloads."""

import re
from pathlib import Path

import pytest

from strata.errors import ConfigError
from strata.tools.bench import main
from strata.tools.benchmarks import preprocess
from tests.support.source_videos import moving_scene, write_video


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for k in range(2):
        write_video(tmp_path / "v" / f"{k}.avi", moving_scene(40, 96, 64, seed=k))
    return tmp_path / "v"


def test_table_and_ratio(
    videos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess.shutil, "which", lambda _: None)
    main(["preprocess", "--videos", str(videos), "--workers", "1", "--repeat", "1"])
    text = capsys.readouterr().out
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if x[0] == "|"]
    assert text.startswith("machine: cpu, ")
    assert "ffmpeg: skipped, there is no such command here" in text
    for name in ("strata", "bare loop"):
        (cells,) = [row for row in rows if row[0] == name]
        seconds, _, frames_per_s = cells[1:4]
        assert float(seconds) * float(frames_per_s.replace(",", "")) == pytest.approx(80, rel=0.05)
    assert "strata / bare loop: " in text
    assert re.search(r"driver [\d.]+ ms a video, workers [\d.]+: computed, one", text)


def test_a_higher_quality_costs_bytes_and_is_nearer_to_the_source(videos: Path) -> None:
    path = videos / "0.avi"
    forms = {(f.payload, f.codec, f.quality): f for f in preprocess._choices()}
    planes = preprocess._first_frames(path, forms["jpeg", "h264", 90])
    good = preprocess._measure(planes, forms["jpeg", "h264", 95])
    poor = preprocess._measure(planes, forms["jpeg", "h264", 75])
    assert good[0] > poor[0]
    assert good[1] > poor[1] > 30
    assert 1 > good[2] > poor[2] > 0.9
    mp4 = preprocess._measure(planes, forms["mp4", "h264", 90])
    assert mp4[0] < poor[0]
    assert mp4[1] > 30


def test_payloads_are_compared(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["preprocess", "--videos", str(videos), "--limit", "1", "--choices"])
    text = capsys.readouterr().out
    for form in preprocess._choices():
        name = f"jpeg q{form.quality}" if form.payload == "jpeg" else f"mp4 {form.codec}"
        assert f"| {name}" in text


def test_same_pictures_have_similarity_one() -> None:
    frames = moving_scene(2, 96, 64)[..., 0].astype(float)
    assert preprocess._ssim(frames, frames) == pytest.approx(1)
    assert preprocess._ssim(frames, 255 - frames) < 0


def test_no_videos(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no videos in"):
        main(["preprocess", "--videos", str(tmp_path)])
