"""Which code runs: a digest of its sources and of the versions of its libraries; its commit."""

import hashlib
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = ["code_digest", "commit"]

_LIBRARIES = (
    *("torch", "deepspeed", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numpy"),
    *("opencv-python-headless", "simplejpeg"),
)


def code_digest() -> str:
    """Digest of the modules of strata that this process has loaded.

    Returns:
        16 hexadecimal digits; the same on two machines whose sources and libraries are the same.
    """
    digest = hashlib.sha256(sys.version.encode())
    for name in sorted(sys.modules):
        file = getattr(sys.modules[name], "__file__", None)
        if file and (name == "strata" or name.startswith("strata.")):
            digest.update(name.encode())
            digest.update(Path(file).read_bytes())
    installed = {d.metadata["Name"]: d.version for d in map(_distribution, _LIBRARIES) if d}
    digest.update(repr(sorted(installed.items())).encode())
    return digest.hexdigest()[:16]


@cache
def commit() -> str:
    """The code's commit, where it runs from a checkout."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "not in a checkout"


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
