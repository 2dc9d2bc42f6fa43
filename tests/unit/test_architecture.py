"""The direction of imports, the one import name, and names that would shadow others."""

import ast
import functools
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("preprocess", "dataload", "train", "eval", "tools")
MAY_IMPORT = {
    "strata": set(),
    "preprocess": {"strata"},
    "dataload": {"strata"},
    "train": {"strata", "dataload"},
    "eval": {"strata", "dataload", "train"},
    "tools": {"strata", "preprocess", "dataload", "train", "eval"},
    "api": {"strata", "dataload", "train", "eval"},
}
RUN_BY_PATH = ("train", "eval", "tools")


def sources() -> list[Path]:
    return [p for folder in ("strata", *STAGES) for p in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def imported(path: Path) -> frozenset[str]:
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == ROOT / "strata" / "__init__.py":
        # For type checkers; at run time the names are found when they are used.
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def room_of(module: str) -> str | None:
    """The folder that a module of ours lives in; the public functions are a room of their own."""
    parts = module.split(".")
    if parts[0] != "strata":
        return None
    if parts[:2] == ["strata", "api"]:
        return "api"
    return parts[1] if len(parts) > 1 and parts[1] in STAGES else "strata"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    room = "api" if path == ROOT / "strata" / "api.py" else path.relative_to(ROOT).parts[0]
    for module in imported(path):
        other = room_of(module)
        if other is not None:
            assert other in MAY_IMPORT[room] | {room}, f"{path} imports {module}"
        assert module not in ("strata.train.main", "strata.eval.main"), f"{path} imports {module}"
        assert module.split(".")[0] not in STAGES, f"{path}: write strata.{module}"


def test_no_file_imports_itself_through_others():
    modules = {}
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "strata" else ("strata", *parts))
        modules[name.removesuffix(".__init__")] = path
    graph = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a cycle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("torch.distributed", {"strata/distributed.py"}),
        ("nvidia.dali", {"dataload/pipeline.py"}),
        ("deepspeed", {"train/engine.py"}),
        (
            "prometheus_client",
            {
                "strata/telemetry/metrics.py",
                "strata/telemetry/gpu.py",
                "strata/telemetry/host.py",
                "strata/telemetry/readings.py",
                "strata/telemetry/scrape.py",
            },
        ),
    ],
)
def test_heavy_packages_have_one_owner(package: str, owners: set[str]):
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if path.relative_to(ROOT).parts[:2] != ("tools", "benchmarks")
        for module in imported(path)
        if module == package or module.startswith(f"{package}.")
    }
    assert users == owners


LAUNCHER = re.compile(r"(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|LOCAL_SIZE|SLURM_[A-Z_]+|MASTER_[A-Z]+")


def test_the_launchers_environment_has_one_reader():
    """A variable's name as a string of its own is what reading or setting it takes."""
    readers = {
        str(path.relative_to(ROOT))
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and LAUNCHER.fullmatch(str(node.value))
    }
    assert readers == {"strata/launch.py"}


def test_packages_are_the_folders_and_the_recipes():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {}
    for top in ("strata", *STAGES):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            folders[".".join(parts if top == "strata" else ("strata", *parts))] = "/".join(parts)
    folders["strata.configs"] = "configs"
    recipes = {f"strata.configs.{path.parent.name}" for path in ROOT.glob("configs/*/*.yaml")}
    assert set(settings["packages"]) == set(folders) | recipes
    assert settings["package-dir"] == folders


def test_no_file_in_a_run_by_path_folder_shadows_a_module():
    taken = set(sys.stdlib_module_names)
    taken |= set(importlib.metadata.packages_distributions())
    for folder in RUN_BY_PATH:
        for path in (ROOT / folder).iterdir():
            ours = path.suffix == ".py" or (path / "__init__.py").exists()
            if ours and path.stem not in ("__init__", "main"):
                assert path.stem not in taken, f"{path} shadows the module {path.stem}"


def test_imports_work_from_any_folder(tmp_path: Path):
    command = [sys.executable, "-c", "import strata.train.run.history as b; print(b.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("train/run/history.py")


DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def test_the_tree_in_the_design_names_every_file():
    tree = DESIGN.partition("## The tree\n\n```\n")[2].partition("\n```")[0]
    named, folders = set(), []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            named.add("".join(folders))
    packaged = {*(ROOT / "strata").rglob("*.toml"), *(ROOT / "eval").rglob("*.j2"), *sources()}
    files = {str(p.relative_to(ROOT)) for p in packaged if p.name != "__init__.py"}
    assert named == files


def definitions(path: Path) -> set[str]:
    """Names of a file's functions and classes, and `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_the_journeys_in_the_design_pass_functions_that_exist():
    journeys = DESIGN.partition("## Three journeys\n")[2].partition("\n## ")[0]
    stops = [line.split("`") for line in journeys.replace("\n   ", " ").splitlines()]
    stops = [parts[1::2] for parts in stops if parts[0][:1].isdigit()]
    assert len(stops) > 30
    for names in stops:
        path = None
        for name in names:
            if name.endswith(".py"):
                path = ROOT / name
            elif Path(name).suffix not in (".json", ".html"):
                assert path is not None, f"{name} stands before its file"
                assert name in definitions(path), f"{path} has no {name}"


@pytest.mark.parametrize(
    "journey", ["From tar to loss", "From video to shard", "From checkpoint to report"]
)
def test_a_journey_does_not_return_to_a_file(journey: str):
    text = DESIGN.partition(f"### {journey}\n")[2].partition("\n#")[0].strip()
    entered = Counter()
    for step in text.replace("\n   ", " ").splitlines():
        entered.update({name for name in step.split("`")[1::2] if name.endswith(".py")})
    assert len(entered) > 9
    assert {name: count for name, count in entered.items() if count > 1} == {}
