"""Clients of /metrics that say nothing, or are many: the work never shares their fate."""

import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from strata.telemetry import scrape
from strata.telemetry.metrics import ExporterConfig, Metrics
from tests.support.commands import ROOT
from tests.support.commands import scrape as read_metrics
from tests.unit.telemetry.test_metrics import make_certificate


@pytest.fixture(params=["plain", "tls"])
def served(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[scrape.ScrapeServer, int, Any]]:
    """A server of metrics, its port, and how to scrape it."""
    import ssl

    metrics = Metrics()
    if request.param == "plain":
        server = scrape.open_server(metrics.registry, ExporterConfig(), 0)
        assert server is not None
        port = server.server_port
        url, context = f"http://127.0.0.1:{port}/metrics", None
    else:
        certificate, key = make_certificate(tmp_path)
        config = ExporterConfig(certificate=certificate, key=key)
        server = scrape.open_server(metrics.registry, config, 0)
        assert server is not None
        port = server.server_port
        url = f"https://127.0.0.1:{port}/metrics"
        context = ssl.create_default_context(cafile=str(certificate))

    def read() -> bytes:
        with urllib.request.urlopen(url, timeout=20, context=context) as answer:
            return answer.read()

    yield server, port, read
    server.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def is_closed(connection: socket.socket) -> bool:
    """Waits until the other side ends it; what came before is read."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def test_a_silent_client_holds_up_neither_scrapes_nor_the_end(
    served: tuple[scrape.ScrapeServer, int, Callable[[], bytes]], monkeypatch: pytest.MonkeyPatch
):
    server, port, read = served
    # So long that only a server that does not wait passes in time.
    monkeypatch.setattr(scrape, "CONNECTION_S", 10_000.0)
    with connect(port) as silent:
        for _ in range(3):
            assert b"strata_build_info" in read()
        closing = threading.Thread(target=server.close)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()
        assert is_closed(silent)


def test_a_connection_beyond_the_bound_is_closed_at_once_and_room_comes_back(
    served: tuple[scrape.ScrapeServer, int, Callable[[], bytes]], monkeypatch: pytest.MonkeyPatch
):
    _, port, read = served
    monkeypatch.setattr(scrape, "CONNECTION_S", 10_000.0)
    held = [connect(port) for _ in range(scrape.MAX_CONNECTIONS)]
    with connect(port) as refused:
        assert is_closed(refused)
    held.pop().close()
    deadline = time.monotonic() + 60
    while True:
        try:
            assert b"strata_build_info" in read()
            break
        except OSError:
            assert time.monotonic() < deadline
    for each in held:
        each.close()


@pytest.mark.parametrize("trickles", [False, True])
def test_no_connection_outlives_its_time(
    trickles: bool,
    served: tuple[scrape.ScrapeServer, int, Callable[[], bytes]],
    monkeypatch: pytest.MonkeyPatch,
):
    _, port, read = served
    monkeypatch.setattr(scrape, "CONNECTION_S", 0.5)
    with connect(port) as connection:
        if trickles:
            try:
                for byte in b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 10_000:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.01)
                pytest.fail("the connection lived for 100 s")
            except OSError:
                pass
        else:
            assert is_closed(connection)
    monkeypatch.setattr(scrape, "CONNECTION_S", 10.0)
    assert b"strata_build_info" in read()


def test_wrong_requests_cause_no_traceback(
    served: tuple[scrape.ScrapeServer, int, Callable[[], bytes]], capfd: pytest.CaptureFixture[str]
):
    _, port, read = served
    for said in (b"", b"\0" * 100, b"GET " + b"x" * 70_000, b"\x16\x03\x01\x00\x05hello"):
        with connect(port) as connection:
            try:
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            assert is_closed(connection)
    assert b"strata_build_info" in read()
    assert "Traceback" not in capfd.readouterr().err


WORK = """
import resource, sys, tempfile
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from strata.telemetry.metrics import ExporterConfig, Metrics
from strata.telemetry.scrape import open_server
metrics = Metrics()
server = open_server(metrics.registry, ExporterConfig(), 0)
print(server.server_port, flush=True)
for line in sys.stdin:
    # The work opens files all the time.
    files = [tempfile.TemporaryFile() for _ in range(30)]
    print("worked", flush=True)
server.close()
print("done", flush=True)
"""


def test_hundreds_of_idle_connections_do_not_take_the_works_descriptors():
    child = subprocess.Popen(
        [sys.executable, "-c", WORK],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    port = int(child.stdout.readline())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    idle = []
    try:
        for number in range(300):
            idle.append(connect(port))
            if number % 50 == 0:
                child.stdin.write("\n")
                child.stdin.flush()
                assert child.stdout.readline() == "worked\n"
        for each in idle:
            each.close()
        deadline = time.monotonic() + 60
        while True:
            try:
                assert 'strata_build_info{version="0.1.0"}' in read_metrics(port)
                break
            except OSError:
                assert time.monotonic() < deadline
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert child.returncode == 0, said
    assert "Traceback" not in said


def test_idle_connections_are_bounded_in_a_process_that_is_out_of_descriptors(tmp_path: Path):
    """The thread that accepts neither ends nor takes a core."""
    code = """
import os, resource, sys
from strata.telemetry.metrics import ExporterConfig, Metrics
from strata.telemetry.scrape import ScrapeServer, open_server

original, tries = ScrapeServer.get_request, []

def get_request(self):
    tries.append(1)
    return original(self)

ScrapeServer.get_request = get_request
metrics = Metrics()
server = open_server(metrics.registry, ExporterConfig(), 0)
port = server.server_port
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
print(port, flush=True)
sys.stdin.readline()
num_tries = len(tries)
for each in taken:
    os.close(each)
print(num_tries, flush=True)
sys.stdin.readline()
server.close()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    port = int(child.stdout.readline())
    with connect(port):
        time.sleep(2)
        child.stdin.write("\n")
        child.stdin.flush()
        num_tries = int(child.stdout.readline())
    assert read_metrics(port)
    child.communicate("\n", timeout=60)
    assert child.returncode == 0
    # A loop without pause tries a thousand times as often.
    assert 1 <= num_tries < 100
