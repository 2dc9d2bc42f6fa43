"""A digest of the running code: the sources of this package and versions of its libraries."""

import hashlib
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["code_digest"]

_LIBRARIES = ("torch", "deepspeed", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numpy")


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


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
