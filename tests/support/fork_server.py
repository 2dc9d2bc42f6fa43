"""Run `train/main.py` many times without importing everything each time: fork from here.

Start it by `python -m tests.support.fork_server`. Each line of stdin is a request as JSON (`argv`,
`env`, `output`, `hook`); stdout has the `pid` of each run, and `pid status` when it has ended. The
server itself never computes anything, so forking is safe.
"""

import importlib
import json
import os
import select
import sys
import traceback


def _child(request: dict) -> None:
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(request["env"])
    import torch

    torch.set_num_threads(1)
    from strata.errors import run_rank
    from strata.train.main import main

    if request["hook"]:
        module, _, name = request["hook"].partition(":")
        getattr(importlib.import_module(module), name)()
    run_rank(lambda: main(request["argv"]))


def serve() -> None:
    """Fork a run for each line of stdin, and report the end of each run."""
    import deepspeed  # noqa: F401
    import nvidia.dali.fn
    import nvidia.dali.plugin.pytorch  # noqa: F401

    import strata.train.main

    assert strata.train.main is not None
    print("ready", flush=True)
    running: set[int] = set()
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            # Not sys.stdin: its buffer would hide lines from select.
            line = b""
            while not line.endswith(b"\n"):
                piece = os.read(0, 1)
                if not piece:
                    return
                line += piece
            pid = os.fork()
            if pid == 0:
                try:
                    _child(json.loads(line))
                except BaseException as error:
                    if not isinstance(error, SystemExit):
                        traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(0 if isinstance(error, SystemExit) and not error.code else 1)
            running.add(pid)
            print(pid, flush=True)
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                print(pid, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
