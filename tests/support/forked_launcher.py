"""A launcher for commands that start others: `forked_launcher.py SOCKET SCRIPT ...`.

It asks the fork server of the tests for the process, which writes to this one's outputs, passes
signals on, and ends with its exit status.
"""

import json
import os
import signal
import socket
import sys


def main(address: str, script: str, *argv: str) -> int:
    """Run the script to its end; returns its exit status."""
    outputs = {name: f"/proc/{os.getpid()}/fd/{fd}" for name, fd in (("stdout", 1), ("stderr", 2))}
    request = {"script": script, "argv": argv, "env": dict(os.environ), "hook": ""} | outputs
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendall((json.dumps(request) + "\n").encode())
        with connection.makefile() as answers:
            pid = int(answers.readline())
            signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
            return int(answers.readline())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
