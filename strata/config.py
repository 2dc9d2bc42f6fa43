"""Parse a typed configuration tree from YAML files and dotted overrides; dump it again."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from strata.errors import ConfigError
from strata.files import write_atomic

__all__ = ["dotted", "dump_config", "parse_config", "plain"]

ConfigT = TypeVar("ConfigT")

jsonargparse.set_parsing_settings(
    docstring_parse_attribute_docstrings=True, add_print_completion_argument=True
)


def parse_config(
    root: type[ConfigT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Build `root`, a frozen dataclass tree, from `--config FILE.yaml` and `--a.b value` overrides.

    Later arguments take precedence. `--dry-run` is read as `--dry_run`, a boolean setting without
    a value as true, and a list may be written as words (`--seeds 0 1`) or as YAML
    (`--seeds "[0, 1]"`). The launcher's `--local_rank` is accepted and ignored: ranks come from the
    environment.

    Args:
        root: The dataclass to build; field docstrings become `--help`.
        argv: Arguments without the program's name.
        prog: Name shown in help and errors.
        positional: The setting that gets the words that belong to no option. The command has
            neither true-or-false settings nor another list.
        description: First line of the help.
        defaults: Values by dotted name that replace the fields' own defaults.

    Returns:
        A validated instance of `root`.

    Raises:
        ConfigError: A key is unknown, a value does not fit its type or range, or a file is missing.
    """
    # No abbreviations: a key that is almost right is a mistake.
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="A YAML file; may be given repeatedly.")
    parser.add_class_arguments(root, fail_untyped=True, sub_configs=False)
    parser.set_defaults(dict(defaults or {}))
    argv = [a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))]
    args = _spelled_out(_with_name(argv, positional) if positional else argv, root)
    try:
        namespace = parser.parse_args(args)
        built = parser.instantiate(namespace)
        fields = {f.name: built[f.name] for f in dataclasses.fields(root)}  # pyright: ignore[reportArgumentType]
        return root(**fields)
    except ConfigError as error:
        raise ConfigError(f"{prog}: {error}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        words = [part for a in args for part in (a.split("=", 1) if a[:2] == "--" else [a])]
        files = [value for name, value in pairwise(words) if name == "--config"]
        where = f" (with --config {' '.join(files)})" if files else ""
        raise ConfigError(
            f"{prog}: {reason}{where}. See {prog} --help for the settings."
        ) from error


def _with_name(argv: Sequence[str], name: str) -> list[str]:
    """Arguments in which the words that belong to no option are the values of `--name`."""
    words, named, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            named += [value] if equals else []
        elif not word.startswith("--"):
            named.append(word)
        else:
            takes_next = rest and not equals and not rest[0].startswith("--")
            words += [word, rest.pop(0)] if takes_next else [word]
    return [*words, f"--{name}", *named] if named else words


def _types(root: Any, prefix: str = "") -> dict[str, Any]:
    """The type of each setting of a dataclass tree by its dotted name."""
    hints, types = get_type_hints(root), {}
    for field in dataclasses.fields(root):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        types |= _types(kind, f"{name}.") if dataclasses.is_dataclass(kind) else {name: kind}
    return types


def _spelled_out(argv: Sequence[str], root: type) -> list[str]:
    """Translate the shorter spellings that `parse_config` accepts to those of jsonargparse."""
    types, words, rest = _types(root), [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("-", "_")
        kind = types.get(name[2:])
        values = [value] if equals else list(takewhile(lambda w: not w.startswith("--"), rest))
        if kind is bool and not values:
            words.append(f"{name}=true")
        elif get_origin(kind) is tuple and values and not values[0].startswith("["):
            # Items of a list of strings are quoted: they may contain a comma or look like a number.
            quoted = get_args(kind)[0] not in (int, float)
            items = ", ".join(json.dumps(v) if quoted else v for v in values)
            words.append(f"{name}=[{items}]")
            rest = rest if equals else rest[len(values) :]
        else:
            words.append(f"{name}{equals}{value}")
    return words


def plain(value: Any) -> Any:
    """Convert `value` (a dataclass tree, paths, tuples) to types that YAML and JSON have."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a plain tree to its leaves by dotted name, as on the command line."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def dump_config(config: Any, path: Path) -> None:
    """Write the resolved tree as YAML; the file is itself accepted by `--config`."""
    write_atomic(path, yaml.safe_dump(plain(config), sort_keys=False))
