"""The launcher's environment: the only file that reads or sets its variables.

Launchers are `deepspeed`, `torchrun` and Slurm's `srun`. This file imports nothing of ours, so that
errors and logs can ask for the rank.
"""

import os
import re
from collections.abc import Callable, Mapping

__all__ = [
    "LaunchError",
    "address",
    "complete",
    "is_launched",
    "local_rank_of_task",
    "local_world_size",
    "rank_text",
    "ranks",
    "ranks_of_node",
    "set_ranks",
    "slurm_environment",
    "task_of_job",
    "unset",
]


class LaunchError(ValueError):
    """A launcher's variable has another form than in its manual."""


def is_launched() -> bool:
    """Whether a launcher, or srun through `complete`, gave this process its rank."""
    return "RANK" in os.environ


def rank_text() -> str | None:
    """The rank as the launcher wrote it; None without one."""
    return os.environ.get("RANK")


def complete() -> None:
    """Add the variables of torchrun where `srun` or DeepSpeed set the same under other names.

    Logs, DALI's share of the cores and DeepSpeed read them.

    Raises:
        LaunchError: Slurm's variables are not understood.
    """
    if not is_launched():
        os.environ.update(slurm_environment(os.environ))
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])


def ranks() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this node; 0, 1 and 0 where no launcher set anything.

    Raises:
        LaunchError: One is not a number.
    """
    try:
        return (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
            int(os.environ.get("LOCAL_RANK", "0")),
        )
    except ValueError as error:
        raise LaunchError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers: {error}") from error


def set_ranks(rank: int, size: int, local_rank: int) -> list[str]:
    """Set those of the three variables that no launcher has set; returns their names."""
    wanted = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank}
    added = {name: str(value) for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    return list(added)


def unset(names: list[str]) -> None:
    """Remove the variables that `set_ranks` has set."""
    for name in names:
        os.environ.pop(name, None)


def address() -> str | None:
    """Where the ranks meet, `host:port`; None where no address is set."""
    if "MASTER_ADDR" not in os.environ:
        return None
    return f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"


def local_world_size() -> int | None:
    """Ranks on this node; None where the launcher does not set them, or not to a number."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else None


def ranks_of_node() -> int:
    """Ranks on this node; all ranks where the launcher does not set them."""
    return local_world_size() or ranks()[1]


def local_rank_of_task() -> int:
    """Rank on this node of a process that may be a task of `srun`; 0 without a launcher."""
    text = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return int(text) if text.isdecimal() else 0


_ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP"))


def task_of_job(environment: Mapping[str, str]) -> tuple[int, int, str] | None:
    """Which task of how many a process is: of ranks or of a step of `srun`, and of a Slurm array.

    Each task of an array may have ranks or steps of its own; then all have the same number of them.

    Args:
        environment: Of the process.

    Returns:
        Number of the task from 0, number of tasks, and the variables that state it; None without a
        launcher.

    Raises:
        LaunchError: A variable is not a number.
    """
    parts: list[tuple[int, int]] = []
    found: list[str] = []

    def add(names: tuple[str, ...], numbers: Callable[[list[int]], tuple[int, int]]) -> bool:
        if not all(name in environment for name in names):
            return False
        origin = " ".join(f"{name}={environment[name]}" for name in names)
        try:
            parts.append(numbers([int(environment[name]) for name in names]))
        except ValueError as error:
            raise LaunchError(f"{origin}: not numbers") from error
        found.append(origin)
        return True

    # Numbers of an array may begin anywhere and have steps: --array=10-30:10 is three tasks.
    add(_ARRAY, lambda n: ((n[0] - n[2]) // max(n[3], 1), n[1]))
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if add(names, lambda n: (n[0], n[1])):
            break
    if not parts:
        return None
    index, count = 0, 1
    for number, size in parts:
        index, count = index * size + number, count * size
    return index, count, " ".join(found)


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun from those of `srun`; empty outside a job step.

    Only a step of `srun` has SLURM_STEP_NUM_TASKS: a plain `python` inside a batch script is a
    world of one, however many tasks the job was given. Rank 0 is on the first node of the list, and
    the port follows from the job's and the step's number, so that all ranks agree on both without
    communication. MASTER_ADDR and MASTER_PORT have precedence where they are set.

    Args:
        environment: Of a process of the step.

    Returns:
        Variables to add.

    Raises:
        LaunchError: A variable of Slurm's has another form than in its manual.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment:
        return {}
    try:
        job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        on_nodes = _unfold_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
        found = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(on_nodes[int(environment["SLURM_NODEID"])]),
            "MASTER_ADDR": _first_host(environment["SLURM_STEP_NODELIST"]),
            # Below the ports that Linux gives to outgoing connections.
            "MASTER_PORT": str(15_000 + job % 15_000),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise LaunchError(
            f"Slurm's environment is not understood ({type(error).__name__}: {error}); start with "
            "srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        ) from error
    return {
        name: value
        for name, value in found.items()
        if not (name.startswith("MASTER_") and name in environment)
    }


def _unfold_counts(counts: str) -> list[int]:
    """Tasks of each node: `2(x3),1` is 2, 2, 2, 1."""
    unfolded: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        unfolded += [int(count)] * int(times.rstrip(")") or 1)
    return unfolded


def _first_host(nodes: str) -> str:
    """The first host of Slurm's short form: `gpu[003-007,9],cpu1` begins with `gpu003`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
