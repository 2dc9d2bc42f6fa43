"""Run a benchmark: `python tools/bench.py SUBJECT --help`."""

import importlib
import sys
from collections.abc import Sequence

from strata.errors import ConfigError, exit_with_one_line

SUBJECTS = (
    "data",
    "device",
    "monitor",
    "preprocess",
    "published",
    "ranks",
    "shuffle",
    "soak",
    "temporal",
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
    subject = OLD_NAMES.get(argv[0], argv[0]) if argv else "nothing"
    if subject not in SUBJECTS:
        raise ConfigError(f"tools/bench.py measures {', '.join(SUBJECTS)}; got {subject}")
    importlib.import_module(f"strata.tools.benchmarks.{subject}").main(argv[1:])


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
