"""Run a function on every rank of a real gloo process group and return the results.

The processes are forked from a server that has imported much and has never computed anything, so a
group of four starts in well under a second after the first.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from strata.distributed import World, leave_world

_SERVER = multiprocessing.get_context("forkserver")
# DeepSpeed looks for GPUs when it is imported, after which a fork could not use them.
_GPU = Path("/proc/driver/nvidia").exists()
_SERVER.set_forkserver_preload(
    ["torch.distributed", "strata.train.method.objective"] if _GPU else ["tests.support.preloaded"]
)


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call `function(world, *args)` on each rank of a new gloo group.

    Args:
        function: At the top level of an importable module.
        num_ranks: Processes; 1 is a group of one, not this process.
        args: Arguments, the same on every rank; must be picklable.
        timeout_s: Seconds until the group is ended and the test fails.

    Returns:
        The result of each rank, in the order of ranks; any value that `torch.save` supports.

    Raises:
        AssertionError: A rank raised (its traceback is the message), died or timed out.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            _SERVER.Process(target=_rank, args=(function, r, num_ranks, folder, timeout_s, args))
            for r in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.exitcode is None for process in ranks):
                if any(process.exitcode for process in ranks):
                    break  # The others wait for the rank that has died.
                assert time.monotonic() < deadline, f"ranks not done within {timeout_s} s"
                time.sleep(0.01)
        finally:
            for process in ranks:
                if process.exitcode is None:
                    process.kill()
                process.join()
        for rank, process in enumerate(ranks):
            error = folder / f"error-{rank}"
            if error.exists():
                raise AssertionError(f"rank {rank}:\n{error.read_text(encoding='utf-8')}")
            assert process.exitcode in (0, -9), f"rank {rank} ended with {process.exitcode}"
        return [
            torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(num_ranks)
        ]


def _rank(
    function: Callable[..., Any],
    rank: int,
    num_ranks: int,
    folder: Path,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        # The group uses a file, but DeepSpeed and join_world need these variables.
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
        )
        world = World(rank=rank, size=num_ranks, local_rank=rank)
        torch.save(function(world, *args), folder / f"result-{rank}")
        leave_world()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise
