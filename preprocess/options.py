"""The options of `tools/shard.py`: a typed class for each data set and for each other command."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import yaml

from strata import commands, launch
from strata.config import parse_config
from strata.decoding import Damaged
from strata.errors import ConfigError, ShardError
from strata.format.schema import NormalForm
from strata.limits import usable_cpus
from strata.preprocess.progress import LogKind
from strata.preprocess.settings import ReadBack, ShardSettings
from strata.ranges import check_range
from strata.suggestions import did_you_mean
from strata.telemetry.metrics import ExporterConfig

__all__ = [
    "Dataset",
    "IndexOptions",
    "MergeOptions",
    "ShardCommand",
    "parse_command",
    "parse_index",
    "parse_merge",
    "slice_of",
    "usage",
]

Dataset = Literal["ucf101", "hmdb51", "kinetics400", "kinetics600", "kinetics700", "folder"]
OptionsT = TypeVar("OptionsT")

_OLD_NAMES = {
    "monitor_port": "monitor.port",
    "monitor_host": "monitor.host",
    "file_sd": "monitor.file_sd",
    "timeout": "timeout_s",
}
"""Earlier names of options, still accepted on the command line, and those that replaced them."""


@dataclass(frozen=True, kw_only=True)
class _SetOptions(NormalForm):
    """Turn videos into shards."""

    RECIPES: ClassVar = "shard"
    SHOWN: ClassVar = (
        *("videos", "splits", "split", "out", "test_fraction", "classes", "payload", "width"),
        *("height", "workers", "executor", "dry_run", "strict", "slice"),
    )

    dataset: Dataset | None = None
    """For YAML files: the data set that the file is for; must be the command's."""
    videos: tuple[Path, ...] | Path
    """Folders of the videos."""
    out: Path
    """Gets one folder for each set."""
    payload: Literal["jpeg", "mp4"] = "jpeg"
    """How pictures are stored."""
    samples_per_shard: int = ShardSettings.samples_per_shard
    """Samples in a shard."""
    samples_per_part: int = ShardSettings.samples_per_part
    """Samples that a worker makes at a time; the bytes do not depend on it."""
    read_back: ReadBack = ShardSettings.read_back
    """Frames that are decoded again and compared: every 8th, or all for a sixth more CPU time."""
    damaged: Damaged = ShardSettings.damaged
    """Videos with damaged or missing frames: reject them, or keep what decodes, with a note."""
    seed: int = ShardSettings.seed
    """Seed of the shuffle and of the test share."""
    executor: Literal["local", "ray"] = ShardSettings.executor
    """What makes the parts: processes of this machine, or a Ray cluster."""
    ray_address: str = ShardSettings.ray_address
    """Of the cluster; auto: the one that this machine belongs to, local: one is started here."""
    workers: int = ShardSettings.workers
    """Processes of the local executor; 0 is one for each CPU."""
    worker_memory: float = ShardSettings.worker_memory
    """GB that a worker may use, a video that needs more is rejected; 0 is no bound."""
    timeout_s: float = ShardSettings.timeout_s
    """Seconds without a packet, a frame or a segment after which a video counts as hung."""
    dry_run: bool = False
    """Report what would be done, and time it on a few videos."""
    slice: str | None = None
    """I/N: make only slice I of N; by default the task of a launcher or of a Slurm array."""
    log: LogKind = "bar"
    """What to write on stderr."""
    monitor: ExporterConfig = field(default_factory=lambda: ExporterConfig(port=0))
    """Where to answer Prometheus; port 0 serves nothing."""
    strict: bool = False
    """Treat a listed video that is not on disk as an error."""
    max_rejects: float = 0.05
    """Share of rejected videos above which the command ends with exit status 2."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        try:
            super().__post_init__()
        except ShardError as error:
            raise ConfigError(str(error)) from error
        check_range(self, "max_rejects", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class _OfficialOptions(_SetOptions):
    """Turn UCF101 or HMDB51 into shards."""

    splits: Path
    """Folder of the official lists."""
    split: Literal[1, 2, 3, "all"] = 1
    """Which official split."""


@dataclass(frozen=True, kw_only=True)
class _KineticsOptions(_SetOptions):
    """Turn Kinetics into shards."""

    splits: Path
    """The official csv, or the folder of them."""
    split: Literal["train", "val", "test", "all"] = "all"
    """Which official split."""
    classes: Path | None = None
    """Names of classes, one a line; by default all classes in the lists."""


@dataclass(frozen=True, kw_only=True)
class _FolderOptions(_SetOptions):
    """Turn a folder of videos into shards: one subfolder for each class, or no labels."""

    test_fraction: float = 0.0
    """Share of each class for a test set."""


_OPTIONS: dict[str, type[_SetOptions]] = {
    "ucf101": _OfficialOptions,
    "hmdb51": _OfficialOptions,
    "kinetics400": _KineticsOptions,
    "kinetics600": _KineticsOptions,
    "kinetics700": _KineticsOptions,
    "folder": _FolderOptions,
}


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Write the manifest over all slices."""

    folders: tuple[Path, ...]
    """Folders of sets, or the --out that holds some; may be given without the option's name."""
    max_rejects: float = 0.05
    """Share of rejected videos above which the command ends with exit status 2."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Index foreign shards: tars with mp4 and cls or json members."""

    folder: Path
    """Holds the tars; may be given without the option's name."""
    classes: Path | None = None
    """Names of classes, one a line; by default as found in the samples."""
    index_out: Path | None = None
    """Gets index and manifest, with links to the tars; by default they are beside the tars."""
    width: int = NormalForm.width
    """Pixels that the loader scales to."""
    height: int = NormalForm.height
    """Pixels that the loader scales to."""
    fit: Literal["stretch", "crop"] = NormalForm.fit
    """For other aspect ratios."""
    min_frames: int = NormalForm.min_frames
    """Shorter videos are left out."""
    workers: int = 0
    """Threads; 0 is one for each CPU."""
    max_rejects: float = 0.05
    """Share of rejected videos above which the command ends with exit status 2."""


@dataclass(frozen=True, kw_only=True)
class ShardCommand:
    """The options of `tools/shard.py` for a data set."""

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
    """Whether only to report what would be done."""
    log: LogKind = "bar"
    """What to write on stderr."""
    monitor: ExporterConfig
    """Where to answer Prometheus while it works."""
    settings: ShardSettings


_TASKS = (*_OPTIONS, "merge", "index")


def usage() -> str:
    """The help of the command without a data set."""
    program = commands.shown_program("tools/shard.py")
    about = {name: options.__doc__ for name, options in _OPTIONS.items()}
    about |= {"merge": MergeOptions.__doc__, "index": IndexOptions.__doc__}
    lines = [f"  {name:<14}{(text or '').splitlines()[0]}" for name, text in about.items()]
    return "\n".join(
        [
            f"usage: {program} {{{','.join(_TASKS)}}} ...",
            "",
            *lines,
            "",
            f"`{program} folder --help` explains the options of one.",
        ]
    )


def slice_of(given: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which part of the shards this process makes, from 0, and how many parts there are.

    Args:
        given: The option, `i/n`, if there is one; it takes precedence over a launcher.
        environment: Where torchrun and DeepSpeed leave RANK and WORLD_SIZE, Slurm's srun
            SLURM_PROCID and SLURM_STEP_NUM_TASKS, and its arrays SLURM_ARRAY_TASK_ID and others.

    Raises:
        ConfigError: The part does not exist.
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
        raise ConfigError(f"{origin} is not a part; use 0/n to (n-1)/n")
    return index, count


def _share_of_cpus() -> int:
    """Processes for this one's share of the machine, or 0 for all of it."""
    beside = launch.local_world_size() or 1
    return 0 if beside < 2 else max(usable_cpus() // beside, 1)


def _normalized(argv: Sequence[str]) -> list[str]:
    """Arguments in today's names, `--config` first and all folders of `--videos` in one list.

    So the command line takes precedence over files, whatever the order.
    """
    configs, words, videos, rest = [], [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        old = name[2:].replace("-", "_") if name.startswith("--") else ""
        if name == "--videos":
            values = [value] if equals else list(takewhile(lambda w: not w.startswith("--"), rest))
            videos += values
            rest = rest if equals else rest[len(values) :]
        elif name == "--config" and (equals or rest):
            path = value if equals else rest.pop(0)
            _check_keys(path)
            configs.append(f"--config={path}")
        else:
            words.append(f"--{_OLD_NAMES[old]}{equals}{value}" if old in _OLD_NAMES else word)
    if videos:
        words.append(f"--videos={json.dumps(videos)}")
    return [*configs, *words]


def _check_keys(path: str) -> None:
    """Check a YAML file for earlier names of options; everything else `parse_config` checks.

    Raises:
        ConfigError: The file has one.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # `parse_config` reads the file too and reports the error.
    for key in content if isinstance(content, dict) else ():
        if key in _OLD_NAMES:
            outer, _, inner = _OLD_NAMES[key].partition(".")
            today = f"{outer}: {{{inner}: {content[key]}}}" if inner else f"{outer}: {content[key]}"
            raise ConfigError(f"{path}: {key} has another name now; write {today}")


def _parse(
    options: type[OptionsT], argv: Sequence[str], command: str, positional: str | None = None
) -> OptionsT:
    return parse_config(
        options,
        argv,
        prog=f"tools/shard.py {command}",
        description=(options.__doc__ or "").splitlines()[0],
        positional=positional,
    )


def parse_merge(argv: Sequence[str]) -> MergeOptions:
    """Parse what follows `tools/shard.py merge`.

    Raises:
        ConfigError: An argument is unknown or out of its range.
    """
    return _parse(MergeOptions, argv, "merge", "folders")


def parse_index(argv: Sequence[str]) -> IndexOptions:
    """Parse what follows `tools/shard.py index`.

    Raises:
        ConfigError: An argument is unknown or out of its range.
    """
    return _parse(IndexOptions, argv, "index", "folder")


def parse_command(argv: Sequence[str]) -> ShardCommand:
    """Parse the command line of a data set: its name, then its options.

    Raises:
        ConfigError: An argument is unknown or out of its range.
    """
    if not argv or argv[0] not in _OPTIONS:
        given = argv[0] if argv else "nothing"
        raise ConfigError(
            f"{commands.shown_program('tools/shard.py')}: the first argument is one of "
            f"{', '.join(_TASKS)}; got {given}{did_you_mean(given, _TASKS)}"
        )
    dataset: Dataset = argv[0]  # pyright: ignore[reportAssignmentType]
    options = _parse(_OPTIONS[dataset], _normalized(argv[1:]), dataset)
    if options.dataset not in (None, dataset):
        raise ConfigError(f"--config is for {options.dataset}; the command says {dataset}")
    slice_index, slice_count = slice_of(options.slice, os.environ)
    settings = ShardSettings(
        form=NormalForm(**{f.name: getattr(options, f.name) for f in fields(NormalForm)}),
        samples_per_shard=options.samples_per_shard,
        samples_per_part=options.samples_per_part,
        seed=options.seed,
        read_back=options.read_back,
        damaged=options.damaged,
        executor=options.executor,
        ray_address=options.ray_address,
        workers=options.workers or _share_of_cpus(),
        worker_memory=options.worker_memory,
        slice_index=slice_index,
        slice_count=slice_count,
        timeout_s=options.timeout_s,
    )
    return ShardCommand(
        dataset=dataset,
        videos=(options.videos,) if isinstance(options.videos, Path) else options.videos,
        out=options.out,
        splits=getattr(options, "splits", None),
        split=str(getattr(options, "split", 1)),
        classes=getattr(options, "classes", None),
        test_fraction=getattr(options, "test_fraction", 0.0),
        strict=options.strict,
        max_rejects=options.max_rejects,
        dry_run=options.dry_run,
        log=options.log,
        monitor=options.monitor,
        settings=settings,
    )
