"""The rank of this process and the size of its process group, from the launcher's environment.

Apart from `strata.distributed`, so that commands without collectives do not import torch: it takes
1.2 s of processor time in every worker process of sharding.
"""

from dataclasses import dataclass

from strata import launch
from strata.errors import WorldError

__all__ = ["World", "current_world"]


@dataclass(frozen=True, kw_only=True)
class World:
    """The rank of this process and the size of its process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only rank that writes shared files."""
        return self.rank == 0


def current_world() -> World:
    """Read rank and world size from the environment; without a launcher, rank 0 of 1.

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
        raise WorldError(f"RANK {rank} is not in a world of {size}; fix the launcher's settings")
    return World(rank=rank, size=size, local_rank=local_rank)
