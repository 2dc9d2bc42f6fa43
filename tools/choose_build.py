"""Choose the builds of torch and DALI that fit this machine, before anything is installed.

`make setup` runs it with the system's Python; it prints the extra of strata-video to install and
the address of PyTorch's builds for it, or `-` for the default ones.
"""

import http.client
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable

OLDEST_DRIVER = {"cuda13": 580, "cuda12": 525}
"""As in strata/driver.py, which needs packages to be imported."""
BUILDS = {"cuda12": "cu126", "cpu": "cpu"}
"""PyTorch's folder for each extra; PyPI has the builds for CUDA 13."""
PLACE = "https://download.pytorch.org/whl/"


def driver() -> int | None:
    """The major version of the NVIDIA driver; None without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    found = re.match(r"(\d+)\.", answer.stdout)
    return int(found[1]) if answer.returncode == 0 and found else None


def choose(version: int | None) -> tuple[str, str]:
    """The extra for a driver, and why, in words."""
    if version is None:
        return "cpu", "no NVIDIA GPU"
    for extra, oldest in OLDEST_DRIVER.items():
        if version >= oldest:
            return extra, f"NVIDIA driver {version}"
    oldest = min(OLDEST_DRIVER.values())
    return "cpu", f"NVIDIA driver {version} is too old for CUDA 12, which needs {oldest} or later"


def answers(address: str) -> bool:
    """Whether PyTorch's index can be reached."""
    try:
        with urllib.request.urlopen(f"{address}/torch/", timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False


def main(
    version: Callable[[], int | None] = driver, reachable: Callable[[str], bool] = answers
) -> tuple[str, str]:
    """The extra and PyTorch's address, with the reason on stderr."""
    extra, reason = choose(version())
    address = PLACE + BUILDS[extra] if extra in BUILDS else "-"
    if address != "-" and not reachable(address):
        print(
            f"{reason}: {extra} would fit, but {address} cannot be reached; the default builds are "
            "for CUDA 13 and larger, and work without a GPU",
            file=sys.stderr,
        )
        return "cuda13", "-"
    print(f"{reason}: installing strata-video[{extra}]", file=sys.stderr)
    return extra, address


if __name__ == "__main__":
    print(*main())
