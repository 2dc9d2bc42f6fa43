"""Evaluate a checkpoint: retrieval, linear probe, finetuning, both probes in one, temporal cues.

deepspeed eval/main.py retrieval --checkpoint runs/a \
    --train shards/ucf101/train01 --test shards/ucf101/test01
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

from strata import commands
from strata.config import parse_config
from strata.errors import ConfigError, run_rank
from strata.eval.evaluations.runners import RUNNERS
from strata.eval.protocols.named import protocol_defaults
from strata.logs import set_up_logging
from strata.suggestions import did_you_mean


def main(argv: Sequence[str]) -> int:
    """Run one rank of an evaluation and return its exit status.

    Raises:
        ConfigError: The evaluation or one of its settings is not known.
    """
    set_up_logging()
    args = [a for a in argv if not a.startswith("--local_rank")]
    name = args[0] if args else "--help"
    if name in ("-h", "--help", "--help_all"):
        print(_usage())
        return 0
    if name not in RUNNERS:
        raise ConfigError(
            f"{commands.shown_program('eval/main.py')}: the first argument is an evaluation, one "
            f"of {', '.join(RUNNERS)}; got {name}{did_you_mean(name, RUNNERS)}"
        )
    settings, run = RUNNERS[name]
    parse = partial(
        parse_config,
        prog=f"eval/main.py {name}",
        description=(settings.__doc__ or "").splitlines()[0],
    )
    config = parse(settings, args[1:])
    if hasattr(config, "protocol"):
        # Once more with the protocol's settings in the place of the defaults; what is given stays.
        named = protocol_defaults(settings, name, config.protocol)
        config = parse(settings, args[1:], defaults=named)
    run(config)
    return 0


def _usage() -> str:
    """The help of the command without an evaluation."""
    program = commands.shown_program("eval/main.py")
    about = {name: (run.__doc__ or "").splitlines()[0] for name, (_, run) in RUNNERS.items()}
    return "\n".join(
        [
            f"usage: {program} EVALUATION --checkpoint RUN ...",
            "",
            "Evaluate a checkpoint. Evaluations:",
            *(f"  {name:<14}{text}" for name, text in about.items()),
            "",
            f"`{program} EVALUATION --help` explains the settings of one.",
        ]
    )


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
