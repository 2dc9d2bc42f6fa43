"""The command behind `tools/shard.py`: it writes shard folders and prints a closing table."""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from strata import commands, launch
from strata.errors import ConfigError, ShardError
from strata.files import FolderLock
from strata.format.schema import MANIFEST_NAME, SAMPLES_NAME, Manifest, NormalForm
from strata.logs import set_up_logging
from strata.preprocess.datasets.findings import findings
from strata.preprocess.datasets.folder import SourceSet, find_folder, mark_duplicates
from strata.preprocess.datasets.kinetics import find_kinetics
from strata.preprocess.datasets.listing import list_files, path_of, read_lines
from strata.preprocess.datasets.official import find_hmdb51, find_ucf101
from strata.preprocess.estimate import estimate_table
from strata.preprocess.index_existing import index_folder
from strata.preprocess.options import (
    IndexOptions,
    MergeOptions,
    ShardCommand,
    parse_command,
    parse_index,
    parse_merge,
    usage,
)
from strata.preprocess.part import PROGRESS_FOLDER
from strata.preprocess.places import open_place
from strata.preprocess.run import merge_set, shard_slice
from strata.preprocess.summary import closing_table
from strata.telemetry.metrics import Metrics
from strata.telemetry.serve import export_process
from strata.telemetry.targets import run_name
from strata.transfer import as_url
from strata.world import World

__all__ = ["find_sets", "main", "run_command"]


def find_sets(command: ShardCommand) -> list[SourceSet]:
    """The sets of the command, with duplicates marked.

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
        ConfigError: The sources or the settings are wrong.
        ShardError: An output folder cannot be used, or too many videos were rejected.
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
        print(*findings(sets, list_files(command.videos)), sep="\n")
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
                where = _shown(folder)
                print(
                    f"{source_set.dataset} {source_set.split}: slice {part} is in {where} after "
                    f"{seconds:,.1f} s; when all slices are: tools/shard.py merge {where}",
                    *(f"  note: {note}" for note in source_set.notes),
                    sep="\n",
                    flush=True,
                )
                continue
            manifest = merge_set(folder)
            manifests.append(manifest)
            print(closing_table(manifest, _shown(folder), seconds, source_set.notes), flush=True)
    for manifest in manifests:
        _check_rejects(manifest, command.out / manifest.split, command.max_rejects)
    if manifests:
        _say_next(command.out / manifests[0].split)
    return manifests


def _shown(folder: Path) -> str:
    return as_url(folder) or str(folder)


def _say_next(folder: Path) -> None:
    """Print the command that pretrains on a set."""
    words = ("--config", "ucf101_r3d18", "--data.shards", _shown(folder), "--run", "runs/a")
    print(f"to pretrain on it:\n  {commands.line('pretrain', *words)}", flush=True)


def _exported(command: ShardCommand) -> AbstractContextManager[Metrics]:
    """The metrics of this process, exported while it works."""
    out = command.out.resolve()
    places = {"shards": next(p for p in (out, *out.parents) if p.exists())}
    return export_process(
        command.monitor,
        role="preprocess",
        run=run_name(command.monitor, out),
        world=World(
            rank=command.settings.slice_index,
            size=command.settings.slice_count,
            local_rank=launch.local_rank_of_task(),
        ),
        places=places if as_url(command.out) is None else {},
    )


def _check_rejects(manifest: Manifest, folder: Path, max_rejects: float) -> None:
    rejected = sum(row.status == "rejected" for row in manifest.rows)
    tried = rejected + manifest.num_samples
    if rejected > max_rejects * tried:
        raise ShardError(
            f"{rejected} of {tried} videos of {manifest.split} were rejected "
            f"({rejected / tried:.1%}), more than --max_rejects {max_rejects}; "
            f"the others are in {_shown(folder)}, reasons in {_shown(folder / SAMPLES_NAME)}"
        )


def _merge(options: MergeOptions) -> None:
    """Write the manifests of folders of sets, or of the sets in an --out."""
    for given in options.folders:
        if as_url(given) is None and not given.is_dir():
            raise ShardError(f"shard folder {given} does not exist; correct the path")
        place, parts = open_place(given), [given]
        found = place.names("", folders=True)
        if not found.keys() & {PROGRESS_FOLDER, MANIFEST_NAME}:
            parts = sorted(given / name for name in found.keys() - place.names("")) or [given]
        for folder in parts:
            manifest = merge_set(folder)
            print(closing_table(manifest, _shown(folder), 0.0), flush=True)
            _check_rejects(manifest, folder, options.max_rejects)


def _index(options: IndexOptions) -> None:
    """Write index and manifest of foreign shards; no video is encoded."""
    try:
        form = NormalForm(
            payload="foreign",
            width=options.width,
            height=options.height,
            fit=options.fit,
            min_frames=options.min_frames,
        )
    except ShardError as error:
        raise ConfigError(str(error)) from error
    folder, out = options.folder, options.index_out or options.folder
    names = read_lines(options.classes, "--classes") if options.classes else []
    lock: AbstractContextManager[object] = nullcontext()
    if out.is_dir() and os.access(out, os.W_OK | os.X_OK, effective_ids=True):
        lock = FolderLock(out, "indexing", ShardError, "wait for it", ".index.lock")
    try:
        with lock:
            manifest, report = index_folder(folder, form, names, options.workers, options.index_out)
    except OSError as error:
        raise ShardError(f"{folder}: {error}; correct that and run the command again") from error
    print(report, flush=True)
    _check_rejects(manifest, out, options.max_rejects)
    _say_next(out)


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    match list(argv[:1]):
        case ["--help" | "-h" | "--help_all"]:
            print(usage())
        case ["merge"]:
            _merge(parse_merge(argv[1:]))
        case ["index"]:
            _index(parse_index(argv[1:]))
        case _:
            command = parse_command(argv)
            set_up_logging(as_json=command.log == "json")
            run_command(command)
