"""Collective operations over the ranks of a run; on one process each is the identity.

This is the only module that imports `torch.distributed`. Ranks come from the environment that the
launchers (`deepspeed`, `torchrun`, `srun`) set. If the requested process group does not form, that
is fatal: there is no fallback to a single process.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strata import launch
from strata.errors import ConfigError, WorldError
from strata.files import FolderLock
from strata.world import World, current_world

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
_added: list[str] = []
"""Environment variables that `join_world` set for DeepSpeed because no launcher did."""


def watch_collectives(watch: Callable[[], AbstractContextManager[None]] | None) -> None:
    """Run every collective of a step inside `watch()`, to time it; None stops the timing."""
    global _watch
    _watch = nullcontext if watch is None else watch


def _store_of_one() -> dict[str, Any]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    return {"store": store, "rank": 0, "world_size": 1}


def join_world(device: torch.device, timeout_s: float = 600.0) -> World:
    """Form the process group: NCCL for GPUs, gloo for CPUs.

    Args:
        device: The device on which this rank computes.
        timeout_s: Seconds to wait for the group to form, and for every collective.

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
    _added.extend(launch.set_ranks(world.rank, world.size, world.local_rank))
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
                # A single process needs no port, which could be in use.
                **(_store_of_one() if alone else {}),
            )
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise WorldError(
                f"the world of {world.size} did not form at {address} (waiting at most "
                f"{timeout_s:.0f} s): {error}; check the network, or choose another --master_port"
            ) from error
    return world


def leave_world() -> None:
    """Destroy the process group, and unset the variables that `join_world` set.

    Otherwise commands that this process starts later would believe to be its ranks.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    launch.unset(_added)
    _added.clear()


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank has called this."""
    if _size() > 1:
        dist.barrier()


def gather(local: Tensor) -> Tensor:
    """Concatenate every rank's rows in the order of ranks, without gradient.

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


def _gather_together(local: Sequence[Tensor]) -> list[Tensor]:
    """All ranks' rows of several tensors of one shape, by one collective."""
    stacked = gather(torch.stack(list(local)))
    # [R n, b, ...] -> n of [R b, ...]
    ordered = stacked.unflatten(0, (_size(), len(local))).transpose(0, 1)
    return list(ordered.flatten(1, 2).unbind())


class _GatherWithGrad(torch.autograd.Function):
    """Forward: gather. Backward: every rank's gradient of this rank's rows, summed."""

    @staticmethod
    def forward(ctx: Any, *local: Tensor) -> tuple[Tensor, ...]:
        gathered = _gather_together(local)
        wanted = ctx.needs_input_grad
        ctx.mark_non_differentiable(
            *(g for g, is_wanted in zip(gathered, wanted, strict=True) if not is_wanted)
        )
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = [g for g, wanted in zip(grads, ctx.needs_input_grad, strict=True) if wanted]
        # n of [R b, ...] -> R of [n, b, ...]
        parts = [part.contiguous() for part in torch.stack(needed).chunk(_size(), dim=1)]
        own = torch.empty_like(parts[0])
        with _watch():
            dist.reduce_scatter(own, parts)
        rows = iter(own.unbind())
        return tuple(next(rows) if wanted else None for wanted in ctx.needs_input_grad)


def gather_with_grad(*local: Tensor) -> tuple[Tensor, ...]:
    """Concatenate every rank's rows in the order of ranks, with gradient to every rank.

    If each rank's loss is the mean over its own anchors and parameter gradients are then averaged
    over ranks, R ranks of b rows give the gradient of one rank of R b rows. All tensors travel in
    one collective, and their gradients in another; those that need none get none.

    Args:
        local: Each of shape `[b, ...]`, the same for all and on every rank.

    Returns:
        Each of shape `[R b, ...]`.
    """
    return local if _size() == 1 else _GatherWithGrad.apply(*local)  # pyright: ignore[reportReturnType]


def gather_keeping_own_grad(*local: Tensor) -> tuple[Tensor, ...]:
    """Concatenate every rank's rows in the order of ranks; only this rank's rows get gradient.

    Args:
        local: Each of shape `[b, ...]`, the same for all and on every rank.

    Returns:
        Each of shape `[R b, ...]`.
    """
    if _size() == 1:
        return local
    results = []
    for mine, rows in zip(local, _gather_together(local), strict=True):
        parts = list(rows.split(len(mine)))
        parts[dist.get_rank()] = mine
        results.append(torch.cat(parts))
    return tuple(results)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean over ranks, without gradient, as a new tensor."""
    values = values.detach().clone()
    if _size() > 1:
        dist.all_reduce(values)
        values /= _size()
    return values


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank. Synchronises the host."""
    if _size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def any_rank(flag: Tensor) -> Tensor:
    """Logical or of `flag` (bool) over ranks, on the device, without waiting for the result."""
    if _size() == 1:
        return flag
    value = flag.to(torch.uint8)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.bool()


class Ballot:
    """Logical or of host flags over all ranks, once a step, without using the device.

    The flags are exchanged over a separate gloo group, so the host neither waits for the GPU nor
    gives it work. If a rank has died the vote fails at once; a collective of NCCL would hang.

    Args:
        timeout_s: Seconds until an unfinished vote is fatal.
    """

    def __init__(self, timeout_s: float) -> None:
        self._group: Any = None
        if _size() > 1:
            self._group = dist.new_group(
                backend="gloo", timeout=datetime.timedelta(seconds=timeout_s)
            )

    def vote(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any rank. All ranks call it."""
        if self._group is None:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values.bool().tolist()


def lost_peer(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when another rank has died or is late."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "connection closed by peer", "connection reset by peer")
    )


def broadcast_object(value: Any) -> Any:
    """Send rank 0's `value` to every rank."""
    if _size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Collect every rank's `value` in the order of ranks, on every rank."""
    if _size() == 1:
        return [value]
    box: list[Any] = [None] * _size()
    dist.all_gather_object(box, value)
    return box


def all_equal(name: str, value: str) -> None:
    """Check that `value` is the same on all ranks.

    Raises:
        WorldError: It is not; the message names the first rank that differs from rank 0.
    """
    agree({name: value})


def agree(facts: Mapping[str, str]) -> None:
    """Check that all ranks have the same named facts. All ranks call it.

    Raises:
        WorldError: They differ; the message names the first rank and fact that do.
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
    """Lock a folder so that no other run writes to it. All ranks call it.

    Args:
        folder: The folder; created if it does not exist.
        work: What is done there, for the error message of a second run.
        world: This rank and the world size.
        advice: What to do if the folder is in use.
        name: Name of the lock file.

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
