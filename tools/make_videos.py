"""Make a small data set of video files by drawing them: `python tools/make_videos.py --out DIR`.

Writes `DIR/<class>/<class>-<number>.mp4` (H.264). For demonstrations and tests without a download:
no camera took these pictures.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import av.error
import numpy as np
from tqdm import tqdm

from strata.errors import ConfigError, exit_with_one_line
from strata.tools.synthetic_scenes import SCENE_CLASSES, draw_video

__all__ = ["VideoSettings", "encode_video", "main", "make_videos"]

_ENCODER = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
"""Without `mbtree=0` libx264's bytes differ from run to run for small pictures."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """What the data set is; with `seed` it decides every picture."""

    videos_per_class: int = 30
    classes: int = 8
    """The first so many of `SCENE_CLASSES`."""
    frames: int = 96
    """Frames in each video."""
    width: int = 128
    """Pixels, even."""
    height: int = 96
    """Pixels, even."""
    fps: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A setting is out of its range.
        """
        for name in ("videos_per_class", "frames", "fps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 1 or more")
        if not 1 <= self.classes <= len(SCENE_CLASSES):
            raise ConfigError(f"classes is {self.classes}; use 1 to {len(SCENE_CLASSES)}")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < 32 or value % 2:
                raise ConfigError(
                    f"{name} is {value}; H.264 in 4:2:0 needs an even one, 32 or more"
                )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; use 0 or more")


def encode_video(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write RGB frames as an H.264 file; the file appears under its name only when complete.

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
    """Draw and encode the whole data set.

    Args:
        out: The folder to fill; it must not exist or be empty.
        settings: What to draw.
        workers: Processes; 0 draws in this one. Does not change what is written.
        progress: Show a progress bar.

    Returns:
        Bytes written.

    Raises:
        ConfigError: The folder holds something already or cannot be written, or `workers` is
            negative.
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
    bar = partial(tqdm, total=len(items), unit="video", disable=not progress)
    if workers == 0:
        return sum(bar(map(make_one, items)))
    with multiprocessing.get_context("spawn").Pool(min(workers, len(items))) as pool:
        return sum(bar(pool.imap_unordered(make_one, items, chunksize=4)))


def main(argv: Sequence[str]) -> None:
    """Run the command with `argv`, the arguments without the program's name."""
    defaults = VideoSettings()
    parser = argparse.ArgumentParser(
        prog="make_videos.py",
        description="Generate a small data set of H.264 videos of moving shapes to try Strata on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    say = parser.add_argument
    say("--out", type=Path, required=True, help="folder to fill; new or empty")
    say("--videos-per-class", type=int, default=defaults.videos_per_class, help="videos per class")
    say("--classes", type=int, default=defaults.classes, help=f"1 to {len(SCENE_CLASSES)}")
    say("--frames", type=int, default=defaults.frames, help="frames in each video")
    say("--width", type=int, default=defaults.width, help="pixels, even")
    say("--height", type=int, default=defaults.height, help="pixels, even")
    say("--fps", type=int, default=defaults.fps, help="frames per second")
    say("--seed", type=int, default=defaults.seed, help="the same seed draws the same videos")
    say("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; 0: none")
    given = vars(parser.parse_args(argv))
    out, workers = given.pop("out"), given.pop("workers")
    settings = VideoSettings(**given)
    num_bytes = make_videos(out, settings, workers=workers)
    print(
        f"Generated {settings.classes * settings.videos_per_class} videos of "
        f"{settings.classes} classes in {out} ({num_bytes / 1e6:.1f} MB, seed {settings.seed}). "
        "These are drawn pictures, not recordings."
    )


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
