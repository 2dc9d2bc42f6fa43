"""Run a benchmark: `python tools/bench.py SUBJECT --help`."""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from strata import commands
from strata.errors import ConfigError, exit_with_one_line
from strata.suggestions import did_you_mean

SUBJECTS = (
    "data",
    "device",
    "preprocess",
    "published",
    "soak",
    "train",
)
"""Files of tools/benchmarks, each with `main(argv)`, imported only when it is asked for."""
OLD_NAMES = {"dataload": "data"}
"""Earlier names of subjects, which are still accepted."""


def main(argv: Sequence[str]) -> None:
    """Run the benchmark that the first argument names.

    Raises:
        ConfigError: There is no such subject.
    """
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "--help_all"):
        print(_usage())
        return
    subject = OLD_NAMES.get(name, name)
    if subject not in SUBJECTS:
        raise ConfigError(
            f"{commands.shown_program('tools/bench.py')} measures {', '.join(SUBJECTS)}; got "
            f"{subject}{did_you_mean(subject, SUBJECTS)}"
        )
    importlib.import_module(f"strata.tools.benchmarks.{subject}").main(argv[1:])


def _usage() -> str:
    """The help of the command without a subject."""
    program = commands.shown_program("tools/bench.py")
    lines = [f"usage: {program} SUBJECT ...", "", "Run a benchmark. Subjects:"]
    for subject in SUBJECTS:
        # Not imported: that would take seconds.
        source = Path(__file__).parent / "benchmarks" / f"{subject}.py"
        about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {subject:<12}{about.splitlines()[0]}")
    return "\n".join([*lines, "", f"`{program} SUBJECT --help` explains the options of one."])


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
