"""How much memory a process may still take: what the machine has left, and its control group."""

from pathlib import Path

__all__ = ["available_memory"]

_KIB = 1024


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that can be taken without swapping or being killed, and what sets that limit.

    The least of the kernel's own estimate and of what each control group above this process, of
    version 1 or 2, still allows; file pages that the kernel would give back count as free.

    Args:
        root: Where /proc and /sys are.

    Returns:
        Bytes, and `the machine` or the control group's folder.
    """
    found = [(_machine(root), "the machine")]
    for folder, names in _groups(root):
        limit, used = (_number(folder / name) for name in names)
        if limit is not None and used is not None:
            kept = used - _file_pages(folder)
            found.append((max(limit - kept, 0), f"the control group {folder}"))
    return min(found)


def _machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * _KIB
    raise OSError(f"{root / 'proc/meminfo'} has no MemAvailable")


def _groups(root: Path) -> list[tuple[Path, tuple[str, str]]]:
    """The folders of this process's groups up to the mount, with the names of limit and usage."""
    found: list[tuple[Path, tuple[str, str]]] = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's, which is not there: then the mount alone is.
        own = mount / path.lstrip("/")
        chain = [own, *own.parents]
        found += [(folder, names) for folder in chain[: chain.index(mount) + 1]]
    return found


def _number(path: Path) -> int | None:
    """A file's number; None where it is not there or says `max`."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else None


def _file_pages(folder: Path) -> int:
    """Bytes of a group that are copies of files."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except FileNotFoundError:
        return 0
    values = dict(line.split() for line in lines)
    prefix = "total_" if "total_active_file" in values else ""
    return sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
