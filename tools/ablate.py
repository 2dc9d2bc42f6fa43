"""Pretrain and evaluate a grid of settings and seeds, and write the table: mean and spread.

python tools/ablate.py --config configs/ablate/table3.yaml
"""

import sys

from strata.errors import exit_with_one_line
from strata.tools.ablation import main

if __name__ == "__main__":
    with exit_with_one_line():
        sys.exit(main(sys.argv[1:]))
