"""How to start python, torchrun and deepspeed in this environment."""

import os
import socket
import sys
from collections.abc import Sequence

__all__ = ["QUIET", "program"]

QUIET = {"PYTHONUNBUFFERED": "1", "DS_LOG_LEVEL": "error"}
"""Environment variables of a command whose output a person reads."""


def program(words: Sequence[str]) -> list[str]:
    """The command line that starts a launcher; it does not depend on the shell's PATH.

    Args:
        words: `deepspeed`, `torchrun`, `python` or another program, and its options.
    """
    name, *options = words
    # Modules, not scripts: a script's first line breaks if the environment's path has a space.
    match name:
        case "python":
            return [sys.executable, *options]
        case "torchrun":
            return [sys.executable, "-m", "torch.distributed.run", *options]
        case "deepspeed":
            given = {option.split("=")[0] for option in options}
            if not given & {"--master_port", "--hostfile", "-H"}:
                # The launcher's default is one fixed port, which another run may use.
                options = [*options, "--master_port", str(_free_port())]
            module = [sys.executable, "-m", "deepspeed.launcher.runner"]
            return [*module, "--log_level", "error", *options]
        case _:
            return [os.path.expanduser(name), *options]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
