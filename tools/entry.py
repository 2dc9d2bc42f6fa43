"""The program `strata`: every command by its name, from any folder.

strata shard folder --videos DIR --out shards/mine
"""

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence

import strata
from strata import commands, launch
from strata.errors import ConfigError, exit_with_one_line
from strata.recipes import find_recipe, recipes, summary_of
from strata.suggestions import did_you_mean
from strata.tools.launchers import QUIET, program

__all__ = ["main"]

_LAUNCHED = {
    "pretrain": "pretrain an encoder on shards",
    "evaluate": "evaluate a checkpoint: retrieval, linear probe, finetuning, temporal cues",
}
"""Commands of one process for each GPU, and what they do."""
_PLAIN = {
    "shard": ("preprocess.command", "turn videos into shards"),
    "export": ("tools.export", "write a checkpoint's encoder for use elsewhere"),
    "verify": ("preprocess.audit_command", "check shard folders"),
    "inspect": ("tools.inspect_batch", "write a training batch as pictures"),
    "bench": ("tools.bench", "run a benchmark"),
    "ablate": ("tools.ablation", "pretrain and evaluate a grid of settings and seeds"),
    "demo": ("tools.demo_steps", "videos to an evaluated encoder, in minutes"),
    "make_videos": ("tools.make_videos", "generate a small data set of videos"),
}
"""Commands of one process: their module and what they do."""
_CONFIGS = "list the recipes, or print one: strata configs NAME"
_HELP = ("-h", "--help", "--help_all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names.

    Args:
        argv: Arguments without the program's name; by default the process's.

    Returns:
        The exit status.
    """
    os.environ[commands.STARTED_AS] = "strata"
    with exit_with_one_line():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    match argv:
        case [] | ["-h" | "--help" | "--help_all"]:
            print(_usage())
        case ["--version"]:
            print(strata.__version__)
        case ["configs", *names]:
            print(_shown_recipes(names))
        case [("pretrain" | "evaluate") as command, *rest]:
            return _launch(command, rest)
        case [command, *rest] if command in _PLAIN:
            module = importlib.import_module(f"strata.{_PLAIN[command][0]}")
            return module.main(rest) or 0
        case [other, *_]:
            known = [*_PLAIN, *_LAUNCHED, "configs"]
            raise ConfigError(
                f"strata: there is no command {other}{did_you_mean(other, known)}; "
                "strata --help lists them"
            )
    return 0


def _usage() -> str:
    about = {
        "shard": _PLAIN["shard"][1],
        **_LAUNCHED,
        **{name: text for name, (_, text) in _PLAIN.items()},
        "configs": _CONFIGS,
    }
    return "\n".join(
        [
            "usage: strata COMMAND ...",
            "",
            *(f"  {name:<13}{text}" for name, text in about.items()),
            "",
            "`strata COMMAND --help` explains the settings that matter, `--help_all` all of them.",
        ]
    )


def _shown_recipes(names: Sequence[str]) -> str:
    """The list of recipes, or the content of those that are named."""
    if names and names[0] not in _HELP:
        return "\n".join(find_recipe(name).read_text(encoding="utf-8") for name in names)
    lines = ["recipes for --config NAME; `strata configs NAME` prints one"]
    for name, path in recipes().items():
        lines.append(f"  {name:<36}{summary_of(path)}")
    return "\n".join(lines)


def _launch(command: str, argv: Sequence[str]) -> int:
    """Run a command of one process for each GPU.

    In a process that a launcher has started (`torchrun --no-python strata pretrain ...`, `srun
    strata pretrain ...`) it is one rank. Otherwise `--num_gpus N` starts N processes; without it
    there is one for each GPU, and on a machine with one GPU or none it is this process.
    """
    script = commands.script(command)
    count, words = _num_gpus(argv)
    is_rank = launch.is_launched() or launch.task_of_job(os.environ) is not None
    if count is None and not is_rank and not {*_HELP, "--help-all"} & set(argv):
        import torch

        found = torch.cuda.device_count()
        count = str(found) if found > 1 else None
    if count is None:
        sys.argv = [str(script), *words]
        runpy.run_path(str(script), run_name="__main__")
        return 0
    started = [*program(["deepspeed", "--num_gpus", count]), str(script), *words]
    return subprocess.run(started, env=os.environ | QUIET, check=False).returncode


def _num_gpus(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--num_gpus`, and the other arguments.

    Raises:
        ConfigError: It is not a positive number.
    """
    value, words, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, given = word.partition("=")
        if name != "--num_gpus":
            words.append(word)
            continue
        value = given if equals else (rest.pop(0) if rest else "")
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"strata: --num_gpus is {value or 'empty'}; use 1 or more")
    return value, words


if __name__ == "__main__":
    sys.exit(main())
