"""The commands by the name that a user typed: `strata shard`, or a file of a checkout.

The program `strata` and the files run by path are the same functions. Errors, help and hints name
the one that was started, also in processes that it starts.
"""

import os
import shlex
from pathlib import Path

__all__ = ["FILES", "STARTED_AS", "line", "script", "shown_program"]

FILES = {
    "shard": "tools/shard.py",
    "pretrain": "train/main.py",
    "evaluate": "eval/main.py",
    "export": "tools/export.py",
    "verify": "tools/verify_shards.py",
    "inspect": "tools/inspect_batch.py",
    "bench": "tools/bench.py",
    "ablate": "tools/ablate.py",
    "demo": "tools/demo.py",
    "make_videos": "tools/make_videos.py",
}
"""The commands of `strata` and the file behind each."""
STARTED_AS = "STRATA_PROGRAM"
"""Environment variable that `strata` sets, for itself and for the processes that it starts."""
_LAUNCHED = ("pretrain", "evaluate")


def shown_program(program: str) -> str:
    """Name of a program in messages: `strata shard ucf101` for `tools/shard.py ucf101`."""
    if STARTED_AS in os.environ:
        path, space, rest = program.partition(" ")
        for command, file in FILES.items():
            if path == file:
                return f"strata {command}{space}{rest}"
    return program


def script(command: str) -> Path:
    """The file behind a command: in a checkout, or in the installed package."""
    here = Path(__file__).resolve().parent
    found = here.parent / FILES[command]
    return found if found.is_file() else here / FILES[command]


def line(command: str, *words: str | Path) -> str:
    """A command line to type next, in the form that the user has typed.

    Args:
        command: A key of `FILES`.
        words: Its arguments; quoted for a shell where needed.
    """
    if STARTED_AS in os.environ:
        program = f"strata {command}"
    else:
        program = f"{'deepspeed' if command in _LAUNCHED else 'python'} {FILES[command]}"
    return " ".join([program, *(shlex.quote(str(word)) for word in words)])
