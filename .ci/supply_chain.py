"""Dependencies: known vulnerabilities, licences, and the lowest allowed versions.

python .ci/supply_chain.py audit      fails on a vulnerability that a newer version fixes
python .ci/supply_chain.py licences   lists them, fails on one that is not allowed
python .ci/supply_chain.py lowest     runs tests on the lowest versions of the direct dependencies
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

IGNORED: dict[str, str] = {}
"""Vulnerabilities that do not concern Strata, by their identifier, each with the reason."""

ALLOWED = re.compile(
    r"\b(apache|mit|bsd|0bsd|isc|psf|python software|zlib|unlicense|public domain|mpl|mozilla)\b",
    re.IGNORECASE,
)
"""Permissive licences, and the MPL, which concerns only changes of its own files."""
EXCEPTIONS = {
    "cuda-": "NVIDIA's licence: CUDA for Python, part of PyTorch's build for GPUs",
    "nvidia-": "NVIDIA's licence: CUDA's libraries and DALI, used as they are, not distributed",
    "nvtx": "NVIDIA's licence: part of PyTorch's build for GPUs",
}
"""Packages, by the beginning of their name, whose licence is another or not stated."""

BOUND = ("torch", "torchvision", "nvidia-dali-cuda130", "deepspeed")
"""Not tested at their lowest versions: 3 GB each time, and only together do they fit."""
LOWEST_TESTS = (
    *(
        "tests/unit/test_config.py",
        "tests/unit/telemetry/test_metrics.py",
        "tests/unit/test_files.py",
    ),
    *("tests/unit/test_untrusted.py", "tests/unit/telemetry/test_tensorboard.py"),
    *("tests/unit/dataload/test_reader.py", "tests/unit/dataload/test_storage.py"),
    *("tests/unit/preprocess/test_encode_mp4.py", "tests/unit/preprocess/test_part.py"),
    *("tests/security/test_checkpoint_files.py", "tests/security/test_network.py"),
)


def findings(report: Mapping[str, Any]) -> tuple[list[str], list[str], int]:
    """The vulnerabilities in pip-audit's JSON.

    Returns:
        Vulnerabilities that a newer version fixes, those without a fix or ignored, and the number
        of packages that the service did not know.
    """
    fixable, other, unknown = [], [], 0
    for package in report["dependencies"]:
        unknown += "skip_reason" in package
        for found in package.get("vulns", ()):
            names = {found["id"], *found.get("aliases", ())}
            text = f"{package['name']} {package['version']}: {found['id']}"
            reason = next((IGNORED[name] for name in sorted(names) if name in IGNORED), None)
            if reason is not None:
                other.append(f"{text} (ignored: {reason})")
            elif found["fix_versions"]:
                fixable.append(f"{text}, fixed in {', '.join(found['fix_versions'])}")
            else:
                other.append(f"{text} (no version fixes it)")
    return fixable, other, unknown


def audit() -> int:
    """Ask pip-audit about every installed package."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        print("audit: the service of known vulnerabilities did not answer; nothing was audited")
        return 0
    fixable, other, unknown = findings(report)
    for line in (*fixable, *other):
        print(f"audit: {line}")
    total = len(report["dependencies"])
    if unknown:
        print(f"audit: {unknown} of {total} packages are not known to the service here: unaudited")
    if fixable:
        print("audit: raise the versions in pyproject.toml, or add a reason to IGNORED")
    else:
        print(f"audit: no fixable vulnerability in the {total - unknown} packages audited")
    return int(bool(fixable))


def needed(name: str, extras: Iterable[str] = ()) -> set[str]:
    """A distribution and all that it needs, as installed, by canonical name."""
    found: set[str] = set()
    waiting = [(name, frozenset(extras))]
    seen = set(waiting)
    while waiting:
        current, wanted = waiting.pop()
        try:
            requires = importlib.metadata.requires(current) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(canonicalize_name(current))
        for text in requires:
            requirement = Requirement(text)
            marker = requirement.marker
            environments = [{"extra": extra} for extra in (wanted or {""})]
            if marker is None or any(marker.evaluate(each) for each in environments):
                following = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return found


def licence_of(metadata: Any) -> str:
    """The licence that a distribution states, in one line."""
    stated = metadata.get("License-Expression")
    classes = [
        c.rpartition(" :: ")[2]
        for c in metadata.get_all("Classifier") or ()
        if c.startswith("License ::")
    ]
    text = stated or ", ".join(classes) or metadata.get("License") or "not stated"
    return text.strip().splitlines()[0][:60]


def licences() -> int:
    """List the licences of all that Strata needs."""
    by_licence: dict[str, list[str]] = defaultdict(list)
    refused = []
    for name in sorted(needed("strata-video", ("cuda13",)) - {"strata-video"}):
        licence = licence_of(importlib.metadata.metadata(name))
        by_licence[licence].append(name)
        if not ALLOWED.search(licence) and not name.startswith(tuple(EXCEPTIONS)):
            refused.append(f"{name}: {licence}")
    for licence, names in sorted(by_licence.items()):
        print(f"licence {licence}: {', '.join(names)}")
    for line in refused:
        print(f"licences: {line} is not allowed; replace the package, or add it to EXCEPTIONS")
    return int(bool(refused))


def lowest() -> int:
    """Run some tests with the lowest version of each direct dependency that is allowed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = [
        text
        for text in (*project["dependencies"], *project["optional-dependencies"]["tensorboard"])
        if canonicalize_name(Requirement(text).name) not in BOUND
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--target", folder, "--no-deps", "--resolution", "lowest-direct"]
        command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
        installed = subprocess.run(
            [*command, *options, *tested], capture_output=True, text=True, timeout=300, check=False
        )
        if installed.returncode:
            line = (installed.stderr.strip().splitlines() or ["no output"])[-1]
            print(f"lowest: the lowest versions could not be installed, nothing was tested: {line}")
            return 0
        versions = sorted(
            f"{d.metadata['Name']} {d.version}"
            for d in importlib.metadata.distributions(path=[folder])
        )
        print(f"lowest: {', '.join(versions)}; at their usual versions: {', '.join(BOUND)}")
        environment = os.environ | {"PYTHONPATH": folder}
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *LOWEST_TESTS]
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, check=False
        ).returncode


if __name__ == "__main__":
    commands = {"audit": audit, "licences": licences, "lowest": lowest}
    names = sys.argv[1:] or list(commands)
    if not set(names) <= commands.keys():
        sys.exit(f"usage: supply_chain.py [{' | '.join(commands)}] ...")
    sys.exit(max([commands[name]() for name in names]))
