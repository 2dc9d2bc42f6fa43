"""Evaluate a checkpoint: retrieval, linear probe, or both beside untrained networks.

deepspeed eval/main.py retrieval --checkpoint runs/a \
    --gallery shards/ucf101/train01 --query shards/ucf101/test01
deepspeed eval/main.py linear --checkpoint runs/a \
    --train shards/ucf101/train01 --test shards/ucf101/test01
deepspeed eval/main.py compare --checkpoint runs/a \
    --train shards/ucf101/train01 --test shards/ucf101/test01
"""

import sys
from collections.abc import Sequence

from strata.config import parse_config
from strata.errors import ConfigError, exit_with_one_line
from strata.eval.protocols import (
    CompareEvaluation,
    LinearEvaluation,
    RetrievalEvaluation,
    run_compare,
    run_linear,
    run_retrieval,
)
from strata.logs import set_up_logging


def main(argv: Sequence[str]) -> None:
    """Run one rank of an evaluation."""
    set_up_logging()
    args = [a for a in argv if not a.startswith("--local_rank")]
    protocol = args[0] if args else ""
    described = {"prog": f"eval/main.py {protocol}", "description": "Evaluate a checkpoint."}
    match protocol:
        case "retrieval":
            run_retrieval(parse_config(RetrievalEvaluation, args[1:], **described))
        case "linear":
            run_linear(parse_config(LinearEvaluation, args[1:], **described))
        case "compare":
            run_compare(parse_config(CompareEvaluation, args[1:], **described))
        case _:
            raise ConfigError(
                f"eval/main.py: protocol {protocol!r} is not known; use retrieval, linear or "
                "compare, first of the arguments"
            )


if __name__ == "__main__":
    with exit_with_one_line():
        main(sys.argv[1:])
