"""The verbs of a group of processes; each is the identity on one process.

The only importer of `torch.distributed`. Ranks come from the environment that the launchers
(`deepspeed`, `torchrun`, `srun`) set. A requested world that does not form is fatal: nothing here
falls back to a world of one.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strata import launch
from strata.errors import ConfigError, WorldError
from strata.files import FolderLock

__all__ = [
    "Ballot",
    "World",
    "agree",
    "all_equal",
    "any_rank",
    "any_true",
    "barrier",
    "broadcast_object",
    "current_world",
    "gather",
    "gather_keeping_own_grad",
    "gather_objects",
    "gather_with_grad",
    "join_world",
    "leave_world",
    "lost_peer",
    "mean_over_ranks",
    "only_writer",
    "watch_collectives",
]


_watch: Callable[[], AbstractContextManager[None]] = nullcontext
_told: list[str] = []
"""Variables that `join_world` has set, for DeepSpeed, because no launcher had."""


def watch_collectives(watch: Callable[[], AbstractContextManager[None]] | None) -> None:
    """Let `watch()` enclose every collective of a step, to time it; None ends it."""
    global _watch
    _watch = nullcontext if watch is None else watch


@dataclass(frozen=True, kw_only=True)
class World:
    """Who this process is among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes what there is one of."""
        return self.rank == 0


def current_world() -> World:
    """The world as the environment states it; rank 0 of 1 where no launcher set anything.

    Where `srun` alone started this process, the variables that the other launchers set are added to
    the environment: logs, DALI's share of the cores and DeepSpeed read them too.

    Raises:
        WorldError: RANK and WORLD_SIZE contradict each other or are not numbers.
    """
    try:
        launch.complete()
        rank, size, local_rank = launch.ranks()
    except launch.LaunchError as error:
        raise WorldError(str(error)) from error
    if not 0 <= rank < size:
        raise WorldError(f"RANK {rank} is not in a world of {size}; mend the launcher's settings")
    return World(rank=rank, size=size, local_rank=local_rank)


def _store_of_one() -> dict[str, Any]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    return {"store": store, "rank": 0, "world_size": 1}


def join_world(device: torch.device, timeout_s: float = 600.0) -> World:
    """Form the process group: NCCL for GPUs, gloo for CPUs.

    Args:
        device: Where this rank computes.
        timeout_s: Seconds until a group that does not form, or a stalled collective, is fatal.

    Raises:
        WorldError: The group did not form in time.
    """
    world = current_world()
    address = launch.address()
    alone = address is None
    if alone and world.size > 1:
        raise WorldError(
            f"a world of {world.size} needs MASTER_ADDR and MASTER_PORT; "
            "start with deepspeed or torchrun"
        )
    _told.extend(launch.set_ranks(world.rank, world.size, world.local_rank))
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
                # One process meets nobody: no port that another program could take.
                **(_store_of_one() if alone else {}),
            )
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise WorldError(
                f"the world of {world.size} did not form at {address} (waiting at most "
                f"{timeout_s:.0f} s): {error}; mend the network, or choose another --master_port"
            ) from error
    return world


def leave_world() -> None:
    """Dissolve the process group, and take back what `join_world` told the environment.

    Else commands that this process starts later would take themselves for its ranks.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    launch.unset(_told)
    _told.clear()


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if _size() > 1:
        dist.barrier()


def gather(local: Tensor) -> Tensor:
    """Every rank's rows, in the order of ranks, without gradient.

    Args:
        local: Shape `[b, ...]`, the same on every rank.

    Returns:
        Shape `[R b, ...]`.
    """
    local = local.detach()
    if _size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(_size())]
    with _watch():
        dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class _GatherWithGrad(torch.autograd.Function):
    """Forward: gather. Backward: every rank's gradient of this rank's rows, summed."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.num_rows = local.shape[0]
        return gather(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        # Not reduce_scatter: gloo has none. The tensors are small: B x C floats a term.
        grad = grad.contiguous().clone()
        with _watch():
            dist.all_reduce(grad)
        start = dist.get_rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows]


def gather_with_grad(local: Tensor) -> Tensor:
    """Every rank's rows, in the order of ranks, differentiable.

    If each rank's loss is the mean over its own anchors and parameter gradients are then averaged
    over ranks, R ranks of b rows give the gradient of one rank of R b rows.

    Args:
        local: Shape `[b, ...]`, the same on every rank.

    Returns:
        Shape `[R b, ...]`.
    """
    return local if _size() == 1 else _GatherWithGrad.apply(local)  # pyright: ignore[reportReturnType]


def gather_keeping_own_grad(local: Tensor) -> Tensor:
    """Every rank's rows, in the order of ranks; gradient flows into this rank's own rows alone.

    Args:
        local: Shape `[b, ...]`, the same on every rank.

    Returns:
        Shape `[R b, ...]`.
    """
    if _size() == 1:
        return local
    parts = list(gather(local).split(local.shape[0]))
    parts[dist.get_rank()] = local
    return torch.cat(parts)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean over ranks, without gradient; a new tensor."""
    values = values.detach().clone()
    if _size() > 1:
        dist.all_reduce(values)
        values /= _size()
    return values


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on any rank. Synchronises the host."""
    if _size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def any_rank(flag: Tensor) -> Tensor:
    """Where `flag` (bool) holds on any rank, on the device, without waiting for it."""
    if _size() == 1:
        return flag
    value = flag.to(torch.uint8)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.bool()


class Ballot:
    """Flags of the hosts on which all ranks agree once a step, without touching the device.

    They go over a group of their own on gloo, so a GPU is neither waited for nor given work; where
    a rank is gone, the vote fails at once, which a collective of NCCL would not.

    Args:
        timeout_s: Until a vote that does not end is fatal.
    """

    def __init__(self, timeout_s: float) -> None:
        self._group: Any = None
        if _size() > 1:
            self._group = dist.new_group(
                backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)
            )

    def vote(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank raised it. All ranks call it."""
        if self._group is None:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values.bool().tolist()


def lost_peer(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when another rank is gone or does not come."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "connection closed by peer", "connection reset by peer")
    )


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if _size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on every rank."""
    if _size() == 1:
        return [value]
    box: list[Any] = [None] * _size()
    dist.all_gather_object(box, value)
    return box


def all_equal(name: str, value: str) -> None:
    """Check that all ranks hold the same `value`.

    Raises:
        WorldError: They do not; names the first rank that differs from rank 0.
    """
    agree({name: value})


def agree(facts: Mapping[str, str]) -> None:
    """Check that all ranks hold the same facts, by name. All ranks call it.

    Raises:
        WorldError: They do not; names the first rank and fact that differ from rank 0's.
    """
    every: list[Mapping[str, str]] = gather_objects(dict(facts))
    for rank, theirs in enumerate(every):
        for name in sorted(every[0].keys() | theirs.keys()):
            first, other = every[0].get(name, "absent"), theirs.get(name, "absent")
            if first != other:
                raise WorldError(
                    f"rank {rank} has another {name} than rank 0 ({other} against {first}); "
                    "start all ranks with the same code, config and data"
                )


@contextmanager
def only_writer(
    folder: Path, work: str, world: World, *, advice: str, name: str = ".lock"
) -> Iterator[FolderLock | None]:
    """Make sure that no other group of processes writes to a folder. All ranks call it.

    Args:
        folder: Made if it does not exist.
        work: What is done there, for the message of who comes second.
        world: This rank and its peers.
        advice: What to do where the folder is in use.
        name: Of the lock's file.

    Yields:
        The lock that rank 0 holds; None on other ranks.

    Raises:
        ConfigError: The folder is in use or cannot be written; on all ranks.
    """
    with ExitStack() as stack:
        lock, wrong = None, ""
        if world.is_first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(FolderLock(folder, work, ConfigError, advice, name))
            except ConfigError as error:
                wrong = str(error)
            except OSError as error:
                wrong = f"the folder {folder} cannot be written: {error}; {advice}"
        wrong = broadcast_object(wrong)
        if wrong:
            raise ConfigError(wrong)
        yield lock
