"""Turn videos into shards: `python tools/shard.py --help`."""

import sys

from strata.errors import exit_with_one_line

if __name__ == "__main__":
    # Not above: each worker process imports this file too, and needs neither the command nor torch.
    from strata.preprocess.command import main

    with exit_with_one_line():
        main(sys.argv[1:])
