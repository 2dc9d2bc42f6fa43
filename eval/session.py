"""An evaluation in progress: settings, the world of ranks, the checkpoint and its networks."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from strata import commands
from strata.config import plain
from strata.dataload.reader import ShardReader
from strata.distributed import (
    World,
    all_equal,
    current_world,
    join_world,
    leave_world,
    only_writer,
)
from strata.errors import CheckpointError
from strata.eval.protocols.features import FeatureConfig, Features, extract_features
from strata.eval.protocols.pixels import PixelMaps, PixelMapsChoice
from strata.eval.report import write_page
from strata.eval.results import EvaluationResult, Kind, PairResult, Role, write_json
from strata.eval.sets import SetPair
from strata.eval.summary import full_text
from strata.telemetry.gpu import GpuCollector
from strata.telemetry.metrics import ExporterConfig, Metrics
from strata.telemetry.serve import export_process
from strata.telemetry.targets import run_name
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
    "Evaluation",
    "NamedNetwork",
    "Network",
    "OneNetwork",
    "Session",
    "network_name",
    "open_session",
    "untrained_network",
]

Network = int | PixelMapsChoice | Path | None
"""The seed of an untrained network, maps of pixels, another checkpoint of the same architecture, or
None for the checkpoint's weights."""


def network_name(which: Network) -> str:
    """As a part of a file's name."""
    if which is None:
        return "pretrained"
    return f"untrained-{which}" if isinstance(which, int) else str(which)


@dataclass(frozen=True, kw_only=True)
class NamedNetwork:
    """A network to measure, and the row of figures that it gets."""

    row: str
    role: Role
    which: Network


def untrained_network(seed: int) -> NamedNetwork:
    """The same architecture with weights drawn from a seed: a baseline."""
    return NamedNetwork(row=f"untrained, seed {seed}", role="untrained", which=seed)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What all evaluations share."""

    SHOWN: ClassVar = (
        *("checkpoint", "train", "test", "shards", "data", "splits", "protocol", "variant"),
        *("weights", "untrained_seeds", "others", "features.num_clips", "device", "out"),
    )

    checkpoint: Path
    """A run's folder, whose newest checkpoint is taken, or a checkpoint's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """How a video becomes features."""
    monitor: ExporterConfig = field(default_factory=lambda: ExporterConfig(port=0))
    """Where to serve metrics to Prometheus while it runs; by default nowhere."""
    out: Path | None = None
    """File for the result, beside which its page gets the ending .html; by default report.json in
    a folder of its own under the checkpoint's run, in eval/."""


@dataclass(frozen=True, kw_only=True)
class OneNetwork(Evaluation):
    """An evaluation of one network."""

    weights: Literal["pretrained", "untrained", "thumbnails", "motion"] = "pretrained"
    """untrained draws the weights of the same network from the seed: the baseline. thumbnails and
    motion take no network but 8x8 maps of the clips' pixels, or of what changes between frames."""
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
    def measured(self) -> "Network":
        """The network that is evaluated."""
        if self.weights == "untrained":
            return self.seed
        return None if self.weights == "pretrained" else self.weights

    @property
    def networks(self) -> list[NamedNetwork]:
        """The evaluated network first, then the baselines."""
        seeds = self.untrained_seeds if self.weights == "pretrained" else ()
        first = NamedNetwork(row="measured", role="measured", which=self.measured)
        return [first, *(untrained_network(seed) for seed in seeds)]


class Session:
    """An evaluation in progress: the world of ranks, the checkpoint, and the networks to measure.

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
        if isinstance(which, Path):
            return self._other_network(which)
        if isinstance(which, str):
            return PixelMaps(which), f"pixels: {which}"
        torch.manual_seed(which)
        backbone = build_backbone(backbone_config(self.state.config))
        identity = json.dumps([self.state.config["model"], "untrained", which])
        return backbone.to(self.device), identity

    def _other_network(self, folder: Path) -> tuple[Backbone, str]:
        """The encoder of another checkpoint. All ranks call it.

        Raises:
            CheckpointError: There is none, or its architecture is another.
        """
        found = _checkpoint_of(folder)
        if backbone_config(read_state(found).config) != backbone_config(self.state.config):
            raise CheckpointError(
                f"{found} holds another encoder than {self.found}; compare runs of one architecture"
            )
        identity = (found / "complete.json").read_text(encoding="utf-8")
        all_equal("checkpoint", identity)
        return load_backbone(found).to(self.device), identity

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

    def report_path(self, name: str, sets: Sequence[SetPair]) -> Path:
        """The path of report.json: `out`, or in a folder of its own."""
        facts = [pair.facts() for pair in sets]
        return self.config.out or self.folder(name, [self.settings(), facts]) / "report.json"

    def report(
        self,
        name: str,
        protocols: Mapping[Kind, str],
        pairs: Sequence[PairResult],
        *,
        path: Path | None = None,
        remark: str = "",
    ) -> None:
        """Print the figures, and write report.json and its page. Rank 0 does.

        Args:
            name: Of the evaluation.
            protocols: Each protocol in words.
            pairs: One result for each pair of sets.
            path: The file; by default `report_path`.
            remark: What the page says above the figures.
        """
        if not self.world.is_first:
            return
        config = self.config
        result = EvaluationResult(
            name=name,
            protocols=protocols,
            is_untrained=isinstance(config, OneNetwork) and config.weights == "untrained",
            checkpoint=self.found,
            checkpoint_digest=hashlib.sha256(self.identity.encode()).hexdigest(),
            step=self.state.step,
            settings=self.settings(),
            num_ranks=self.world.size,
            device=self.device.type,
            pretraining=plain(self.state.config),
            pretraining_manifest_digest=self.state.manifest_digest,
            pairs=tuple(pairs),
            remark=remark,
        )
        path = path or self.report_path(name, [pair.sets for pair in pairs])
        write_json(result, path)
        print(full_text(result))
        # Last: a video that cannot be read any more costs the page and not the figures.
        page = path.with_suffix(".html")
        write_page(result, page)
        print(f"  written to {path} and {page}\nto use the encoder elsewhere:")
        words = ("--checkpoint", config.checkpoint, "--out", "exported")
        print(f"  {commands.line('export', *words)}", flush=True)


def _checkpoint_of(path: Path) -> Path:
    """The newest checkpoint of a run, or the checkpoint itself.

    Raises:
        CheckpointError: There is none.
    """
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no complete checkpoint; pretrain with train/main.py first, or correct "
            "the path"
        )
    return found


@contextmanager
def open_session(config: Evaluation) -> Iterator[Session]:
    """Form the world and open the checkpoint; dissolve the world at the end.

    Raises:
        CheckpointError: There is none, or it is of another encoder.
    """
    found = _checkpoint_of(config.checkpoint)
    device = choose_device(EngineConfig(device=config.device), current_world())
    world = join_world(device)
    run = found.parent.parent
    report = _report_of(config, run / "eval")
    exporter = export_process(
        config.monitor,
        role="evaluate",
        run=run_name(config.monitor, report),
        world=world,
        places={"run": run},
    )
    advice = "wait for it, or use another --out"
    lock = f".{report.name}.lock"
    try:
        with (
            only_writer(report.parent, "evaluating", world, advice=advice, name=lock),
            exporter as metrics,
        ):
            if device.type == "cuda":
                properties = torch.cuda.get_device_properties(device)
                metrics.add_collector(GpuCollector(str(properties.uuid)))
            yield Session(config, found, world, device, metrics)
    finally:
        leave_world()


def _report_of(config: Evaluation, results: Path) -> Path:
    """What two evaluations at a time must not share: the report's path, or one by the settings."""
    if config.out is not None:
        return config.out
    described = json.dumps([type(config).__name__, plain(config)], sort_keys=True)
    return results / hashlib.sha256(described.encode()).hexdigest()[:16]
