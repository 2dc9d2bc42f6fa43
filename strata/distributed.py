"""The verbs of a group of processes; each is the identity on one process.

The only importer of `torch.distributed`. Ranks come from the environment that the launchers
(`deepspeed`, `torchrun`, `srun` with our wrapper) set. A requested world that does not form is
fatal: nothing here falls back to a world of one.
"""

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strata.errors import WorldError

__all__ = [
    "World",
    "all_equal",
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
    "mean_over_ranks",
]


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

    Raises:
        WorldError: RANK and WORLD_SIZE contradict each other or are not numbers.
    """
    try:
        rank = int(os.environ.get("RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise WorldError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}"
        ) from error
    if not 0 <= rank < size:
        raise WorldError(f"RANK {rank} is not in a world of {size}; mend the launcher's settings")
    return World(rank=rank, size=size, local_rank=local_rank)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_world(device: torch.device, timeout_s: float = 600.0) -> World:
    """Form the process group: NCCL for GPUs, gloo for CPUs.

    Args:
        device: Where this rank computes.
        timeout_s: Seconds until a group that does not form, or a stalled collective, is fatal.

    Raises:
        WorldError: The group did not form in time.
    """
    world = current_world()
    if "MASTER_ADDR" not in os.environ:
        if world.size > 1:
            raise WorldError(
                f"a world of {world.size} needs MASTER_ADDR and MASTER_PORT; "
                "start with deepspeed or torchrun"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(_free_port())
    for name, value in (
        ("RANK", world.rank),
        ("WORLD_SIZE", world.size),
        ("LOCAL_RANK", world.local_rank),
    ):
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError, TimeoutError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
            raise WorldError(
                f"the world of {world.size} did not form at {where} (waiting at most "
                f"{timeout_s:.0f} s): {error}; mend the network, or choose another --master_port"
            ) from error
    return world


def leave_world() -> None:
    """Dissolve the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise WorldError(
                f"rank {rank} has another {name} than rank 0 ({other} against {values[0]}); "
                "start all ranks with the same code, config and data"
            )
