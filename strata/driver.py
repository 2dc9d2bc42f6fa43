"""The GPU's driver, compared with the CUDA that this installation is built for."""

from functools import cache

import pynvml

from strata.errors import ConfigError

__all__ = ["OLDEST_DRIVER", "check_driver", "driver_version"]

OLDEST_DRIVER = {12: 525, 13: 580}
"""The lowest driver for each major version of CUDA: NVIDIA's release notes of the CUDA Toolkit,
minimum versions for minor version compatibility."""


@cache
def driver_version() -> str | None:
    """The version of the driver, like `535.183.01`; None on a machine without an NVIDIA GPU."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if not pynvml.nvmlDeviceGetCount():
            return None
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def check_driver(cuda: str | None) -> None:
    """Refuse a driver that is older than this installation needs.

    Args:
        cuda: The CUDA that torch is built for, `torch.version.cuda`; None for its CPU build.

    Raises:
        ConfigError: The driver is too old.
    """
    version = driver_version()
    if version is None or cuda is None:
        return
    built = int(cuda.partition(".")[0])
    needed = OLDEST_DRIVER.get(built, max(OLDEST_DRIVER.values()))
    installed = int(version.partition(".")[0])
    if installed >= needed:
        return
    fitting = [f"strata-video[cuda{k}]" for k, v in OLDEST_DRIVER.items() if v <= installed]
    other = f"install {fitting[-1]} (docs/usage.md, Installation)" if fitting else "use a CPU"
    raise ConfigError(
        f"this machine's NVIDIA driver is {version}, and torch is built for CUDA {cuda}, which "
        f"needs driver {needed} or later; update the driver, or {other}, or use --engine.device cpu"
    )
