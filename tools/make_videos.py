"""Generate a small data set of videos: `python tools/make_videos.py --out DIR`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from strata.config import parse_config
from strata.errors import exit_with_one_line
from strata.limits import usable_cpus
from strata.tools.synthetic_videos import VideoSettings, make_videos


@dataclass(frozen=True, kw_only=True)
class MakeVideosConfig(VideoSettings):
    """Generate a small data set of H.264 videos of moving shapes to try Strata on."""

    out: Path
    """Folder to fill; new or empty."""
    workers: int = usable_cpus()
    """Processes; 0 draws in this one."""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    described = MakeVideosConfig.__doc__ or ""
    config = parse_config(
        MakeVideosConfig, argv, prog="tools/make_videos.py", description=described
    )
    settings = VideoSettings(**{f.name: getattr(config, f.name) for f in fields(VideoSettings)})
    num_bytes = make_videos(config.out, settings, workers=config.workers)
    print(
        f"Generated {settings.classes * settings.videos_per_class} videos of {settings.classes} "
        f"classes in {config.out} ({num_bytes / 1e6:.1f} MB, seed {settings.seed}). "
        "They are drawn pictures, not recordings."
    )


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
