"""Measure one part of Strata: `python tools/bench.py preprocess --help`."""

import importlib
import sys
from collections.abc import Sequence

from strata.errors import ConfigError, exit_with_one_line

SUBJECTS = {
    "dataload": "strata.tools.benchmarks.data",
    "device": "strata.tools.benchmarks.device",
    "monitor": "strata.tools.benchmarks.monitor",
    "preprocess": "strata.tools.benchmarks.preprocess",
    "shuffle": "strata.tools.benchmarks.shuffle",
    "soak": "strata.tools.benchmarks.soak",
    "published": "strata.tools.benchmarks.published",
    "temporal": "strata.tools.benchmarks.temporal",
    "train": "strata.tools.benchmarks.train",
}
"""Each names a module with `main(argv)`, imported only when it is asked for."""


def main(argv: Sequence[str]) -> None:
    """Hand the arguments to the subject's own command.

    Raises:
        ConfigError: There is no such subject.
    """
    if not argv or argv[0] not in SUBJECTS:
        given = repr(argv[0]) if argv else "nothing"
        raise ConfigError(f"tools/bench.py measures {', '.join(SUBJECTS)}; asked for {given}")
    importlib.import_module(SUBJECTS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
