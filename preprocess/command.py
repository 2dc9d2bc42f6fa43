"""The command behind `tools/shard.py`: arguments in, shard folders and a closing table out."""

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

import yaml

from strata import launch
from strata.decoding import Damaged
from strata.errors import ConfigError, ShardError
from strata.files import FolderLock
from strata.format.schema import MANIFEST_NAME, NO_LABEL, SAMPLES_NAME, Manifest, NormalForm
from strata.limits import usable_cpus
from strata.preprocess.datasets.folder import SourceSet, find_folder, mark_duplicates
from strata.preprocess.datasets.kinetics import Kinetics, find_kinetics
from strata.preprocess.datasets.listing import name_of, path_of, read_lines, some_of
from strata.preprocess.datasets.official import find_hmdb51, find_ucf101
from strata.preprocess.estimate import estimate_table
from strata.preprocess.index_existing import index_folder
from strata.preprocess.progress import LogKind
from strata.preprocess.run import merge_set, shard_slice
from strata.preprocess.settings import ReadBack, ShardSettings
from strata.telemetry.metrics import ExporterConfig, Metrics
from strata.telemetry.serve import export_process

__all__ = ["ShardCommand", "closing_table", "main", "parse_command", "run_command", "slice_of"]

_SHOWN_NOTES = 10
"""Noted videos that the closing table names."""

Dataset = Literal["ucf101", "hmdb51", "kinetics400", "kinetics600", "kinetics700", "folder"]


@dataclass(frozen=True, kw_only=True)
class ShardCommand:
    """What `tools/shard.py` was asked to do."""

    dataset: Dataset
    videos: tuple[Path, ...]
    """Folders of the videos."""
    out: Path
    """Gets one folder for each set."""
    splits: Path | None = None
    """Folder of the official lists; for Kinetics also one list."""
    split: str = "1"
    """Which official split."""
    classes: Path | None = None
    """For Kinetics: the classes, one a line."""
    test_fraction: float = 0.0
    """For plain folders: share of each class for the test set."""
    strict: bool = False
    """Whether a listed video that is not on disk is an error."""
    max_rejects: float = 0.05
    """Share of rejected videos above which the command fails, after writing all the others."""
    dry_run: bool = False
    """Whether only to tell what would be done."""
    log: LogKind = "bar"
    """What to write on stderr as it goes."""
    monitor: ExporterConfig
    """Where to answer Prometheus while it works."""
    settings: ShardSettings


def slice_of(given: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which part of the shards this process makes, from 0, and how many parts there are.

    Args:
        given: The option, `i/n`, if there is one; it goes before what a launcher says.
        environment: Where torchrun and DeepSpeed leave RANK and WORLD_SIZE, and Slurm's srun
            SLURM_PROCID and SLURM_STEP_NUM_TASKS.

    Raises:
        ConfigError: Not a part of a whole.
    """
    if given is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", given)
        if match is None:
            raise ConfigError(f"--slice is {given!r}; use i/n with i from 0 to n-1, like 0/4")
        index, count, origin = int(match[1]), int(match[2]), f"--slice {given}"
    else:
        try:
            task = launch.task_of_job(environment)
        except launch.LaunchError as error:
            raise ConfigError(f"{error}; correct the launcher or use --slice") from error
        if task is None:
            return 0, 1
        index, count, origin = task
    if not 0 <= index < count:
        raise ConfigError(f"{origin} is no part of a whole; use 0/n to (n-1)/n")
    return index, count


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help")


def _add_common(parser: argparse.ArgumentParser) -> None:
    form, settings = NormalForm(), ShardSettings()
    add = parser.add_argument
    add("--config", type=Path, help="YAML of these options, split: 1; those given here win")
    add(
        "--videos",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="folders of the videos",
    )
    add("--out", type=Path, required=True, help="gets one folder for each set")
    add("--width", type=int, default=form.width, help="pixels, a multiple of 16")
    add("--height", type=int, default=form.height, help="pixels, a multiple of 16")
    add("--fit", choices=("stretch", "crop"), default=form.fit, help="for other aspect ratios")
    add("--payload", choices=("jpeg", "mp4"), default=form.payload, help="how pictures are kept")
    add("--quality", type=int, default=form.quality, help="JPEG quality, 1 to 95")
    add("--codec", choices=("h264", "vp9", "mjpeg"), default=form.codec, help="of mp4")
    add(
        "--quantizer",
        type=int,
        default=form.quantizer,
        help="of mp4: CRF or qscale",
    )
    add("--gop", type=int, default=form.gop, help="of mp4: frames between key frames")
    add(
        "--segment-frames",
        type=int,
        default=form.segment_frames,
        help="0: 64 for mp4, else a JPEG's most",
    )
    add("--min-frames", type=int, default=form.min_frames, help="shorter videos are rejected")
    add("--samples-per-shard", type=int, default=settings.samples_per_shard)
    add(
        "--read-back",
        choices=get_args(ReadBack),
        default=settings.read_back,
        help="frames decoded back and compared: every 8th, or all for a sixth more CPU time",
    )
    add(
        "--damaged",
        choices=get_args(Damaged),
        default=settings.damaged,
        help="videos with damaged or missing frames: rejected, or what decodes kept with a note",
    )
    add("--seed", type=int, default=settings.seed, help="of the shuffle and the test share")
    add("--workers", type=int, default=settings.workers, help="processes; 0: one for each CPU")
    add(
        "--timeout",
        type=float,
        default=settings.timeout_s,
        metavar="S",
        help="without a packet, frame or segment: hung",
    )
    add("--dry-run", action="store_true", help="tell what would be done, time it on a few videos")
    add("--slice", metavar="I/N", help="make only part I of N; default: RANK and WORLD_SIZE if set")
    add("--log", choices=get_args(LogKind), default="bar", help="what to write on stderr")
    add("--monitor-port", type=int, default=0, help="of /metrics; 0 serves nothing")
    add("--monitor-host", default="127.0.0.1", help="address of /metrics")
    add("--file-sd", type=Path, metavar="DIR", help="where to tell Prometheus of this process")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed adds it.
    add("--strict", action="store_true", help="a listed video that is not on disk is an error")
    add("--max-rejects", type=float, default=0.05, metavar="SHARE", help="more: exit status 2")


def _with_config(parser: argparse.ArgumentParser, dataset: str, given: Sequence[str]) -> list[str]:
    """Arguments with those of a `--config` file put before them, so that later ones win.

    Raises:
        ConfigError: The file is not readable, is for another dataset, or has a key that is none.
    """
    finder = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, action="append", default=[])
    finder.add_argument("--videos", nargs="+", action="extend")
    found, _ = finder.parse_known_args(given)
    options = {action.dest: action for action in parser._actions if action.option_strings}
    words: list[str] = []
    for path in found.config:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"cannot read {path} ({reason}); mend --config") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} is not a table of options; write lines like  quality: 90")
        meant = content.pop("dataset", dataset)
        if meant != dataset:
            raise ConfigError(f"{path} is for {meant}; the command says {dataset}")
        for key, value in content.items():
            action = options.get(str(key))
            if action is None or key in ("help", "config", "local_rank"):
                raise ConfigError(f"{path}: {key!r} is no option of {parser.prog}; see its --help")
            name = next(o for o in action.option_strings if o.startswith("--"))
            is_switch, takes_several = action.nargs == 0, action.nargs == "+"
            values = value if takes_several and isinstance(value, list) else [value]
            if not values or not all(
                is_switch == isinstance(v, bool) and isinstance(v, bool | int | float | str)
                for v in values
            ):
                kind = "true or false" if is_switch else "one number or word"
                kind += " or a list of them" if takes_several else ""
                raise ConfigError(f"{path}: {key} is {value!r}; use {kind}")
            if value is False or (key == "videos" and found.videos):
                continue
            words += [name if is_switch else f"{name}={v}" for v in values]
    return [*words, *given]


def parse_command(argv: Sequence[str]) -> ShardCommand:
    """Parse the command line.

    Raises:
        ConfigError: An argument is unknown or out of its range.
    """
    show_default = argparse.ArgumentDefaultsHelpFormatter
    parser = _Parser(prog="tools/shard.py", description="Turn videos into shards.")
    datasets = parser.add_subparsers(dest="dataset", required=True)
    for name in ("ucf101", "hmdb51"):
        official = datasets.add_parser(name, help=name.upper(), formatter_class=show_default)
        _add_common(official)
        official.add_argument(
            "--splits", type=Path, required=True, help="folder of the official lists"
        )
        official.add_argument("--split", choices=("1", "2", "3", "all"), default="1")
    for name in get_args(Kinetics):
        kinetics = datasets.add_parser(name, help=name.capitalize(), formatter_class=show_default)
        _add_common(kinetics)
        kinetics.add_argument(
            "--splits", type=Path, required=True, help="official csv, or the folder of them"
        )
        kinetics.add_argument("--split", choices=("train", "val", "test", "all"), default="all")
        kinetics.add_argument(
            "--classes", type=Path, help="class names, one a line; default: all in the lists"
        )
    folder = datasets.add_parser(
        "folder", help="one subfolder a class, or no labels", formatter_class=show_default
    )
    _add_common(folder)
    folder.add_argument(
        "--test-fraction", type=float, default=0.0, help="share of each class for a test set"
    )
    datasets.add_parser("merge", help="the manifest over all slices: merge FOLDER ...")
    datasets.add_parser("index", help="index and manifest for foreign shards: index FOLDER")
    if argv and argv[0] in get_args(Dataset):
        argv = [argv[0], *_with_config(datasets.choices[argv[0]], argv[0], argv[1:])]
    args = parser.parse_args(argv)
    if not 0 <= args.max_rejects <= 1:
        raise ConfigError(f"--max-rejects is {args.max_rejects}; use a share from 0 to 1")
    try:
        form = NormalForm(
            width=args.width,
            height=args.height,
            fit=args.fit,
            payload=args.payload,
            quality=args.quality,
            codec=args.codec,
            quantizer=args.quantizer,
            gop=args.gop,
            segment_frames=args.segment_frames,
            min_frames=args.min_frames,
        )
    except ShardError as error:
        raise ConfigError(str(error)) from error
    slice_index, slice_count = slice_of(args.slice, os.environ)
    settings = ShardSettings(
        form=form,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        read_back=args.read_back,
        damaged=args.damaged,
        workers=args.workers or _share_of_cpus(),
        slice_index=slice_index,
        slice_count=slice_count,
        timeout_s=args.timeout,
    )
    if args.dataset not in get_args(Dataset):
        raise AssertionError(args.dataset)
    return ShardCommand(
        dataset=args.dataset,
        videos=tuple(args.videos),
        out=args.out,
        splits=getattr(args, "splits", None),
        split=getattr(args, "split", "1"),
        classes=getattr(args, "classes", None),
        dry_run=args.dry_run,
        log=args.log,
        test_fraction=getattr(args, "test_fraction", 0.0),
        strict=args.strict,
        max_rejects=args.max_rejects,
        monitor=ExporterConfig(
            port=args.monitor_port, host=args.monitor_host, file_sd=args.file_sd
        ),
        settings=settings,
    )


def _share_of_cpus() -> int:
    """Processes for this one's share of the machine, or 0 for all of it."""
    beside = launch.local_world_size() or 1
    return 0 if beside < 2 else max(usable_cpus() // beside, 1)


def find_sets(command: ShardCommand) -> list[SourceSet]:
    """The sets that the command asks for, with duplicates seen to.

    Raises:
        ConfigError: A folder or a list is missing or contradicts itself.
    """
    match command.dataset:
        case "ucf101" | "hmdb51":
            find = find_ucf101 if command.dataset == "ucf101" else find_hmdb51
            sets = find(command.videos, _splits_of(command), command.split)
            return [mark_duplicates(s, reject=False) for s in sets]
        case "kinetics400" | "kinetics600" | "kinetics700":
            sets = find_kinetics(
                command.dataset,
                command.videos,
                _splits_of(command),
                command.split,
                command.classes,
            )
            return [mark_duplicates(s, reject=False) for s in sets]
        case "folder":
            return find_folder(
                command.videos,
                test_fraction=command.test_fraction,
                seed=command.settings.seed,
            )


def _splits_of(command: ShardCommand) -> Path:
    if command.splits is None:
        raise ConfigError(f"{command.dataset} needs --splits, the folder of the official lists")
    return command.splits


def run_command(command: ShardCommand) -> list[Manifest]:
    """Shard all sets of a command and print a table for each.

    Returns:
        The manifests; none for a dry run or a slice.

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
                f"{len(source_set.sources):,} listed videos are not in "
                f"{' and '.join(map(str, command.videos))}, first {absent[0]}; get them or leave "
                "out --strict"
            )
    if command.dry_run:
        print(estimate_table(sets, command.settings))
        return []
    manifests = []
    with _exported(command) as metrics:
        for source_set in sets:
            if not source_set.present:
                print(
                    f"{source_set.split}: none of {len(source_set.sources):,} listed videos is on "
                    "disk; nothing written"
                )
                continue
            start_s = time.monotonic()
            folder = command.out / path_of(source_set.split)
            shard_slice(
                source_set,
                folder,
                command.settings,
                log=command.log,
                metrics=metrics,
            )
            seconds = time.monotonic() - start_s
            if command.settings.slice_count > 1:
                part = f"{command.settings.slice_index}/{command.settings.slice_count}"
                print(
                    f"{source_set.dataset} {source_set.split}: slice {part} is in {folder} after "
                    f"{seconds:,.1f} s; when all slices are: tools/shard.py merge {folder}",
                    *(f"  note: {note}" for note in source_set.notes),
                    sep="\n",
                    flush=True,
                )
                continue
            manifest = merge_set(folder)
            manifests.append(manifest)
            print(closing_table(manifest, folder, seconds, source_set.notes), flush=True)
    for manifest in manifests:
        _check_rejects(manifest, command.out / manifest.split, command.max_rejects)
    return manifests


def _exported(command: ShardCommand) -> AbstractContextManager[Metrics]:
    """The metrics of this process, of the slice that it makes."""
    out = command.out.resolve()
    return export_process(
        command.monitor,
        role="preprocess",
        run=some_of([name_of(out.name)]),
        rank=command.settings.slice_index,
        local_rank=launch.local_rank_of_task(),
        places={"shards": next(p for p in (out, *out.parents) if p.exists())},
    )


def _check_rejects(manifest: Manifest, folder: Path, max_rejects: float) -> None:
    rejected = sum(row.status == "rejected" for row in manifest.rows)
    tried = rejected + manifest.num_samples
    if rejected > max_rejects * tried:
        raise ShardError(
            f"{rejected} of {tried} videos of {manifest.split} were rejected "
            f"({rejected / tried:.1%}), more than --max-rejects {max_rejects}; "
            f"the others are in {folder}, reasons in {folder / 'samples.jsonl'}"
        )


def _merge(argv: Sequence[str]) -> None:
    """`merge FOLDER ...`: each a set's folder, or the --out that holds some."""
    parser = _Parser(prog="tools/shard.py merge", description="Write the manifest over all slices.")
    parser.add_argument("folders", type=Path, nargs="+", help="a set's folder, or the --out of all")
    parser.add_argument("--max-rejects", type=float, default=0.05, metavar="SHARE")
    args = parser.parse_args(argv)
    for given in args.folders:
        if not given.is_dir():
            raise ShardError(f"shard folder {given} does not exist; mend the path")
        parts = [given]
        if not (given / ".progress").is_dir() and not (given / MANIFEST_NAME).is_file():
            parts = sorted(p for p in given.iterdir() if p.is_dir()) or [given]
        for folder in parts:
            manifest = merge_set(folder)
            print(closing_table(manifest, folder, 0.0), flush=True)
            _check_rejects(manifest, folder, args.max_rejects)


def _index(argv: Sequence[str]) -> None:
    """`index FOLDER`: make foreign shards known without encoding anything anew."""
    parser = _Parser(
        prog="tools/shard.py index",
        description="Index foreign shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    form = NormalForm()
    add = parser.add_argument
    add("folder", type=Path, help="holds *.tar with mp4 and cls or json members")
    add("--classes", type=Path, help="class names, one a line; default: as found in the samples")
    add(
        "--index-out",
        "--index_out",
        type=Path,
        metavar="DIR",
        help="gets index and manifest, with links to the tars; default: beside the tars",
    )
    add("--width", type=int, default=form.width, help="that the loader scales to, pixels")
    add("--height", type=int, default=form.height, help="that the loader scales to, pixels")
    add("--fit", choices=("stretch", "crop"), default=form.fit, help="for other aspect ratios")
    add("--min-frames", type=int, default=form.min_frames, help="shorter videos are left out")
    add("--workers", type=int, default=0, help="threads; 0: one for each CPU")
    add("--max-rejects", type=float, default=0.05, metavar="SHARE", help="more: exit status 2")
    args = parser.parse_args(argv)
    try:
        form = NormalForm(
            payload="foreign",
            width=args.width,
            height=args.height,
            fit=args.fit,
            min_frames=args.min_frames,
        )
    except ShardError as error:
        raise ConfigError(str(error)) from error
    names = read_lines(args.classes, "--classes") if args.classes else []
    out = args.index_out or args.folder
    alone = nullcontext()
    if out.is_dir() and os.access(out, os.W_OK | os.X_OK, effective_ids=True):
        alone = FolderLock(out, "indexing", ShardError, "wait for it", ".index.lock")
    try:
        with alone:
            manifest, told = index_folder(args.folder, form, names, args.workers, args.index_out)
    except OSError as error:
        raise ShardError(
            f"{args.folder}: {error}; correct that and run the command again"
        ) from error
    print(told, flush=True)
    _check_rejects(manifest, out, args.max_rejects)


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
    add("absent", len(absent), some_of(absent))
    rejected = [r for r in rows if r.status == "rejected"]
    add("rejected", len(rejected))
    for reason in sorted({r.reason or "" for r in rejected}):
        names = [r.source for r in rejected if r.reason == reason]
        add(f"  {reason}", len(names), some_of(names))
    per_frame = f"{num_bytes / num_frames:,.0f} a frame" if num_frames else ""
    noted = [r for r in rows if r.notes]
    if noted:
        add("written with a note", len(noted))
        lines.extend(
            f"    {some_of([r.source])}: {'; '.join(r.notes or ())}" for r in noted[:_SHOWN_NOTES]
        )
        if len(noted) > _SHOWN_NOTES:
            lines.append(f"    ... the others in {folder / SAMPLES_NAME}")
    add("frames", num_frames)
    add("bytes", num_bytes, per_frame)
    if seconds:
        rate = f"{(count['written'] + len(rejected)) / seconds:.1f} videos/s"
        lines.append(f"  {'seconds':<24}{seconds:>12,.1f}  {rate}")
    lines.extend(f"  note: {note}" for note in notes)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    match list(argv[:1]):
        case ["merge"]:
            _merge(argv[1:])
        case ["index"]:
            _index(argv[1:])
        case _:
            run_command(parse_command(argv))
