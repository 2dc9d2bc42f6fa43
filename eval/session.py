"""An opened evaluation: the world of ranks, the checkpoint, and the settings that follow."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from strata.config import plain
from strata.dataload.reader import ShardReader
from strata.distributed import World, current_world, join_world, leave_world, only_writer
from strata.errors import CheckpointError, LostPeerError
from strata.eval.networks import Network, Networks
from strata.eval.protocols.features import Features, extract_features
from strata.eval.sets import SetPair
from strata.eval.settings import Evaluation, OneNetwork
from strata.telemetry.gpu import GpuCollector
from strata.telemetry.metrics import Metrics
from strata.telemetry.serve import export_process
from strata.telemetry.targets import run_name
from strata.train.engine_config import EngineConfig, choose_device
from strata.train.run.checkpoint import RunState, read_state
from strata.train.run.encoder import backbone_config, trained_clips
from strata.train.run.history import require_checkpoint

__all__ = ["Session", "open_session"]


class Session:
    """An evaluation in progress: world, checkpoint, networks and settings.

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
        self.world, self.device, self.checkpoint = world, device, found
        self.state: RunState = read_state(found)
        clips = trained_clips(self.state.config)
        self.features = dataclasses.replace(
            config.features,
            size=config.features.size or clips.size,
            clip_frames=config.features.clip_frames or clips.frames,
        )
        self.config = config
        self.results = found.parent.parent / "eval"
        self.networks = Networks(found, self.state, device)
        if isinstance(config, OneNetwork):
            self._check_backbone(config.backbone)

    def _check_backbone(self, wanted: str) -> None:
        name = backbone_config(self.state.config).name
        if wanted not in ("any", name):
            raise CheckpointError(
                f"{self.checkpoint} holds the encoder {name}, --backbone asks for {wanted}; choose "
                "another checkpoint, or leave --backbone out"
            )

    def encode(self, reader: ShardReader, which: Network, *, backwards: bool = False) -> Features:
        """Features of a data set, from the cache where they are; see `extract_features`."""
        backbone, identity = self.networks.open(which)
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
        """The evaluation's settings, completed from the checkpoint."""
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
        """A folder under the checkpoint's run for one evaluation, named by a hash of its parts."""
        text = json.dumps([self.networks.identity, plain(parts)], sort_keys=True)
        return self.results / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def report_path(self, name: str, sets: Sequence[SetPair]) -> Path:
        """The path of report.json: `out`, or in a folder of its own."""
        facts = [pair.facts() for pair in sets]
        return self.config.out or self.folder(name, [self.settings(), facts]) / "report.json"


@contextmanager
def open_session(config: Evaluation) -> Iterator[Session]:
    """Form the world and open the checkpoint; dissolve the world at the end.

    Raises:
        CheckpointError: There is none, or it is of another encoder.
    """
    found = require_checkpoint(config.checkpoint)
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
    except LostPeerError:
        # Destroying a group that has lost a rank may hang.
        raise
    except BaseException:
        leave_world()
        raise
    leave_world()


def _report_of(config: Evaluation, results: Path) -> Path:
    """A path that no two simultaneous evaluations may share: the report, or one by settings."""
    if config.out is not None:
        return config.out
    described = json.dumps([type(config).__name__, plain(config)], sort_keys=True)
    return results / hashlib.sha256(described.encode()).hexdigest()[:16]
