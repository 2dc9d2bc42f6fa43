"""The recipes that come with Strata, found by name: the YAML files of `configs/`."""

from pathlib import Path

from strata.errors import ConfigError
from strata.suggestions import did_you_mean

__all__ = ["find_recipe", "recipes", "summary_of"]

_HERE = Path(__file__).resolve().parent
_FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
"""In an installed wheel a folder of the package, in a checkout the one beside it."""


def recipes() -> dict[str, Path]:
    """The recipes' files by name, for instance `pretrain/ucf101_r3d18`."""
    found = sorted(_FOLDER.glob("*/*.yaml"))
    return {f"{path.parent.name}/{path.stem}": path for path in found}


def find_recipe(word: str, kind: str = "") -> Path:
    """The file of `--config WORD`: a path, or the name of a recipe.

    A recipe is named by its file's name (`ucf101_r3d18`), with its folder where that is not enough
    (`shard/ucf101`), or by its path in the repository (`configs/pretrain/ucf101_r3d18.yaml`).

    Args:
        word: What the user wrote.
        kind: The folder that is meant where several have the name: `pretrain`, `ablate`, `shard`.

    Raises:
        ConfigError: There is no such file and no such recipe, or several.
    """
    if Path(word).is_file():
        return Path(word)
    if Path(word).is_dir():
        raise ConfigError(f"--config {word} is a folder; give a YAML file or a recipe's name")
    known = recipes()
    name = word.removeprefix("configs/").removesuffix(".yaml")
    matches = [k for k in known if name in (k, k.rpartition("/")[2])]
    matches = [k for k in matches if k.startswith(f"{kind}/")] or matches
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        raise ConfigError(f"--config {word} names several recipes; use {' or '.join(matches)}")
    names = [k if "/" in name else k.rpartition("/")[2] for k in known]
    raise ConfigError(
        f"--config {word}: no such file, and no recipe of that name (`strata configs` lists them)"
        f"{did_you_mean(name, names)}"
    )


def summary_of(recipe: Path) -> str:
    """A one-line summary of a recipe, from the comment at the beginning of its file."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#") or not line.strip("# "):
            break
        comment.append(line.lstrip("# "))
    text = " ".join(comment)
    end = text.find(". ")
    return (text if end < 0 else text[:end]).removesuffix(".")
