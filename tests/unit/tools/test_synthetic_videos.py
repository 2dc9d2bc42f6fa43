"""Generated videos: equal for equal seeds, real files, colours that do not predict the class."""

from pathlib import Path

import av
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from strata.errors import ConfigError
from strata.tools.make_videos import main
from strata.tools.synthetic_scenes import SCENE_CLASSES, draw_video
from strata.tools.synthetic_videos import VideoSettings, encode_video, make_videos

SMALL = VideoSettings(videos_per_class=2, classes=3, frames=10, width=48, height=36, fps=12)


def _decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def _draw(label: int, index: int = 0, seed: int = 0, frames: int = 6) -> np.ndarray:
    return draw_video(label, index, seed=seed, frames=frames, width=64, height=48)


def test_a_video_depends_on_seed_class_and_index_alone() -> None:
    first = _draw(1)
    assert first.shape == (6, 48, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, _draw(1))
    for other in (_draw(1, seed=1), _draw(1, index=1), _draw(2)):
        assert np.abs(first.astype(int) - other).mean() > 5


@pytest.mark.parametrize("label", range(len(SCENE_CLASSES)))
def test_every_class_moves_throughout_the_video(label: int) -> None:
    video = _draw(label, frames=60).astype(int)
    change = np.abs(np.diff(video, axis=0)).mean(axis=(1, 2, 3))
    for part in np.array_split(change, 3):
        assert part.mean() > 0.5


def test_class_names_are_distinct() -> None:
    assert len({scene.name for scene in SCENE_CLASSES}) == len(SCENE_CLASSES) >= 8


def test_colour_does_not_predict_the_class() -> None:
    each = 24
    labels = np.repeat(np.arange(len(SCENE_CLASSES)), each)
    videos = [
        draw_video(int(label), i % each, seed=5, frames=2, width=64, height=48)
        for i, label in enumerate(labels)
    ]
    pixels = [v.reshape(-1, 3).astype(float) for v in videos]
    colours = np.stack([np.concatenate([p.mean(0), p.std(0)]) for p in pixels])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    accuracy = cross_val_score(probe, colours, labels, cv=4).mean()
    assert accuracy < 0.25  # Chance is 0.125.


def test_files_are_real_videos_of_the_requested_size(tmp_path: Path) -> None:
    written = make_videos(tmp_path / "videos", SMALL, workers=0, progress=False)
    files = sorted((tmp_path / "videos").rglob("*.*"))
    assert [f.suffix for f in files] == [".mp4"] * 6
    assert {f.parent.name for f in files} == {s.name for s in SCENE_CLASSES[:3]}
    assert written == sum(f.stat().st_size for f in files)
    for file in files:
        assert _decode(file).shape == (10, 36, 48, 3)
    with av.open(str(files[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12


def test_the_file_shows_what_was_drawn(tmp_path: Path) -> None:
    frames = _draw(0)
    encode_video(frames, tmp_path / "a.mp4", fps=24)
    grey = frames.astype(float).mean(-1)
    decoded = _decode(tmp_path / "a.mp4").astype(float).mean(-1)
    assert np.abs(decoded - grey).mean() < 5


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    make_videos(tmp_path / "none", SMALL, workers=0, progress=False)
    make_videos(tmp_path / "two", SMALL, workers=2, progress=False)
    alone = {f.name: f.read_bytes() for f in (tmp_path / "none").rglob("*.mp4")}
    assert len(alone) == 6
    assert alone == {f.name: f.read_bytes() for f in (tmp_path / "two").rglob("*.mp4")}


def test_the_command_reports_that_the_data_are_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "--videos-per-class 1 --classes 2 --frames 3 --width 32 --height 32 --workers 0"
    main(["--out", str(tmp_path / "v"), *asked.split()])
    assert "Generated 2 videos of 2 classes" in capsys.readouterr().out


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ConfigError, match="not empty"):
        make_videos(tmp_path, SMALL, workers=0, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [{"classes": 99}, {"width": 33}, {"height": 16}, {"frames": 0}, {"seed": -1}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        VideoSettings(**wrong)
