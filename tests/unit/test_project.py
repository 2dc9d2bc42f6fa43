"""Files about the project agree: one version, local hooks, a workflow that runs .ci/run."""

import tomllib
from pathlib import Path

import yaml

import strata

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_there_is_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert SETTINGS["project"]["version"] == strata.__version__ == citation["version"]
    assert SETTINGS["project"]["license"] == citation["license"]


def test_hooks_are_pinned_development_packages():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [source["repo"] for source in hooks] == ["local"]
    names = {hook["id"].partition("-")[0] for hook in hooks[0]["hooks"]}
    pinned = {
        requirement.partition("==")[0]
        for requirement in SETTINGS["project"]["optional-dependencies"]["dev"]
        if "==" in requirement
    }
    assert names == {"ruff", "codespell", "pyright"}
    assert names | {"pre-commit"} <= pinned


def test_the_workflow_runs_what_every_change_must_pass():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    versions = job["strategy"]["matrix"]["python"]
    classifiers = SETTINGS["project"]["classifiers"]
    for version in versions:
        assert f"Programming Language :: Python :: {version}" in classifiers
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir():
        assert yaml.safe_load(form.read_text())["body"]
