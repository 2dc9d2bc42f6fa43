"""What the servers import once from which the tests fork their processes."""

import gc

import deepspeed  # noqa: F401
import pytest  # noqa: F401

import strata.eval.main
import strata.train.main  # noqa: F401

# Collections in the forks need not look at what was imported, nor copy its memory.
gc.collect()
gc.freeze()
