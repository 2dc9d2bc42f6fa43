"""Settings of a grid: rows, evaluations, seeds and splits, and their commands."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from strata.config import dotted, parse_config, plain
from strata.errors import ConfigError
from strata.eval.evaluations.runners import RUNNERS
from strata.ranges import check_range
from strata.tools.ablation_table import Cell
from strata.train.config import TrainConfig

__all__ = [
    "AblateConfig",
    "EvaluationConfig",
    "RatesConfig",
    "RowConfig",
    "evaluating",
    "pretraining",
    "resolved",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_DECIDED = ("run", "seed", "resume", "plan_only", "method.teacher")
"""Settings of a pretraining that the grid decides."""
_DECIDED_OF_EVALUATIONS = (
    "checkpoint",
    "out",
    "weights",
    "seed",
    "train",
    "test",
    "gallery",
    "query",
)
"""Settings of an evaluation that the grid decides."""
_FREE = (
    *("run", "seed", "resume", "data.shards", "method.teacher", "checkpoint", "out"),
    *("monitor.", "checkpoint."),
)
"""Settings that do not change what a figure means: they may differ when a grid is resumed."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """One row of the table: a pretraining that each seed repeats."""

    pretrain: Path | None = None
    """Configuration of the pretraining instead of the grid's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of train/main.py by their dotted names."""
    untrained: str = ""
    """Instead of a pretraining: another row, whose network is evaluated with new random weights
    from the seed. The baseline."""
    teacher: str = ""
    """Another row, whose encoder of the same split and seed teaches this one (method.teacher)."""
    pixels: Literal["", "thumbnails", "motion"] = ""
    """With untrained: instead of that row's network none, but 8x8 maps of the clips' pixels."""

    def __post_init__(self) -> None:
        if self.untrained and (self.set or self.teacher or self.pretrain is not None):
            raise ConfigError("a row with untrained has no set, teacher or pretrain of its own")
        if self.pixels and not self.untrained:
            raise ConfigError(
                f"a row with pixels {self.pixels} takes size and frames of its clips from another "
                "row; name that in untrained"
            )
        _refuse(self.set, _DECIDED, "a row")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One evaluation of every run."""

    protocol: Literal["retrieval", "linear", "finetune"]
    """First word of eval/main.py."""
    train: Path | None = None
    """Shards of the training set (retrieval's gallery); by default the pretraining's."""
    test: Path | None = None
    """Shards of the test set (retrieval's queries); by default the grid's."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of eval/main.py by their dotted names. With `data`, train and test are left out."""

    def __post_init__(self) -> None:
        _refuse(self.set, _DECIDED_OF_EVALUATIONS, "an evaluation")
        if "data" in self.set and (self.train or self.test):
            raise ConfigError("an evaluation has data in its set; leave out train and test")


def _refuse(settings: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if name in settings:
            raise ConfigError(f"{where} sets {name}, which the grid decides; leave it out")


@dataclass(frozen=True, kw_only=True)
class RatesConfig:
    """How fast a pretraining is, for `plan_only`: measured figures, by tools/bench.py train."""

    stage_1: float = 0.0
    """Samples a second of one GPU while only short clips are encoded; 0: not measured."""
    stage_2: float = 0.0
    """Samples a second of one GPU while the long sequence is encoded too."""
    num_videos: int = 0
    """Training videos; 0 takes those of the shards."""
    source: str = ""
    """Where the rates were measured, in words."""

    def __post_init__(self) -> None:
        check_range(self, "stage_1", "stage_2", "num_videos", prefix="rates.", at_least=0)
        if bool(self.stage_1) != bool(self.stage_2):
            raise ConfigError("rates: give stage_1 and stage_2, or neither")


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """A grid."""

    RECIPES: ClassVar = "ablate"
    SHOWN: ClassVar = (
        *("pretrain", "rows", "evaluations", "shards", "out", "seeds", "splits", "launcher"),
        *("side_by_side", "plan_only"),
    )

    rows: dict[str, RowConfig]
    """The table's rows by name."""
    evaluations: dict[str, EvaluationConfig]
    """The table's columns by name."""
    pretrain: Path
    """Configuration of the pretrainings, for train/main.py."""
    shards: str | Path
    """What is pretrained on: a folder of shards, or its URL. With splits a folder that holds
    train01, test01 and so on."""
    out: Path
    """Folder for everything; the same command resumes there."""
    test: Path | None = None
    """Test set of the evaluations that name none. With splits it is the split's own."""
    splits: tuple[int, ...] = ()
    """Splits of `shards`; each row is pretrained on the training set of each, with each seed, and
    tested on its test set. The table has means and standard errors over splits and seeds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a run of every row; it decides weights, order and augmentation of the pretraining."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of train/main.py for all rows; a row's own come after them."""
    launcher: str = "deepspeed"
    """Starts each process: for instance `deepspeed --num_gpus 4`, `deepspeed --hostfile hosts
    --master_addr NODE`, `torchrun --standalone --nproc_per_node 4 --`, `srun python`, `python`."""
    side_by_side: int = 1
    """Runs at once, each with its share of the GPUs that are visible here: many small runs on one
    node, or on one GPU. The launcher must not choose GPUs then."""
    on_failure: Literal["continue", "stop"] = "continue"
    """Whether the other runs still start after a run failed. The table names it either way, and the
    same command tries it again."""
    plan_only: bool = False
    """Print the commands, and with rates the GPU-hours of the pretrainings, and end."""
    rates: RatesConfig = field(default_factory=RatesConfig)
    """For the GPU-hours."""
    title: str = "Ablation"
    """Of the table."""

    def __post_init__(self) -> None:
        for what in ("rows", "evaluations", "seeds"):
            if not getattr(self, what):
                raise ConfigError(f"{what} is empty; a grid needs one or more")
        for name in (*self.rows, *self.evaluations):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"the name {name!r} becomes that of a folder; use letters, digits and _.+- only"
                )
        for name, row in self.rows.items():
            for what in ("untrained", "teacher"):
                used = getattr(row, what)
                other = self.rows.get(used)
                if used and (other is None or other.untrained or other.teacher):
                    raise ConfigError(
                        f"row {name}: {what} is {used!r}; name a row that is pretrained without "
                        "a teacher"
                    )
        for what in ("seeds", "splits"):
            values = getattr(self, what)
            if len(set(values)) < len(values):
                raise ConfigError(f"{what} {list(values)} repeat; each counts once")
        if self.splits and self.test is not None:
            raise ConfigError("a grid with splits has a test set by split; leave out test")
        if not shlex.split(self.launcher):
            raise ConfigError("launcher is empty; use for instance deepspeed")
        check_range(self, "side_by_side", at_least=1)
        _refuse(self.set, _DECIDED, "set")

    def cells(self) -> list[Cell]:
        """All runs, seed by seed, so that the first seed gives a complete table."""
        rows = self.out / "rows"
        # What is untrained or taught needs another row's checkpoint.
        ordered = sorted(
            self.rows, key=lambda name: bool(self.rows[name].untrained or self.rows[name].teacher)
        )
        cells = []
        for seed in self.seeds:
            for split in self.splits or (None,):
                place = Path(f"seed-{seed}" if split is None else f"split-{split}/seed-{seed}")
                cells += [
                    Cell(
                        row=name,
                        seed=seed,
                        split=split,
                        folder=rows / name / place,
                        source=rows / (self.rows[name].untrained or name) / place,
                        teacher=rows / teacher / place
                        if (teacher := self.rows[name].teacher)
                        else None,
                    )
                    for name in ordered
                    # Pixels are the same whatever the seed.
                    if not self.rows[name].pixels or seed == self.seeds[0]
                ]
        return cells

    def training_set(self, cell: Cell) -> str:
        """Shards that a run is pretrained on."""
        shards = str(self.shards)
        return shards if cell.split is None else f"{shards.rstrip('/')}/train{cell.split:02d}"

    def test_set(self, cell: Cell) -> Path | None:
        """Test set of a run whose evaluation names none."""
        if cell.split is None:
            return self.test
        return Path(self.shards) / f"test{cell.split:02d}"


def _words(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(plain(value))]
    return words


def pretraining(config: AblateConfig, cell: Cell) -> list[str]:
    """Arguments of train/main.py for a run."""
    row = config.rows[cell.row]
    return [
        *("--config", str(row.pretrain or config.pretrain)),
        *("--data.shards", config.training_set(cell)),
        *_words({**config.set, **row.set}),
        *([] if cell.teacher is None else ["--method.teacher", str(cell.teacher / "run")]),
        *("--seed", str(cell.seed), "--run", str(cell.run), "--resume", "auto"),
    ]


def evaluating(config: AblateConfig, cell: Cell, name: str) -> list[str]:
    """Arguments of eval/main.py for an evaluation of a run."""
    evaluation = config.evaluations[name]
    words = [evaluation.protocol, "--checkpoint", str(cell.run)]
    if "data" not in evaluation.set:
        train = evaluation.train or config.training_set(cell)
        test = evaluation.test or config.test_set(cell)
        if test is None:
            raise ConfigError(f"evaluation {name} has no test set; give test to it or to the grid")
        if "://" in str(train):
            raise ConfigError(
                f"evaluation {name}: {train} is not a folder; give it a train of its own"
            )
        words += ["--train", str(train), "--test", str(test)]
    # The grid has a row for untrained networks, or does not want any.
    words += ["--untrained_seeds", "[]", *_words(evaluation.set)]
    row = config.rows[cell.row]
    if row.untrained:
        words += ["--weights", row.pixels or "untrained", "--seed", str(cell.seed)]
    return [*words, "--out", str(cell.report(name))]


def resolved(config: AblateConfig) -> dict[str, Any]:
    """The settings of each row and evaluation, with all defaults.

    Raises:
        ConfigError: A setting is unknown or out of its range.
    """
    rows, evaluations = {}, {}
    first = {cell.row: cell for cell in reversed(config.cells())}
    cells = list(first.values())
    for cell in cells:
        row = config.rows[cell.row]
        rows[cell.row] = {
            "untrained": row.untrained,
            "teacher": row.teacher,
            "pixels": row.pixels,
        }
        if not row.untrained:
            prog = f"row {cell.row}: train/main.py"
            built = parse_config(TrainConfig, pretraining(config, cell), prog=prog, description="")
            rows[cell.row] |= _leaves(built)
    for name, evaluation in config.evaluations.items():
        prog = f"evaluation {name}: eval/main.py {evaluation.protocol}"
        settings, _ = RUNNERS[evaluation.protocol]
        trained = next(c for c in cells if not config.rows[c.row].untrained)
        words = evaluating(config, trained, name)[1:]
        built = parse_config(settings, words, prog=prog, description="")
        evaluations[name] = {"protocol": evaluation.protocol} | _leaves(built)
    return {"schema": 1, "rows": rows, "evaluations": evaluations}


def _leaves(built: Any) -> dict[str, Any]:
    found = dotted(plain(built))
    return {k: v for k, v in found.items() if not k.startswith(_FREE)}
