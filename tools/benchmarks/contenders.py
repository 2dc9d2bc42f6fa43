"""What the benchmark of loaders compares: the interface, Strata's loader, and one turn of each."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from strata.dataload.config import DataConfig
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.tools.benchmarks.measure import wait_for

__all__ = ["SEED", "Contender", "StrataContender", "check_equal_work", "measure_round"]

SEED = 0
FOREVER = 1_000_000
_SETTLE_S, _IDLE_SHARE = 0.3, 0.05


class Contender(Protocol):
    """Something that makes batches."""

    @property
    def name(self) -> str:
        """As in the table."""
        ...

    @property
    def granularity(self) -> int:
        """Batches that arrive together."""
        ...

    @property
    def ahead(self) -> int:
        """Batches that may be ready or under way when nobody asks."""
        ...

    @property
    def pids(self) -> Sequence[int]:
        """Processes of its own."""
        ...

    def next(self) -> tuple[Tensor, ...]:
        """Two short clips and the long sequence."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class StrataContender:
    """The training loader.

    Args:
        name: As in the table.
        reader: The shards.
        config: What batches look like.
        device: Where they go.
    """

    granularity = 1
    pids: tuple[int, ...] = ()

    def __init__(
        self, name: str, reader: ShardReader, config: DataConfig, device: torch.device
    ) -> None:
        self.name = name
        self._loader = TrainLoader(
            reader,
            config,
            open_plan(reader, config, SEED),
            world=World(),
            device=device,
            epochs=(0, FOREVER),
        ).start()
        self.ahead = self._loader.ahead
        self._batches = iter(self._loader)

    def next(self) -> tuple[Tensor, ...]:
        """Two short clips and the long sequence, each uint8 `[b, T, S, S, 3]`."""
        batch = next(self._batches)
        if batch.long is None:
            raise AssertionError("the benchmark asks for the long sequence")
        return batch.short[:, 0], batch.short[:, 1], batch.long

    def close(self) -> None:
        """Stop the loader's thread."""
        self._loader.close()


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of this process, all its threads, and the processes `pids`."""
    ticks = 0
    for pid in pids:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def settle(contender: Contender) -> None:
    """Wait until a contender has made all it makes ahead; otherwise it would slow the next one."""
    before, now = -1.0, cpu_seconds(contender.pids)
    while now - before > _IDLE_SHARE * _SETTLE_S:
        time.sleep(_SETTLE_S)
        before, now = now, cpu_seconds(contender.pids)


def _frames_in(batch: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    """The shape of each view with channels last, whatever the layout."""
    shapes = []
    for view in batch:
        last = view if view.shape[-1] == 3 else view.movedim(2, -1)
        shapes.append(tuple(last.shape))
    return shapes


def check_equal_work(batches: dict[str, tuple[Tensor, ...]]) -> None:
    """Compare a batch of every contender with the first's: shapes, type, and pictures in them.

    Raises:
        AssertionError: A contender makes something else, so its rate would mean nothing.
    """
    (first, expected), *_ = batches.items()
    for name, batch in batches.items():
        if _frames_in(batch) != _frames_in(expected):
            raise AssertionError(
                f"{name} makes {_frames_in(batch)}, {first} {_frames_in(expected)}"
            )
        for view in batch:
            spread = float(view.float().std())
            if view.dtype != torch.uint8 or spread < 5:
                raise AssertionError(f"{name}: {view.dtype}, standard deviation {spread:.1f}")


def measure_round(contender: Contender, seconds: float, device: torch.device) -> dict[str, Any]:
    """One turn: skip what was made ahead, then count batches for at least `seconds`."""
    for _ in range(contender.ahead):
        contender.next()
    wait_for(device)
    cpu = cpu_seconds(contender.pids)
    start, samples, count = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds or count % contender.granularity:
        samples += len(contender.next()[0])
        count += 1
    wait_for(device)
    taken = time.perf_counter() - start
    cpu = cpu_seconds(contender.pids) - cpu
    settle(contender)
    return {
        "samples_per_s": samples / taken,
        "cpu_ms_per_sample": cpu / samples * 1e3,
        "samples": samples,
    }
