"""The command behind `tools/shard.py`: arguments in, shard folders and a closing table out."""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from strata.errors import ConfigError, ShardError
from strata.preprocess.run import ShardSettings, shard_set
from strata.preprocess.sources import SourceSet, find_folder, find_ucf101, mark_duplicates
from strata.schema import NO_LABEL, Manifest, NormalForm

__all__ = ["ShardCommand", "closing_table", "main", "parse_command", "run_command"]

Dataset = Literal["ucf101", "folder"]


@dataclass(frozen=True, kw_only=True)
class ShardCommand:
    """What `tools/shard.py` was asked to do."""

    dataset: Dataset
    videos: Path
    """Folder of the videos."""
    out: Path
    """Gets one folder for each set."""
    splits: Path | None = None
    """Folder of the official lists."""
    split: str = "1"
    """Which official split."""
    test_fraction: float = 0.0
    """For plain folders: share of each class for the test set."""
    strict: bool = False
    """Whether a listed video that is not on disk is an error."""
    max_rejects: float = 0.05
    """Share of rejected videos above which the command fails, after writing all the others."""
    settings: ShardSettings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help")


def _add_common(parser: argparse.ArgumentParser) -> None:
    form, settings = NormalForm(), ShardSettings()
    add = parser.add_argument
    add("--videos", type=Path, required=True, help="folder of the videos")
    add("--out", type=Path, required=True, help="gets one folder for each set")
    add("--width", type=int, default=form.width, help="pixels, a multiple of 16")
    add("--height", type=int, default=form.height, help="pixels, a multiple of 16")
    add("--fit", choices=("stretch", "crop"), default=form.fit, help="for other aspect ratios")
    add("--quality", type=int, default=form.quality, help="JPEG quality, 1 to 95")
    add("--min-frames", type=int, default=form.min_frames, help="shorter videos are rejected")
    add("--samples-per-shard", type=int, default=settings.samples_per_shard)
    add("--seed", type=int, default=settings.seed, help="of the shuffle and the test share")
    add("--workers", type=int, default=settings.workers, help="processes; 0: one for each CPU")
    add("--timeout", type=float, default=settings.timeout_s, metavar="S", help="for a hung codec")
    add("--strict", action="store_true", help="a listed video that is not on disk is an error")
    add("--max-rejects", type=float, default=0.05, metavar="SHARE", help="more: exit status 2")


def parse_command(argv: Sequence[str]) -> ShardCommand:
    """Parse the command line.

    Raises:
        ConfigError: An argument is unknown or out of its range.
    """
    show_default = argparse.ArgumentDefaultsHelpFormatter
    parser = _Parser(prog="tools/shard.py", description="Turn videos into shards.")
    datasets = parser.add_subparsers(dest="dataset", required=True)
    ucf = datasets.add_parser("ucf101", help="UCF101", formatter_class=show_default)
    _add_common(ucf)
    ucf.add_argument("--splits", type=Path, required=True, help="folder of the official lists")
    ucf.add_argument("--split", choices=("1", "2", "3", "all"), default="1")
    folder = datasets.add_parser(
        "folder", help="one subfolder a class, or no labels", formatter_class=show_default
    )
    _add_common(folder)
    folder.add_argument(
        "--test-fraction", type=float, default=0.0, help="share of each class for a test set"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.max_rejects <= 1:
        raise ConfigError(f"--max-rejects is {args.max_rejects}; use a share from 0 to 1")
    try:
        form = NormalForm(
            width=args.width,
            height=args.height,
            fit=args.fit,
            quality=args.quality,
            min_frames=args.min_frames,
        )
    except ShardError as error:
        raise ConfigError(str(error)) from error
    settings = ShardSettings(
        form=form,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        workers=args.workers,
        timeout_s=args.timeout,
    )
    if args.dataset not in get_args(Dataset):
        raise AssertionError(args.dataset)
    return ShardCommand(
        dataset=args.dataset,
        videos=args.videos,
        out=args.out,
        splits=getattr(args, "splits", None),
        split=getattr(args, "split", "1"),
        test_fraction=getattr(args, "test_fraction", 0.0),
        strict=args.strict,
        max_rejects=args.max_rejects,
        settings=settings,
    )


def find_sets(command: ShardCommand) -> list[SourceSet]:
    """The sets that the command asks for, with duplicates seen to.

    Raises:
        ConfigError: A folder or a list is missing or contradicts itself.
    """
    match command.dataset:
        case "ucf101":
            if command.splits is None:
                raise ConfigError("ucf101 needs --splits, the folder of the official lists")
            sets = find_ucf101(command.videos, command.splits, command.split)
            return [mark_duplicates(s, reject=False) for s in sets]
        case "folder":
            return find_folder(
                command.videos,
                test_fraction=command.test_fraction,
                seed=command.settings.seed,
            )


def run_command(command: ShardCommand, *, show_progress: bool = True) -> list[Manifest]:
    """Shard all sets of a command and print a table for each.

    Returns:
        The manifests.

    Raises:
        ConfigError: The sources or the settings are at fault.
        ShardError: An output folder is, or too many videos were rejected.
    """
    sets = find_sets(command)
    for source_set in sets:
        absent = [s.name for s in source_set.sources if s.path is None]
        if command.strict and absent:
            raise ConfigError(
                f"{source_set.dataset} {source_set.split}: {len(absent):,} of "
                f"{len(source_set.sources):,} listed videos are not in {command.videos}, first "
                f"{absent[0]}; get them or leave out --strict"
            )
    manifests = []
    for source_set in sets:
        if not source_set.present:
            print(
                f"{source_set.split}: none of {len(source_set.sources):,} listed videos is on "
                "disk; nothing written"
            )
            continue
        start_s = time.monotonic()
        folder = command.out / source_set.split
        manifest = shard_set(
            source_set, command.videos, folder, command.settings, show_progress=show_progress
        )
        seconds = time.monotonic() - start_s
        manifests.append(manifest)
        print(closing_table(manifest, folder, seconds, source_set.notes), flush=True)
    for manifest in manifests:
        _check_rejects(manifest, command)
    return manifests


def _check_rejects(manifest: Manifest, command: ShardCommand) -> None:
    rejected = sum(row.status == "rejected" for row in manifest.rows)
    tried = rejected + manifest.num_samples
    folder = command.out / manifest.split
    if rejected > command.max_rejects * tried:
        raise ShardError(
            f"{rejected} of {tried} videos of {manifest.split} were rejected "
            f"({rejected / tried:.1%}), more than --max-rejects {command.max_rejects}; "
            f"the others are in {folder}, reasons in {folder / 'samples.jsonl'}"
        )


def closing_table(
    manifest: Manifest, folder: Path, seconds: float, notes: Sequence[str] = ()
) -> str:
    """What became of every source, in a few lines for a person."""
    rows = manifest.rows
    count = Counter(row.status for row in rows)
    num_frames = sum(s.num_frames for s in manifest.shards)
    num_bytes = sum(s.num_bytes for s in manifest.shards)
    labelled = len({r.label for r in manifest.written} - {NO_LABEL})
    lines = [f"{manifest.dataset} {manifest.split} -> {folder}"]

    def add(name: str, value: int, remark: str = "") -> None:
        lines.append(f"  {name:<24}{value:>12,}  {remark}".rstrip())

    classes = f"{labelled} of {len(manifest.classes)} classes" if manifest.classes else "no labels"
    add("listed", len(rows))
    add("written", count["written"], f"{classes}, {len(manifest.shards)} shards")
    absent = [r.source for r in rows if r.status == "absent"]
    add("absent", len(absent), _first(absent))
    rejected = [r for r in rows if r.status == "rejected"]
    add("rejected", len(rejected))
    for reason in sorted({r.reason or "" for r in rejected}):
        names = [r.source for r in rejected if r.reason == reason]
        add(f"  {reason}", len(names), _first(names))
    per_frame = f"{num_bytes / num_frames:,.0f} a frame" if num_frames else ""
    add("frames", num_frames)
    add("bytes", num_bytes, per_frame)
    rate = f"{(count['written'] + len(rejected)) / seconds:.1f} videos/s" if seconds else ""
    lines.append(f"  {'seconds':<24}{seconds:>12,.1f}  {rate}")
    lines.extend(f"  note: {note}" for note in notes)
    return "\n".join(lines)


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    run_command(parse_command(argv))
