"""One batch as pictures: made as in training, written as contact sheets (PNG) and videos (mp4).

A contact sheet has a row of frames for each view; a video has the views side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from strata.dataload.config import DataConfig
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.errors import ConfigError
from strata.eval.pictures import contact_sheet, write_video
from strata.ranges import check_range
from strata.untrusted import file_stem

__all__ = ["InspectConfig", "side_by_side", "write_batch"]

_GAP = 4
_RATE = 8
"""Frames a second of the videos: slow enough to see single frames."""
_ZOOM = 2


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Write the views of a training batch as pictures and videos."""

    SHOWN: ClassVar = (
        *("data.shards", "data.batch_size", "data.size", "data.clips.max_stride"),
        *("out", "num", "seed", "epoch", "step"),
    )
    RECIPES: ClassVar = "pretrain"

    data: DataConfig
    """As in training: every config of train/main.py has it."""
    out: Path
    """Folder for the pictures and videos."""
    num: int = 8
    """Samples of the batch to write."""
    seed: int = 0
    """The run's seed."""
    epoch: int = 0
    """The epoch, from 0."""
    step: int = 0
    """The step within the epoch, from 0."""

    def __post_init__(self) -> None:
        check_range(self, "num", at_least=1)
        check_range(self, "epoch", "step", at_least=0)


def side_by_side(views: Sequence[np.ndarray]) -> np.ndarray:
    """The views as one video; shorter ones are repeated.

    Args:
        views: `[T, S, S, 3]` each, uint8.

    Returns:
        Shape `[longest T, even rows, even columns, 3]`, uint8.
    """
    length = max(map(len, views))
    parts = []
    for frames in views:
        looped = frames[np.arange(length) % len(frames)]
        parts += [looped, np.full((*looped.shape[:2], _GAP, 3), 255, np.uint8)]
    joined = np.concatenate(parts[:-1], axis=2)
    return joined.repeat(_ZOOM, axis=1).repeat(_ZOOM, axis=2)


def _make_batch(config: InspectConfig, reader: ShardReader) -> Batch:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    plan = open_plan(reader, config.data, config.seed)
    if config.step >= plan.steps_per_epoch:
        raise ConfigError(
            f"step is {config.step}, an epoch has {plan.steps_per_epoch} of "
            f"{config.data.batch_size} samples; use a smaller step or data.batch_size"
        )
    loader = TrainLoader(
        reader,
        config.data,
        plan,
        world=World(),
        device=device,
        epochs=(config.epoch, config.epoch + 1),
        start_step=config.step,
    )
    with loader:
        return next(iter(loader))


def write_batch(config: InspectConfig) -> tuple[int, int]:
    """Write the first samples of a batch as pictures and videos.

    Returns:
        The number of samples written, and of those in the batch.

    Raises:
        ConfigError: The epoch has no such step.
    """
    reader = ShardReader(config.data.shards, config.data.check, config.data.download)
    batch = _make_batch(config, reader)
    config.out.mkdir(parents=True, exist_ok=True)
    classes = reader.manifest.classes
    for row, sample in enumerate(batch.samples[: config.num].tolist()):
        views = [(f"short clip {k + 1}", batch.short[row, k].cpu().numpy()) for k in range(2)]
        if batch.long is not None:
            views.append(("long sequence", batch.long[row].cpu().numpy()))
        label = int(reader.labels[sample])
        name = f"{row:03d}-{file_stem(reader.keys[sample])}"
        title = f"{reader.keys[sample]}   {classes[label] if label >= 0 else 'no label'}"
        title += f"   seed {config.seed}, epoch {config.epoch}, step {config.step}"
        sheet = contact_sheet(views, title, config.data.clips.clip_frames)
        sheet.save(config.out / f"{name}.png")
        write_video(config.out / f"{name}.mp4", side_by_side([v for _, v in views]), _RATE)
    return min(config.num, len(batch.samples)), len(batch.samples)
