"""Chooses at the start of a run whether the GPU or the CPU augments: whichever makes more samples.

`data.augment: auto` on a GPU means: both ways make a few batches, one way after the other, on all
ranks at the same time, as ranks share the cores of their node. The rate of a way is the batch over
the time of the slowest rank. The CPU augments if it is at least as fast, since that leaves the GPU
to the network; else the GPU does. It is measured once in a run: a run that is resumed uses what
its checkpoint says, so its batches have the same bits.

Nothing is measured, and the GPU augments, where the CPU cannot: with `data.decode: gpu`, for video
that only a GPU decodes, and with a cache, which the measurement would have to fill twice.
Evaluation does not measure either: it augments on the GPU if there is one.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from strata.dataload.config import DataConfig
from strata.dataload.graph_spec import CPU_VIDEO_CODECS
from strata.dataload.loader import TrainLoader
from strata.dataload.plan import Plan
from strata.dataload.reader import ShardReader
from strata.distributed import World, gather_objects

__all__ = ["AugmentChoice", "batch_seconds", "choose_augment", "faster"]

_MEASURED = 4
"""Batches of each way that are timed."""
_FOREVER = 1_000_000
"""Epochs: the loader is closed long before."""


@dataclass(frozen=True)
class AugmentChoice:
    """Where a run augments, and why.

    Args:
        augment: The device that augments.
        rates: Samples per second of the global batch, for each way.
    """

    augment: Literal["cpu", "gpu"]
    rates: dict[str, float]

    def text(self) -> str:
        """The line of the start-up page."""
        rates = ", ".join(f"{rate:,.0f} on the {name.upper()}" for name, rate in self.rates.items())
        return f"on the {self.augment.upper()}, as measured: {rates} samples/s"


def faster(rates: dict[str, float]) -> AugmentChoice:
    """Choose by the rates of `cpu` and `gpu`; a tie is the CPU's."""
    return AugmentChoice("cpu" if rates["cpu"] >= rates["gpu"] else "gpu", rates)


def batch_seconds(
    batches: Iterator[object],
    *,
    ahead: int,
    wait: Callable[[], object],
    clock: Callable[[], float],
) -> float:
    """Seconds that a loader needs for a batch.

    Args:
        batches: Its batches.
        ahead: How many it makes ahead; they and the set-up are not timed.
        wait: Waits for the device.
        clock: Seconds.
    """
    for _ in range(ahead):
        next(batches)
    wait()
    start = clock()
    for _ in range(_MEASURED):
        next(batches)
    wait()
    return (clock() - start) / _MEASURED


def choose_augment(
    reader: ShardReader,
    config: DataConfig,
    plan: Plan,
    *,
    world: World,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> AugmentChoice | None:
    """Measure both ways and choose; None where there is no choice. All ranks call it.

    Args:
        reader: The data set.
        config: Settings of the batches.
        plan: The order of samples.
        world: This rank and its peers.
        device: Where batches go.
        clock: Seconds.
    """
    form = reader.manifest.form
    only_gpu = form.payload == "mp4" and form.codec not in CPU_VIDEO_CODECS
    settled = config.augment != "auto" or config.decode == "gpu" or config.cache != "none"
    if device.type != "cuda" or only_gpu or settled:
        return None
    rates = {}
    for way in ("gpu", "cpu"):
        loader = TrainLoader(
            reader,
            dataclasses.replace(config, augment=way),
            plan,
            world=world,
            device=device,
            epochs=(0, _FOREVER),
        )
        with loader:
            seconds = batch_seconds(
                iter(loader),
                ahead=loader.ahead,
                wait=lambda: torch.cuda.synchronize(device),
                clock=clock,
            )
        rates[way] = config.batch_size / max(gather_objects(seconds))
    return faster(rates)
