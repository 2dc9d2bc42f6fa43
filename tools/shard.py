"""Turn videos into shards: `python tools/shard.py --help`."""

import sys

from strata.errors import exit_with_one_line
from strata.preprocess.command import main

if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
