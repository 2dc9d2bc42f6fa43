"""The rules of .ci/supply_chain.py: which findings fail, which licences are allowed."""

import importlib.util
import re
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def chain() -> Any:
    spec = importlib.util.spec_from_file_location("supply_chain", ROOT / ".ci/supply_chain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_vulnerability_fails_where_a_version_fixes_it(
    chain: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chain, "IGNORED", {"CVE-3": "the part is not used"})
    report = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": []},
            {
                "name": "b",
                "version": "1",
                "vulns": [
                    {"id": "PYSEC-1", "aliases": [], "fix_versions": ["2"]},
                    {"id": "PYSEC-2", "aliases": [], "fix_versions": []},
                    {"id": "PYSEC-3", "aliases": ["CVE-3"], "fix_versions": ["2"]},
                ],
            },
            {"name": "c", "skip_reason": "not on PyPI"},
        ]
    }
    fixable, other, unknown = chain.findings(report)
    assert fixable == ["b 1: PYSEC-1, fixed in 2"]
    assert [line.split(": ")[1].split(" ")[0] for line in other] == ["PYSEC-2", "PYSEC-3"]
    assert unknown == 1


@pytest.mark.parametrize(
    ("stated", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("BSD License", True),
        ("GPL-3.0-or-later", False),
        ("AGPL-3.0", False),
        ("LIMITED LICENSE", False),
        ("not stated", False),
    ],
)
def test_licences(stated: str, allowed: bool, chain: Any):
    metadata = Message()
    if stated != "not stated":
        metadata["License-Expression"] = stated
    assert bool(chain.ALLOWED.search(chain.licence_of(metadata))) == allowed


def test_the_lowest_versions_are_tested_by_tests_that_exist(chain: Any):
    assert all((ROOT / path).is_file() for path in chain.LOWEST_TESTS)


def test_all_that_is_ignored_has_a_reason(chain: Any):
    assert all(len(reason) > 10 for reason in (*chain.IGNORED.values(), *chain.EXCEPTIONS.values()))


def test_the_threat_model_names_every_side():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8").lower()
    for word in ("videos", "shards", "manifests", "checkpoints", "weights", "peers", "scrapers"):
        assert re.search(rf"\b{word}\b", text), word


def test_the_tests_on_the_lowest_versions_exist(chain: Any):
    missing = [name for name in chain.LOWEST_TESTS if not (ROOT / name).is_file()]
    assert not missing
