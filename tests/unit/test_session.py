"""The end of a test run names what it did not prove; marks follow folders and fixtures."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.support.session import LONGEST, longest_first, marks, not_proven

ROOT = Path(__file__).resolve().parent.parent.parent


def skip(nodeid: str, reason: str) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, longrepr=("file.py", 3, f"Skipped: {reason}"))


def test_skips_are_grouped_by_reason_and_folder():
    reports = [
        skip("tests/gpu/test_a.py::one", "this machine has no GPU"),
        skip("tests/gpu/test_b.py::two[x]", "this machine has no GPU"),
        skip("tests/unit/test_c.py::three", "no openssl"),
        skip("tests/unit/test_d.py", "the optional package tensorboard is not installed"),
    ]
    assert not_proven(reports, 4) == [
        "1 test in tests/unit did not run: no openssl",
        "all tests in tests/unit/test_d.py did not run: "
        "the optional package tensorboard is not installed",
        "2 tests in tests/gpu did not run: this machine has no GPU",
        "4 tests did not run: excluded by the options -k or -m",
    ]


def test_a_run_without_skips_says_so():
    assert not_proven([], 0) == ["nothing: every test ran"]


def test_marks_follow_folders_and_fixtures():
    assert marks("gpu", []) == ["gpu"]
    assert marks("distributed", ["shards"]) == ["distributed"]
    assert marks("integration", ["tmp_path", "real_data"]) == ["slow", "real_data"]
    assert marks("unit", ["rng"]) == []


def test_the_longest_files_come_first_and_exist():
    assert [f for f in LONGEST if not (ROOT / "tests" / f).is_file()] == []
    assert longest_first(LONGEST[1]) < longest_first(LONGEST[2]) < longest_first("unit/test_a.py")


def test_marks_are_set_before_tests_are_selected():
    files = ["tests/gpu/test_hardware.py", "tests/unit/test_session.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {"tests/gpu/test_hardware.py"}, done.stdout + done.stderr
