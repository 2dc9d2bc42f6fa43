"""Limits on the memory and CPUs of a process by the kernel and its control groups."""

import math
import os
from pathlib import Path

__all__ = ["available_memory", "usable_cpus"]

_KIB = 1024


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that can be allocated without swapping or being killed, and the source of the limit.

    This is the minimum of the kernel's own estimate and of what each control group (version 1 or 2)
    of this process still allows; file pages that the kernel can reclaim count as free.

    Args:
        root: Where /proc and /sys are.

    Returns:
        The bytes, and `the machine` or the control group's folder.
    """
    found = [(_machine(root), "the machine")]
    for folder, version in _groups(root, "memory"):
        limit, used = (_number(folder / name) for name in _MEMORY_FILES[version])
        if limit is not None and used is not None:
            kept = used - _file_pages(folder)
            found.append((max(limit - kept, 0), f"the control group {folder}"))
    return min(found)


_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}


def usable_cpus(root: Path = Path("/")) -> int:
    """Number of CPUs that this process may use, so how many workers or threads to start.

    This is the minimum of the CPUs that it may run on (`taskset`, Slurm, cpusets) and of the quota
    of each of its control groups (`docker run --cpus`, Kubernetes), rounded up.

    Args:
        root: Where /proc and /sys are.

    Returns:
        At least 1.
    """
    most = len(os.sched_getaffinity(0))
    for folder, version in _groups(root, "cpu"):
        if version == 2:
            quota, period = _two_numbers(folder / "cpu.max")
        else:
            quota, period = (_number(folder / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
        if quota is not None and period:
            most = min(most, math.ceil(quota / period))
    return max(most, 1)


def _machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * _KIB
    raise OSError(f"{root / 'proc/meminfo'} has no MemAvailable")


def _groups(root: Path, controller: str) -> list[tuple[Path, int]]:
    """Folders of this process's control groups up to the mount, each with its version."""
    found: list[tuple[Path, int]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:  # A kernel without control groups.
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            # The mount is named by all its controllers, usually with a link for each one.
            mounts = [root / "sys/fs/cgroup" / name for name in (controller, controllers)]
            mount, version = next((m for m in mounts if m.is_dir()), mounts[0]), 1
        else:
            continue
        # In a container the path may be that of the host, which is absent; only the mount exists.
        own = mount / path.lstrip("/")
        chain = [own, *own.parents]
        found += [(folder, version) for folder in chain[: chain.index(mount) + 1]]
    return found


def _number(path: Path) -> int | None:
    """The number in a file; None if the file is absent or sets no limit (`max`, -1)."""
    return _two_numbers(path)[0]


def _two_numbers(path: Path) -> tuple[int | None, int | None]:
    """The first two numbers of a file such as `max 100000`; None for what is not a number."""
    try:
        words = path.read_text().split()
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    first, second, *_ = [int(w) if w.isdecimal() else None for w in words] + [None, None]
    return first, second


def _file_pages(folder: Path) -> int:
    """Bytes of a group's memory that are cached file pages."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except FileNotFoundError:
        return 0
    values = dict(line.split() for line in lines)
    prefix = "total_" if "total_active_file" in values else ""
    return sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
