"""Strata compared with the published training: `python tools/bench.py published --shards DIR`.

Both do the `release` recipe's work on the same videos, on the same device, with as many loader
workers or threads as there are cores: `published_method` in fp32 with frame files in a
`DataLoader`, Strata as it trains by default. Data alone, the step alone (its second stage), and end
to end, in turns; a ratio is taken within a round, so that a noisy machine affects both sides.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from strata.config import parse_config, plain
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.limits import usable_cpus
from strata.ranges import check_range
from strata.tools.benchmarks.measure import (
    best_device,
    in_turns,
    machine,
    machine_line,
    parse_options,
    rate,
    spread,
    table,
    wait_for,
    write_record,
)
from strata.tools.benchmarks.published_method import (
    FrameFiles,
    PublishedModel,
    adam,
    published_loss,
    write_frame_files,
)
from strata.train.config import TrainConfig
from strata.train.method.model import VideoModel
from strata.train.method.objective import Method
from strata.train.method.schedules import phase_at

__all__ = ["main"]

_RECIPE = "ucf101_r3d18_release"
_ENDLESS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedOptions:
    """Strata and the published training in turns: data alone, the step alone, end to end."""

    shards: Path
    """A folder of jpeg shards."""
    videos: int = 64
    """Videos that are written as frame files."""
    batch: int = 256
    """Samples in a step."""
    size: int = 112
    """Rows and columns of a view."""
    width: int = 64
    """Channels of the stem."""
    workers: int = usable_cpus()
    """Worker processes of the published loader, and threads of Strata's."""
    seconds: float = 20.0
    """Duration of each measurement."""
    rounds: int = 3
    """Turns of each."""
    out: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_range(self, "videos", "batch", "workers", "rounds", at_least=1)


class _Training(Protocol):
    """A source of batches and a training step that takes one."""

    ahead: int
    """Batches that the source holds ready."""

    def open(self) -> Iterator[Any]: ...

    def close(self) -> None: ...

    def step(self, batch: Any) -> None: ...


class _Task:
    """Settings of both trainings: recipe, device, sizes."""

    def __init__(self, options: PublishedOptions) -> None:
        self.options = options
        self.device = best_device()
        self.on_gpu = self.device.type == "cuda"
        self.reader = ShardReader(options.shards)
        overrides = {
            "data.shards": options.shards,
            "data.batch_size": options.batch,
            "data.size": options.size,
            "data.threads": options.workers,
            "model.width": options.width,
            "model.in_channels": 4 if self.on_gpu else 3,
            "method.queue_length": max(1024, options.batch),
            "run": "unused",
        }
        flags = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        self.config = parse_config(
            TrainConfig, ["--config", _RECIPE, *flags], prog="published", description=""
        )
        # The stage in which every term is computed.
        self.phase = phase_at(self.config.schedule, self.config.schedule.second_stage_epoch)

    def orders(self, model: VideoModel) -> list[torch.Tensor]:
        """The orders of the steps for L_aug; the same for every batch here."""
        samples = np.arange(self.options.batch)
        orders = model.orders(samples, 0, 0, self.config.data.clips.clip_frames)
        return [order.to(self.device) for order in orders]


class _Published:
    """Frame files in a `DataLoader`; fp32, channels first, pools of negatives."""

    def __init__(self, task: _Task, frames: Path) -> None:
        self._task, options, config = task, task.options, task.config
        self.ahead = 2 * options.workers
        write_frame_files(task.reader, frames, options.videos)
        self._files = FrameFiles(frames, config.data.clips, options.size, options.batch * _ENDLESS)
        torch.manual_seed(0)
        backbone = dataclasses.replace(config.model, in_channels=3)
        model = PublishedModel(backbone, config.method, config.data.clips.clip_frames)
        self._model = model.to(task.device).train()
        self._optimizer, self._orders = adam(self._model), task.orders(self._model)
        self._batches: Any = None

    def open(self) -> Iterator[torch.Tensor]:
        """`[b, 3, T, S, S, 3]`, uint8, on the host."""
        loader = DataLoader(
            self._files,
            self._task.options.batch,
            num_workers=self._task.options.workers,
            multiprocessing_context="spawn",
            pin_memory=self._task.on_gpu,
        )
        self._batches = iter(loader)
        return self._batches

    def close(self) -> None:
        self._batches._shutdown_workers()

    def step(self, batch: torch.Tensor) -> None:
        views, task = batch.to(self._task.device, non_blocking=True), self._task
        out = self._model(views[:, :2], views[:, 2], *self._orders, task.phase)
        published_loss(self._model, out, task.config.method, use_queue=True).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class _Strata:
    """The loader and the step as they train by default; without DeepSpeed's bookkeeping."""

    def __init__(self, task: _Task) -> None:
        self._task, config = task, task.config
        self.ahead = config.data.prefetch
        torch.manual_seed(0)
        model = VideoModel(config.model, config.method, config.data.clips.clip_frames)
        self._model = model.to(task.device).train()
        self._model.backbone.channels_last()
        self._method = Method(self._model, config.method, World())
        self._optimizer = torch.optim.Adam(
            model.parameters(), lr=1e-3, weight_decay=1e-5, fused=task.on_gpu
        )
        self._orders = task.orders(self._model)
        self._loader: TrainLoader | None = None

    def open(self) -> Iterator[Batch]:
        task = self._task
        self._loader = TrainLoader(
            task.reader,
            task.config.data,
            open_plan(task.reader, task.config.data, 0),
            world=World(),
            device=task.device,
            epochs=(0, _ENDLESS),
        ).start()
        return iter(self._loader)

    def close(self) -> None:
        assert self._loader is not None
        self._loader.close()

    def step(self, batch: Batch) -> None:
        task = self._task
        with torch.autocast("cuda", torch.bfloat16, enabled=task.on_gpu):
            out = self._model(batch.short, batch.long, *self._orders, task.phase)
        self._method.losses(out, task.phase, with_health=False).total.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _rates(training: _Training, task: _Task) -> dict[str, float]:
    """Samples a second of each part of a training, measured one after the other."""

    def samples_per_s(run: Callable[[], None], warmup: int) -> float:
        wait = partial(wait_for, task.device)
        seconds, items = task.options.seconds, task.options.batch
        return rate(run, seconds, items=items, warmup=warmup, wait=wait)

    batches = training.open()
    # Batches that were made ahead before the clock started do not count.
    data = samples_per_s(lambda: next(batches), training.ahead + 1)
    end_to_end = samples_per_s(lambda: training.step(next(batches)), training.ahead + 1)
    batch = next(batches)
    training.close()
    step = samples_per_s(lambda: training.step(batch), 1)
    return {"data": data, "step": step, "end to end": end_to_end}


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: An option is wrong.
    """
    options = parse_options(PublishedOptions, argv, "published")
    task = _Task(options)
    facts = machine(task.device)
    print(machine_line(facts))
    with tempfile.TemporaryDirectory() as frames:
        trainings: dict[str, _Training] = {
            "published": _Published(task, Path(frames)),
            "strata": _Strata(task),
        }
        runs = {name: partial(_rates, each, task) for name, each in trainings.items()}
        rounds = in_turns(runs, options.rounds)
    print(
        f"{options.workers} workers; samples/s of batches of {options.batch}, median (range) of "
        f"{options.rounds} rounds"
    )
    rows = []
    for part in ("data", "step", "end to end"):
        pairs = [(r["published"][part], r["strata"][part]) for r in rounds]
        cells = [[p for p, _ in pairs], [s for _, s in pairs], [s / p for p, s in pairs]]
        rows.append([part, *map(spread, cells)])
    print(table(["", "published", "Strata", "ratio"], rows))
    record = {"machine": facts, "settings": plain(options), "rounds": rounds}
    write_record(options.out, record)
