"""The complete way on small data: videos, shards, pretraining, evaluation, a report.

python tools/demo.py                      generated videos
python tools/demo.py --videos DIR         your own, one subfolder for each class
"""

import sys

from strata.errors import exit_with_one_line
from strata.tools.demo_steps import main

if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
