"""Strata against the published way of training: `python tools/bench.py published --shards DIR`.

Both do the `release` recipe's work on the same videos, on the same device, with as many loader
workers or threads as there are cores: tools/published_way.py in fp32 with frame files in a
`DataLoader`, Strata as it trains by default. Data alone, the step alone (its second stage), and end
to end, in rounds that alternate; the ratio of each round, so that a noisy machine hurts both.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from strata.config import parse_config
from strata.dataload.loader import Batch, TrainLoader, open_plan
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.tools.benchmarks.published_method import (
    FrameFiles,
    PublishedModel,
    adam,
    published_loss,
    write_frame_files,
)
from strata.train.config import TrainConfig
from strata.train.method import Method, VideoModel
from strata.train.schedules import phase_at

__all__ = ["main"]

_RECIPE = Path(__file__).resolve().parent.parent / "configs/pretrain/ucf101_r3d18_release.yaml"
_ENDLESS = 1_000_000


class _Way(Protocol):
    """A way of training: a source of batches and a step that takes one."""

    ahead: int
    """Batches that the source holds ready."""

    def open(self) -> Iterator[Any]: ...

    def close(self) -> None: ...

    def step(self, batch: Any) -> None: ...


class _Task:
    """What both ways are given: the recipe, the device, the sizes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.on_gpu = self.device.type == "cuda"
        self.reader = ShardReader(args.shards)
        overrides = {
            "data.shards": args.shards,
            "data.batch_size": args.batch,
            "data.size": args.size,
            "data.threads": args.workers,
            "model.width": args.width,
            "model.in_channels": 4 if self.on_gpu else 3,
            "method.queue_length": max(1024, args.batch),
            "run": "unused",
        }
        flags = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        self.config = parse_config(
            TrainConfig, ["--config", str(_RECIPE), *flags], prog="published", description=""
        )
        # The stage in which every term is computed.
        self.phase = phase_at(self.config.schedule, self.config.schedule.second_stage_epoch)

    def orders(self, model: VideoModel) -> list[torch.Tensor]:
        """In which the steps are read for L_aug; the same for every batch here."""
        samples = np.arange(self.args.batch)
        orders = model.orders(samples, 0, 0, self.config.data.clips.clip_frames)
        return [order.to(self.device) for order in orders]


class _Published:
    """Frame files in a `DataLoader`; fp32, channels first, pools of negatives."""

    def __init__(self, task: _Task, frames: Path) -> None:
        self._task, args, config = task, task.args, task.config
        self.ahead = 2 * args.workers
        write_frame_files(task.reader, frames, args.videos)
        self._files = FrameFiles(frames, config.data.clips, args.size, args.batch * _ENDLESS)
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
            self._task.args.batch,
            num_workers=self._task.args.workers,
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
        )
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


def _rates(way: _Way, task: _Task) -> dict[str, float]:
    """Samples a second of each part of a way; nothing else works meanwhile."""

    def rate(run: Callable[[], None], uncounted: int) -> float:
        for _ in range(uncounted):
            run()
        _wait(task)
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < task.args.seconds:
            run()
            count += 1
        _wait(task)
        return count * task.args.batch / (time.perf_counter() - start)

    batches = way.open()
    # What was made ahead before the clock started does not count.
    data = rate(lambda: next(batches), way.ahead + 1)
    whole = rate(lambda: way.step(next(batches)), way.ahead + 1)
    batch = next(batches)
    way.close()
    return {"data": data, "step": rate(lambda: way.step(batch), 1), "end to end": whole}


def _wait(task: _Task) -> None:
    if task.on_gpu:
        torch.cuda.synchronize()


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools/bench.py published")
    parser.add_argument("--shards", type=Path, required=True, help="a folder of shards")
    parser.add_argument("--videos", type=int, default=64, help="written as frame files")
    parser.add_argument("--batch", type=int, default=256, help="samples a step")
    parser.add_argument("--size", type=int, default=112, help="pixels of a view")
    parser.add_argument("--width", type=int, default=64, help="channels of the stem")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args(argv)
    task = _Task(args)
    with tempfile.TemporaryDirectory() as frames:
        ways: dict[str, _Way] = {
            "published": _Published(task, Path(frames)),
            "strata": _Strata(task),
        }
        rounds = [{name: _rates(w, task) for name, w in ways.items()} for _ in range(args.rounds)]
    name = torch.cuda.get_device_name() if task.on_gpu else "CPU"
    print(
        f"{name}, {len(os.sched_getaffinity(0))} cores, {args.workers} workers; samples/s of "
        f"batches of {args.batch}, median (range) of {args.rounds} rounds"
    )
    print(f"{'':<12}{'published way':>26}{'Strata':>26}{'ratio':>26}")
    for part in ("data", "step", "end to end"):
        pairs = [(r["published"][part], r["strata"][part]) for r in rounds]
        cells = [[p for p, _ in pairs], [s for _, s in pairs], [s / p for p, s in pairs]]
        print(f"{part:<12}" + "".join(f"{_spread(c):>26}" for c in cells))
    if args.out is not None:
        facts = {"device": name, "torch": torch.__version__, "load": os.getloadavg()}
        settings = {k: str(v) for k, v in vars(args).items()}
        record = {**facts, "settings": settings, "rounds": rounds}
        args.out.write_text(json.dumps(record, indent=2), encoding="utf-8")
