"""Evaluate a checkpoint: retrieval, linear probe, finetuning, both probes in one, temporal cues.

deepspeed eval/main.py retrieval --checkpoint runs/a \
    --gallery shards/ucf101/train01 --query shards/ucf101/test01
deepspeed eval/main.py linear --checkpoint runs/a \
    --train shards/ucf101/train01 --test shards/ucf101/test01
deepspeed eval/main.py finetune --checkpoint runs/a \
    --data "[shards/ucf101,shards/hmdb51]" --splits "[1,2,3]"
deepspeed eval/main.py compare --checkpoint runs/a \
    --train shards/ucf101/train01 --test shards/ucf101/test01
deepspeed eval/main.py temporal_cam --checkpoint runs/a \
    --train shards/ucf101/train01 --test shards/ucf101/test01 --out cues
deepspeed eval/main.py features --checkpoint runs/a --shards shards/ucf101/test01 --out f.npz
"""

import sys
from collections.abc import Sequence
from functools import partial

from strata.config import parse_config
from strata.errors import ConfigError, run_rank
from strata.eval.protocols.named import protocol_defaults
from strata.eval.protocols.run import RUNNERS
from strata.logs import set_up_logging


def main(argv: Sequence[str]) -> int:
    """Run one rank of an evaluation and return its exit status."""
    set_up_logging()
    args = [a for a in argv if not a.startswith("--local_rank")]
    name = args[0] if args else ""
    if name not in RUNNERS:
        raise ConfigError(
            f"eval/main.py: evaluation {name!r} is not known; use {', '.join(RUNNERS)}, first of "
            "the arguments"
        )
    settings, run = RUNNERS[name]
    parse = partial(parse_config, prog=f"eval/main.py {name}", description="Evaluate a checkpoint.")
    config = parse(settings, args[1:])
    if hasattr(config, "protocol"):
        # Once more with the protocol's settings in the place of the defaults; what is given stays.
        named = protocol_defaults(settings, name, config.protocol)
        config = parse(settings, args[1:], defaults=named)
    run(config)
    return 0


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
