"""Files about the project agree: one version, local hooks, a workflow that runs .ci/run."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import strata

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
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


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 100]
    above = lines[: lines.index("## Read on")]
    assert sum(len(line.split()) for line in above) <= 900


def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.M)
    for target in targets:
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_documentation_exist(page: Path):
    if page.name == "log.md":
        pytest.skip("the log names files as they were called then")
    text = page.read_text(encoding="utf-8")
    folders = "strata|preprocess|dataload|train|eval|tools|tests|configs|monitoring|docs"
    for name in set(re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.[a-z]+\b", text)):
        assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name}: {name}"
