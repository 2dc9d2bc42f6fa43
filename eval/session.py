"""Where an evaluation stands: a formed world, a checkpoint, its network, the sets to measure on."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from strata.config import plain
from strata.dataload.classification import check_pair
from strata.dataload.reader import ShardReader
from strata.distributed import (
    World,
    all_equal,
    current_world,
    join_world,
    leave_world,
    only_writer,
)
from strata.errors import CheckpointError, ConfigError
from strata.eval.protocols.features import FeatureConfig, Features, extract_features
from strata.eval.protocols.pixels import PIXEL_MAPS, PixelMaps, PixelMapsChoice
from strata.eval.report import build_page
from strata.eval.report_page import Page, write_page
from strata.eval.results import PairResult, set_sizes, table, write_record
from strata.files import FolderLock
from strata.telemetry.gpu import GpuCollector
from strata.telemetry.metrics import ExporterConfig, Metrics
from strata.telemetry.serve import export_process
from strata.train.engine import EngineConfig, choose_device
from strata.train.models.backbones import Backbone, build_backbone
from strata.train.run.checkpoint import (
    RunState,
    backbone_config,
    find_checkpoint,
    load_backbone,
    read_marker,
    read_state,
    trained_clips,
)

__all__ = [
    "Bench",
    "Evaluation",
    "Network",
    "OneNetwork",
    "SetPair",
    "network_name",
    "open_bench",
    "set_pairs",
]

Network = int | PixelMapsChoice | None
"""The seed of an untrained network, maps of pixels, or None for the checkpoint's weights."""


def network_name(which: Network) -> str:
    """As a part of a file's name."""
    if which is None:
        return "pretrained"
    return which if isinstance(which, str) else f"untrained-{which}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What all evaluations share."""

    checkpoint: Path
    """A run's folder, whose newest checkpoint is taken, or a checkpoint's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """How a video becomes features."""
    monitor: ExporterConfig = field(default_factory=lambda: ExporterConfig(port=0))
    """Where to answer Prometheus while it works; by default nowhere."""
    out: Path | None = None
    """File for the result, beside which its page gets the ending .html; by default report.json in
    a folder of its own under the checkpoint's run, in eval/."""


@dataclass(frozen=True, kw_only=True)
class OneNetwork(Evaluation):
    """An evaluation of one network."""

    weights: Literal["pretrained", "untrained", "thumbnails", "motion"] = "pretrained"
    """untrained draws the same network anew from the seed: the baseline. thumbnails and motion
    take no network but 8x8 maps of the clips' pixels, or of what changes between frames."""
    seed: int = 0
    """Of the untrained weights."""
    untrained_seeds: tuple[int, ...] = (0,)
    """Seeds of untrained networks that go through the same protocol, to stand beside the figures;
    [] leaves them out."""
    backbone: Literal["any", "r3d18", "s3d"] = "any"
    """The encoder that the checkpoint must have; another is refused."""
    data: tuple[Path, ...] = ()
    """Folders of shards with train01, test01 and so on, for instance [shards/ucf101,
    shards/hmdb51]: instead of a training and a test set."""
    splits: tuple[int, ...] = (1, 2, 3)
    """Splits of each folder of `data`."""

    @property
    def networks(self) -> dict[str, "Network"]:
        """Which networks are measured, by row."""
        if self.weights == "untrained":
            return {"measured": self.seed}
        if self.weights in PIXEL_MAPS:
            return {"measured": self.weights}
        found: dict[str, Network] = {"measured": None}
        return found | {f"untrained, seed {s}": s for s in self.untrained_seeds}


@dataclass(frozen=True, kw_only=True)
class SetPair:
    """A training set and a test set of the same classes."""

    data: str
    split: str
    train: ShardReader
    test: ShardReader

    def facts(self) -> dict[str, Any]:
        """What identifies the sets."""
        return {
            name: {
                "folder": str(reader.location),
                "manifest_digest": reader.manifest.digest,
                "num_listed": reader.num_listed,
                "num_videos": reader.num_samples,
            }
            for name, reader in (("train", self.train), ("test", self.test))
        }


def set_pairs(
    config: OneNetwork, train: Path | None, test: Path | None, names: tuple[str, str]
) -> list[SetPair]:
    """The sets of an evaluation, opened and compared.

    Args:
        config: With `data` and `splits`.
        train: One training set, instead of `data`.
        test: Its test set.
        names: What the two are called on the command line.

    Raises:
        ConfigError: Neither or both are given, or the classes of a pair differ.
        ShardError: A folder is missing or incomplete.
    """
    both = f"--{names[0]} and --{names[1]}"
    if config.data:
        if train is not None or test is not None:
            raise ConfigError(f"give either --data or {both}, not all")
        if not config.splits:
            raise ConfigError("--splits is empty; use for instance [1,2,3]")
        return [
            _pair(root.name, str(n), root / f"train{n:02d}", root / f"test{n:02d}")
            for root in config.data
            for n in config.splits
        ]
    if train is None or test is None:
        raise ConfigError(f"give {both}, or --data with folders of train01 and test01")
    return [_pair("", "", train, test)]


def _pair(data: str, split: str, first: Path, second: Path) -> SetPair:
    train, test = ShardReader(first), ShardReader(second)
    check_pair(train, test)
    return SetPair(
        data=data or train.manifest.dataset,
        split=split or f"{train.manifest.split}/{test.manifest.split}",
        train=train,
        test=test,
    )


class Bench:
    """A formed world, a checkpoint, and a way to its network or an untrained one.

    Args:
        config: The evaluation's settings.
        found: The checkpoint's folder.
        world: This rank and its peers.
        device: Where to compute.
        metrics: Of this process.
    """

    def __init__(
        self,
        config: Evaluation,
        found: Path,
        world: World,
        device: torch.device,
        metrics: Metrics,
    ) -> None:
        self.metrics = metrics
        self.world, self.device, self.found = world, device, found
        self.state: RunState = read_state(found)
        clips = trained_clips(self.state.config)
        self.features = dataclasses.replace(
            config.features,
            size=config.features.size or clips.size,
            clip_frames=config.features.clip_frames or clips.frames,
        )
        self.config = config
        self.results = found.parent.parent / "eval"
        self.identity = read_marker(found)
        all_equal("checkpoint", self.identity)
        if isinstance(config, OneNetwork):
            self._check_backbone(config.backbone)

    def _check_backbone(self, wanted: str) -> None:
        name = backbone_config(self.state.config).name
        if wanted not in ("any", name):
            raise CheckpointError(
                f"{self.found} holds the encoder {name}, --backbone asks for {wanted}; choose "
                "another checkpoint, or leave --backbone out"
            )

    def network(self, which: Network) -> tuple[Backbone, str]:
        """An encoder on the device, and what identifies its weights."""
        if which is None:
            return load_backbone(self.found).to(self.device), self.identity
        if isinstance(which, str):
            return PixelMaps(which), f"pixels: {which}"
        torch.manual_seed(which)
        backbone = build_backbone(backbone_config(self.state.config))
        identity = json.dumps([self.state.config["model"], "untrained", which])
        return backbone.to(self.device), identity

    def encode(self, reader: ShardReader, which: Network, *, backwards: bool = False) -> Features:
        """Features of a data set, from the cache where they are; see `extract_features`."""
        backbone, identity = self.network(which)
        return extract_features(
            backbone,
            reader,
            self.features,
            world=self.world,
            device=self.device,
            network=identity,
            cache=self.results / "features",
            metrics=self.metrics,
            backwards=backwards,
        )

    def settings(self) -> dict[str, Any]:
        """The evaluation's settings with what was left to the checkpoint."""
        return plain(dataclasses.replace(self.config, features=self.features))

    def clips_text(self) -> str:
        """The clips of a video in words."""
        f = self.features
        return (
            f"{f.num_clips} clips of {f.clip_frames} frames at stride {f.stride} placed uniformly, "
            f"centre crop{'' if f.crop == 1 else f' of {f.crop:g} of the short side'}, "
            f"{f.size}x{f.size}"
        )

    def folder(self, name: str, parts: object) -> Path:
        """A folder under the checkpoint's run for one evaluation, by what identifies it."""
        text = json.dumps([self.identity, plain(parts)], sort_keys=True)
        return self.results / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def report_path(self, name: str, results: list[PairResult]) -> Path:
        """Where the result goes."""
        sets = [r.sets for r in results]
        return self.config.out or self.folder(name, [self.settings(), sets]) / "report.json"

    def write(
        self,
        name: str,
        protocol: str,
        results: list[PairResult],
        more: dict[str, Any],
        *,
        path: Path | None = None,
        decorate: Callable[[Page], Page] = lambda page: page,
    ) -> None:
        """Leave `report.json` with all that decided it and its page, and print the figures.

        Args:
            name: Of the evaluation.
            protocol: In words.
            results: One for each pair of sets.
            more: Further fields of the report.
            path: The file; by default `report_path`.
            decorate: Adds to the page what the report does not hold.
        """
        if not self.world.is_first:
            return
        settings = self.settings()
        path = path or self.report_path(name, results)
        head = {
            "evaluation": name,
            "protocol": protocol,
            "checkpoint": str(self.found),
            "checkpoint_digest": hashlib.sha256(self.identity.encode()).hexdigest(),
            "step": self.state.step,
            "settings": settings,
            "num_ranks": self.world.size,
            "device": self.device.type,
            "pretraining": self.state.config,
            "pretraining_manifest_digest": self.state.manifest_digest,
            **more,
        }
        record = write_record(path, head, results)
        if record["incomplete"]:
            print(record["incomplete"])
        print(f"{name} of {self.found}\n  protocol: {protocol}")
        for result in results:
            print(f"  {result.data} {result.split}: {set_sizes([result.sets])}")
            print(table(result.figures, indent="    "))
            if result.variants:
                print(table(result.variants, indent="    "))
        for data, mean in record["by_data"].items():
            if mean["num_splits"] > 1:
                print(f"  {data}, mean of {mean['num_splits']} splits")
                print(table(mean["mean"], mean["deviation"], indent="    "))
        # After all else: a data set that has gone costs the page, not the figures.
        page = path.with_suffix(".html")
        write_page(decorate(build_page(plain(record))), page)
        print(f"  written to {path} and {page}", flush=True)


@contextmanager
def open_bench(config: Evaluation) -> Iterator[Bench]:
    """Form the world and open the checkpoint; dissolve the world at the end.

    Raises:
        CheckpointError: There is none, or it is of another encoder.
    """
    found = find_checkpoint(config.checkpoint)
    if found is None:
        raise CheckpointError(
            f"{config.checkpoint} holds no complete checkpoint; pretrain with train/main.py first, "
            "or mend --checkpoint"
        )
    device = choose_device(EngineConfig(device=config.device), current_world())
    world = join_world(device)
    run = found.parent.parent
    exporter = export_process(
        config.monitor,
        role="evaluate",
        run=run.resolve().name,
        rank=world.rank,
        local_rank=world.local_rank,
        places={"run": run},
    )
    try:
        with _only_report(config, run / "eval", world), exporter as metrics:
            if device.type == "cuda":
                properties = torch.cuda.get_device_properties(device)
                metrics.add_collector(GpuCollector(str(properties.uuid)))
            yield Bench(config, found, world, device, metrics)
    finally:
        leave_world()


def _only_report(
    config: Evaluation, results: Path, world: World
) -> AbstractContextManager[FolderLock | None]:
    """Keep out a second evaluation that would write the same report."""
    if config.out is not None:
        folder, name = config.out.parent, f".{config.out.name}.lock"
    else:
        described = json.dumps([type(config).__name__, plain(config)], sort_keys=True)
        folder, name = results, f".{hashlib.sha256(described.encode()).hexdigest()[:16]}.lock"
    advice = "wait for it, or use another --out"
    return only_writer(folder, "evaluating", world, advice=advice, name=name)
