"""Look at a training batch: `python tools/inspect_batch.py --data.shards DIR --out DIR`."""

import sys
from collections.abc import Sequence

from strata.config import parse_config
from strata.errors import exit_with_one_line
from strata.tools.batch_pictures import InspectConfig, write_batch


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    described = InspectConfig.__doc__ or ""
    config = parse_config(InspectConfig, argv, prog="tools/inspect_batch.py", description=described)
    written, samples = write_batch(config)
    print(f"{written} samples of {samples} -> {config.out}", flush=True)


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
