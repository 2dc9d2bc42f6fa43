"""A small data set of generated video files, for the demo, benchmarks and tests.

The files are `<folder>/<class>/<class>-<number>.mp4` (H.264); `synthetic_scenes` draws them.
"""

import multiprocessing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import av.error
import numpy as np

from strata.errors import ConfigError
from strata.logs import progress_bar
from strata.ranges import check_range
from strata.tools.synthetic_scenes import SCENE_CLASSES, draw_video

__all__ = ["VideoSettings", "encode_video", "make_videos"]

_ENCODER = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
"""Without `mbtree=0` libx264's bytes differ from run to run for small pictures."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """The size of the data set and of its videos; with `seed` they decide every pixel."""

    videos_per_class: int = 30
    """Videos of each class."""
    classes: int = 8
    """Number of classes, 1 to 8."""
    frames: int = 96
    """Frames in each video."""
    width: int = 128
    """Pixels, even."""
    height: int = 96
    """Pixels, even."""
    fps: int = 24
    """Frames per second."""
    seed: int = 0
    """The same seed gives the same videos."""

    def __post_init__(self) -> None:
        check_range(self, "videos_per_class", "frames", "fps", at_least=1)
        check_range(self, "classes", at_least=1, at_most=len(SCENE_CLASSES))
        check_range(self, "seed", at_least=0)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < 32 or value % 2:
                raise ConfigError(
                    f"{name} is {value}; H.264 in 4:2:0 needs an even number, 32 or more"
                )


def encode_video(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write RGB frames as an H.264 file, which appears under its name only when it is complete.

    Args:
        frames: Shape `[F, H, W, 3]`, uint8.
        path: The file; its folder exists.
        fps: Frames per second.
    """
    temporary = path.with_suffix(".part")
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=_ENCODER)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    temporary.replace(path)


def _make_one(item: tuple[int, int], out: Path, settings: VideoSettings) -> int:
    """Draw and encode video `item` = (class, number); returns the file's bytes."""
    label, index = item
    name = SCENE_CLASSES[label].name
    path = out / name / f"{name}-{index:04d}.mp4"
    frames = draw_video(
        label,
        index,
        seed=settings.seed,
        frames=settings.frames,
        width=settings.width,
        height=settings.height,
    )
    encode_video(frames, path, settings.fps)
    return path.stat().st_size


def make_videos(out: Path, settings: VideoSettings, *, workers: int, progress: bool = True) -> int:
    """Draw and encode all videos of the data set.

    Args:
        out: The folder to fill; it must not exist or be empty.
        settings: What to draw.
        workers: Processes; 0 draws in this one. The number does not change the files.
        progress: Show a progress bar.

    Returns:
        Bytes written.

    Raises:
        ConfigError: The folder is not empty or cannot be written, or `workers` is negative.
    """
    if workers < 0:
        raise ConfigError(f"workers is {workers}; use 0 or more")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"{out} is not empty; give another --out or remove it")
        for scene in SCENE_CLASSES[: settings.classes]:
            (out / scene.name).mkdir()
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}; give another --out") from error
    items = [(c, i) for i in range(settings.videos_per_class) for c in range(settings.classes)]
    make_one = partial(_make_one, out=out, settings=settings)
    bar = partial(progress_bar, total=len(items), unit="video", disable=not progress)
    if workers == 0:
        return sum(bar(map(make_one, items)))
    with multiprocessing.get_context("spawn").Pool(min(workers, len(items))) as pool:
        return sum(bar(pool.imap_unordered(make_one, items, chunksize=4)))
