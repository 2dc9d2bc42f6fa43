"""The marks of tests, and sentences on what a test run did not prove."""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import Any

__all__ = ["LONGEST", "longest_first", "marks", "not_proven"]

_FOLDERS = {"gpu": "gpu", "distributed": "distributed", "integration": "slow"}
"""The mark of each folder's tests."""


def marks(folder: str, fixtures: Collection[str]) -> list[str]:
    """Names of a test's marks.

    Args:
        folder: Its folder in tests/.
        fixtures: Names of the fixtures that it uses, directly or not.
    """
    found = [_FOLDERS[folder]] if folder in _FOLDERS else []
    return [*found, "real_data"] if "real_data" in fixtures else found


LONGEST = (
    "integration/test_never_loses_work.py",
    "integration/test_ablation.py",
    "integration/test_launch.py",
    "integration/test_evaluation.py",
    "integration/test_demo.py",
    "integration/test_sharding.py",
    "integration/test_monitoring.py",
    "integration/test_alerts.py",
    "integration/test_sharding_many.py",
    "integration/test_probe.py",
    "integration/test_short_videos.py",
    "integration/test_ucf101.py",
    "unit/train/test_engine.py",
    "distributed/test_bottleneck_runs.py",
)
"""Files that take longest, measured."""


def longest_first(file: str) -> int:
    """Where a file comes in the order of a run, so that no worker is left alone with a long one.

    Args:
        file: Its path in tests/.
    """
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def _tests(count: int) -> str:
    return "1 test" if count == 1 else f"{count} tests"


def not_proven(skipped: Iterable[Any], num_deselected: int) -> list[str]:
    """The lines that end a test run.

    Args:
        skipped: Reports of skipped tests and, where a file was skipped, of its collection.
        num_deselected: Number of tests that the options -k and -m excluded.

    Returns:
        One line for each reason and folder, or one that says that nothing was left out.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for report in skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        file = PurePath(report.nodeid.partition("::")[0])
        # A file that was skipped when it was collected has an unknown number of tests.
        counts[reason, str(file.parent) if "::" in report.nodeid else str(file)] += 1
    lines = []
    for (reason, place), count in sorted(counts.items()):
        tests = "all tests" if place.endswith(".py") else _tests(count)
        lines.append(f"{tests} in {place} did not run: {reason}")
    if num_deselected:
        lines.append(f"{_tests(num_deselected)} did not run: excluded by the options -k or -m")
    return lines or ["nothing: every test ran"]
