"""Parse a typed configuration tree from YAML files and dotted overrides; dump it again."""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from strata import commands
from strata.errors import ConfigError
from strata.files import write_atomic
from strata.recipes import find_recipe
from strata.suggestions import did_you_mean

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

    `root` may have class variables: `SHOWN`, the dotted names that `--help` explains, where
    `--help_all` explains all; `RENAMED`, earlier names that are still accepted, with today's;
    `RECIPES`, the folder of `configs/` that `--config NAME` prefers.

    Later arguments take precedence. `--dry-run` is read as `--dry_run`, a boolean setting without
    a value as true, and a list may be written as words (`--seeds 0 1`) or as YAML
    (`--seeds "[0, 1]"`). `--config` also takes the name of a recipe (`strata/recipes.py`). The
    launcher's `--local_rank` is accepted and ignored: ranks come from the environment.

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
        ConfigError: A key is unknown, a value does not fit its type or range, or a file is missing
            or is no YAML.
    """
    prog = commands.shown_program(prog)
    # No abbreviations: a key that is almost right is a mistake.
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A YAML file, or the name of a recipe (`strata configs`); may be given repeatedly.",
    )
    parser.add_class_arguments(root, fail_untyped=True, sub_configs=False)
    parser.set_defaults(dict(defaults or {}))
    argv = [a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))]
    if {"-h", "--help", "--help_all", "--help-all"} & set(argv):
        in_full = {"--help_all", "--help-all"} & set(argv)
        _print_help(parser, () if in_full else getattr(root, "SHOWN", ()))
    try:
        known = _Known.of(root, getattr(root, "RENAMED", {}))
        args = _spelled_out(_with_name(argv, positional) if positional else argv, known)
        args, files = _with_files(args, known, getattr(root, "RECIPES", ""))
    except ConfigError as error:
        raise ConfigError(f"{prog}: {error}. See {prog} --help for the settings.") from error
    try:
        namespace = parser.parse_args(args)
        built = parser.instantiate(namespace)
        fields = {f.name: built[f.name] for f in dataclasses.fields(root)}  # pyright: ignore[reportArgumentType]
        return root(**fields)
    except ConfigError as error:
        raise ConfigError(f"{prog}: {error}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        reason = _in_our_words(" ".join(str(error).split()).rstrip("."))
        where = f" (with --config {' '.join(files)})" if files else ""
        raise ConfigError(
            f"{prog}: {reason}{where}. See {prog} --help for the settings."
        ) from error


def _in_our_words(reason: str) -> str:
    """A reason of jsonargparse, with a value that is no choice in the form of our own errors."""
    choice = r'Parser key "([\w.]+)": Expected a typing\.Literal\[(.+)\]\. Got value: (.*)'
    found = re.fullmatch(choice, reason)
    if found is None:
        return reason
    name, choices, value = found.groups()
    words = [choice.strip(" '") for choice in choices.split(",")]
    return f"{name} is {value}; use {', '.join(words)}{did_you_mean(value, words)}"


def _print_help(parser: jsonargparse.ArgumentParser, shown: Sequence[str]) -> NoReturn:
    """Print the help of all settings, or of those in `shown`, and end the program."""
    settings = [a for a in parser._actions if a.dest not in ("help", "config", "print_completion")]
    if shown:
        for action in settings:
            if action.dest not in shown:
                action.help = argparse.SUPPRESS
        count = sum(type(action).__name__ == "ActionTypeHint" for action in settings)
        parser.epilog = f"{parser.prog} --help_all explains all {count} settings."
    parser.print_help()
    sys.exit(0)


@dataclasses.dataclass(frozen=True)
class _Known:
    """The settings of a dataclass tree."""

    types: Mapping[str, Any]
    """Of each setting, by its dotted name."""
    groups: frozenset[str]
    """Dotted names of the dataclasses that hold settings."""
    renamed: Mapping[str, str]

    @classmethod
    def of(cls, root: type, renamed: Mapping[str, str]) -> "_Known":
        types = _types(root)
        parts = (name.split(".") for name in types)
        groups = {".".join(p[:k]) for p in parts for k in range(1, len(p))}
        return cls(types, frozenset(groups), renamed)

    def name_of(self, name: str) -> str:
        """Today's name of a setting.

        Raises:
            ConfigError: There is none.
        """
        name = self.renamed.get(name, name)
        parts = name.removesuffix("+").split(".")
        # A setting that is a dictionary takes names of its own below it.
        if name in self.groups or any(
            ".".join(parts[:k]) in self.types for k in range(1, len(parts) + 1)
        ):
            return name
        raise ConfigError(f"there is no setting {name}{did_you_mean(name, self.types)}")

    def checked(self, content: Mapping[Any, Any]) -> dict[str, Any]:
        """A tree of settings, each with today's name at today's place.

        Raises:
            ConfigError: A key is not a setting, or a setting is given twice.
        """
        found: dict[str, Any] = {}
        self._add(content, "", found)
        return found

    def _add(self, content: Mapping[Any, Any], prefix: str, found: dict[str, Any]) -> None:
        for key, value in content.items():
            name = self.name_of(f"{prefix}{key}")
            if name in self.groups and isinstance(value, Mapping):
                self._add(value, f"{name}.", found)
                continue
            *groups, last = name.split(".")
            place: Any = found
            for group in groups:
                place = place.setdefault(group, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict) or last in place:
                raise ConfigError(f"{name} is given twice, maybe once by an earlier name")
            place[last] = self._off_or_on(name, value)

    def _off_or_on(self, name: str, value: Any) -> Any:
        """The word of a choice that YAML 1.1 reads as a boolean."""
        word = "on" if value is True else "off" if value is False else None
        return word if word in get_args(self.types.get(name)) else value


def _with_files(argv: Sequence[str], known: _Known, recipes: str) -> tuple[list[str], list[str]]:
    """Arguments with the files that `--config` names, checked; and these files.

    Raises:
        ConfigError: A file is missing, is no YAML, or has an unknown key.
    """
    words, files, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name != "--config" or not (equals or rest):
            words.append(word)
            continue
        path = find_recipe(value if equals else rest.pop(0), recipes)
        content = _read_settings(path)
        try:
            today = known.checked(content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        words.append(f"--config={path if today == content else yaml.safe_dump(today)}")
        files.append(str(path))
    return words, files


def _read_settings(path: Path) -> dict[Any, Any]:
    """The content of a settings file.

    Raises:
        ConfigError: It cannot be read, is no YAML, or is something else than settings.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not settings as `name: value`")
    return content


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


def _spelled_out(argv: Sequence[str], known: _Known) -> list[str]:
    """Translate the shorter spellings that `parse_config` accepts to those of jsonargparse.

    Raises:
        ConfigError: An option is unknown.
    """
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if name not in ("config", "print_completion", "print_config"):
            name = known.name_of(name)
        kind = known.types.get(name)
        values = [value] if equals else list(takewhile(lambda w: not w.startswith("--"), rest))
        if kind is bool and not values:
            words.append(f"--{name}=true")
        elif get_origin(kind) is tuple and values and not values[0].startswith("["):
            # Items of a list of strings are quoted: they may contain a comma or look like a number.
            quoted = get_args(kind)[0] not in (int, float)
            items = ", ".join(json.dumps(v) if quoted else v for v in values)
            words.append(f"--{name}=[{items}]")
            rest = rest if equals else rest[len(values) :]
        else:
            words.append(f"--{name}{equals}{value}")
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
