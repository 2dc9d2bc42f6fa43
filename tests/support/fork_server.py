"""Run the project's scripts many times without importing everything each time: fork from here.

Start it by `python -m tests.support.fork_server SOCKET`. Each connection to the socket is one run:
a line of JSON (`script`, `argv`, `env`, `stdout`, `stderr`, `hook`), to which the server answers
with the pid and, when the run has ended, with its status, each on a line. The server itself never
computes anything, so forking is safe. It ends, and all its runs with it, when its stdin is closed.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a run for each connection: returns its request in the run, None at the server's end."""
    running: dict[int, socket.socket] = {}
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([0, listener, woken], [], [])
        if woken in ready:
            woken.recv(4096)
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with running.pop(pid) as connection:
                    _tell(connection, os.waitstatus_to_exitcode(status))
        if 0 in ready and not os.read(0, 1):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return None
        if listener in ready:
            connection, _ = listener.accept()
            with connection.makefile() as stream:
                request = json.loads(stream.readline())
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (listener, wake, woken, connection, *running.values()):
                    each.close()
                return request
            running[pid] = connection
            _tell(connection, pid)


def _tell(connection: socket.socket, number: int) -> None:
    try:
        connection.sendall(f"{number}\n".encode())
    except OSError:  # The test has ended and does not listen any more.
        pass


def _run(request: dict[str, Any]) -> None:
    """Become the process that `python SCRIPT ARGV` is after its imports."""
    os.setsid()
    for stream in ("stdout", "stderr"):
        opened = os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, getattr(sys, stream).fileno())
        os.close(opened)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.clear()
    os.environ.update(request["env"])
    if request["hook"]:
        module, _, name = request["hook"].partition(":")
        getattr(importlib.import_module(module), name)()
    sys.argv = [request["script"], *request["argv"]]
    runpy.run_path(request["script"], run_name="__main__")


class _End:
    """Ends a process after all other exit handlers: to free what was imported takes seconds."""

    status = 0

    def __call__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)


def main(address: str) -> None:
    """Serve, and in each fork run."""
    end = _End()
    atexit.register(end)  # Before all others, so that it is called after them.
    importlib.import_module("tests.support.preloaded")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    request = _serve(listener)
    if request is not None:
        end.status = 1
        try:
            _run(request)
        except SystemExit as stop:
            if stop.code is None or isinstance(stop.code, int):
                end.status = stop.code or 0
            raise
        end.status = 0


if __name__ == "__main__":
    main(sys.argv[1])
