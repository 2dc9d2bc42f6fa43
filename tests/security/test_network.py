"""Stores that stay silent, lie, break off or never end: one line, bounded bytes, no wrong file."""

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from strata import transfer
from strata.dataload import storage
from strata.dataload.reader import ShardReader
from strata.dataload.storage import DownloadConfig
from strata.errors import ConfigError, ShardError
from tests.support.commands import ROOT

FRAMES = np.array([0, 32, 5, 17])
FIRST = "shard-000000.tar"


class Misbehaving(http.server.ThreadingHTTPServer):
    """Serves a folder; `faults[name]` answers a request for that file instead, while it is there.

    A fault gets the handler and the file's content; it returns whether it has answered.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.asked = folder, Counter[str]()
        self.faults: dict[str, Callable[[_Handler, bytes], bool]] = {}
        self.over = threading.Event()
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/train"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what is tested."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Misbehaving  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.command == "GET":
            self.server.asked[name] += 1
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, fault = path.read_bytes(), self.server.faults.get(name)
        if fault is None or not fault(self, content):
            self.answer(content)

    do_HEAD = do_GET

    def answer(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def status(code: int, times: int = 1 << 30) -> Callable[[_Handler, bytes], bool]:
    left = [times]

    def fault(handler: _Handler, content: bytes) -> bool:
        if left[0] == 0:
            return False
        left[0] -= handler.command == "GET"
        handler.send_error(code)
        return True

    return fault


def silent(handler: _Handler, content: bytes) -> bool:
    handler.server.over.wait(60)
    return True


def endless(handler: _Handler, content: bytes) -> bool:
    """No length, and bytes for as long as somebody takes them."""
    if handler.command == "HEAD":
        return False
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.is_set():
        handler.wfile.write(bytes(1 << 16))
        handler.server.sent += 1 << 16
    return True


def trickling(handler: _Handler, content: bytes) -> bool:
    if handler.command == "HEAD":
        return False
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    for byte in content:
        handler.wfile.write(bytes([byte]))
        if handler.server.over.wait(0.05):
            break
    return True


def altered(handler: _Handler, content: bytes) -> bool:
    """Another index: the first two numbers, a place and a size, are exchanged."""
    head, first, *rest = content.decode().splitlines()
    words = first.split(" ")
    words[1], words[2] = words[2], words[1]
    handler.answer(("\n".join([head, " ".join(words), *rest]) + "\n").encode())
    return True


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    monkeypatch.setattr(transfer, "_RETRY_S", 0.0)
    with Misbehaving(shards) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()


def open_at(server: Misbehaving, folder: Path, timeout_s: float = 15.0) -> ShardReader:
    return ShardReader(server.url, download=DownloadConfig(folder=folder, timeout_s=timeout_s))


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


@pytest.mark.parametrize("code", [429, 500, 503])
@pytest.mark.parametrize("name", ["manifest.json", FIRST])
def test_a_busy_store_is_asked_again(code: int, name: str, server: Misbehaving, tmp_path: Path):
    server.faults[name] = status(code, times=2)
    reader = open_at(server, tmp_path)
    assert reader.strip(0, FRAMES).size
    assert server.asked[name] >= 3


@pytest.mark.parametrize(
    ("code", "said"), [(404, "does not exist"), (403, "may not be read"), (401, "access rights")]
)
def test_absent_or_forbidden_files_are_requested_once(
    code: int, said: str, server: Misbehaving, tmp_path: Path
):
    server.faults["samples.jsonl"] = status(code)
    with pytest.raises(ShardError, match=said):
        open_at(server, tmp_path)
    assert server.asked["samples.jsonl"] == 1


def test_a_server_error_is_not_called_missing(server: Misbehaving, tmp_path: Path):
    server.faults[FIRST] = status(500)
    with pytest.raises(ShardError, match=r"was not read in 5 attempts: 500") as caught:
        open_at(server, tmp_path)
    assert "exist" not in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", FIRST, "shard-000000.idx"])
def test_a_silent_server_is_left_after_the_time_limit(
    name: str, server: Misbehaving, tmp_path: Path
):
    server.faults[name] = silent
    with pytest.raises(ShardError, match=r"was not read in [35] attempts"):
        open_at(server, tmp_path, timeout_s=0.2).strip(0, FRAMES)
    assert not leftovers(tmp_path)


def test_a_transfer_that_is_too_slow_is_aborted(server: Misbehaving, tmp_path: Path):
    server.faults[FIRST] = trickling
    with pytest.raises(ShardError, match=r"was not read in 3 attempts: only .* bytes in"):
        open_at(server, tmp_path, timeout_s=0.2).strip(0, FRAMES)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", FIRST, "shard-000000.idx"])
def test_an_endless_body_is_cut(
    name: str, server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("strata.dataload.storage._MANIFEST_LIMIT", 1 << 20)
    server.faults[name] = endless
    with pytest.raises(
        ShardError, match=r"was not read in 3 attempts: more than the \d+ expected bytes"
    ):
        open_at(server, tmp_path).strip(0, FRAMES)
    # Three attempts of at most a limit, and what sockets hold.
    assert server.sent < 3 * (1 << 20) + (64 << 20)
    assert not leftovers(tmp_path)


def test_a_body_longer_than_due_is_refused_by_its_announcement(server: Misbehaving, tmp_path: Path):
    def longer(handler: _Handler, content: bytes) -> bool:
        if handler.command == "HEAD":
            return False
        handler.answer(content, length=10**12)
        return True

    server.faults[FIRST] = longer
    with pytest.raises(ShardError, match="1000000000000 bytes are announced"):
        open_at(server, tmp_path).strip(0, FRAMES)


def test_a_wrong_index_never_enters_the_cache(server: Misbehaving, shards: Path, tmp_path: Path):
    server.faults["shard-000000.idx"] = altered
    with pytest.raises(ShardError, match=r"shard-000000\.idx was not read in 3 attempts: the ind"):
        open_at(server, tmp_path).strip(0, FRAMES)
    assert not list(tmp_path.rglob("*.idx"))
    server.faults.clear()
    right = ShardReader(shards / "train").strip(0, FRAMES)
    np.testing.assert_array_equal(open_at(server, tmp_path).strip(0, FRAMES), right)


def test_an_index_that_changed_in_the_cache_is_fetched_again(
    server: Misbehaving, shards: Path, tmp_path: Path
):
    open_at(server, tmp_path).strip(0, FRAMES)
    (index,) = tmp_path.rglob("*.idx")
    content = index.read_text()
    index.write_text(content.replace("video-0000.frames.i32", "video-0001.frames.i32"))
    right = ShardReader(shards / "train").strip(0, FRAMES)
    np.testing.assert_array_equal(open_at(server, tmp_path).strip(0, FRAMES), right)
    assert index.read_text() == content


def test_the_leftover_of_a_killed_process_goes_and_the_file_of_a_living_one_stays(
    server: Misbehaving, tmp_path: Path
):
    server.faults["samples.jsonl"] = silent
    code = (
        "import sys; from pathlib import Path; from strata.transfer import Store; "
        "folder = Path(sys.argv[2]) / 'set'; folder.mkdir(); "
        "Store(sys.argv[1], 60).download('samples.jsonl', folder / 'samples.jsonl', limit=9999)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)], cwd=ROOT)
    while not server.asked["samples.jsonl"]:
        assert child.poll() is None
        time.sleep(0.01)
    store = transfer.Store(server.url, 1)
    store.remove_leftovers(tmp_path)
    assert len(leftovers(tmp_path)) == 1
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    store.remove_leftovers(tmp_path)
    assert not leftovers(tmp_path)


def test_closing_ends_a_download_that_waits_for_its_next_attempt(
    server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer, "_RETRY_S", 10_000.0)
    monkeypatch.setattr(transfer, "_MOST_RETRY_S", 10_000.0)
    server.faults["manifest.json"] = status(503)
    store = transfer.Store(server.url, 1)
    seen = []

    def download() -> None:
        try:
            store.download("manifest.json", tmp_path / "manifest.json", limit=1 << 20)
        except ShardError as error:
            seen.append(error)

    thread = threading.Thread(target=download)
    thread.start()
    while not server.asked["manifest.json"]:
        time.sleep(0.01)
    store.close()
    thread.join()
    assert len(seen) == 1


def test_a_time_limit_must_be_a_time():
    with pytest.raises(ConfigError, match=r"data\.download\.timeout_s is 0"):
        DownloadConfig(timeout_s=0)


def test_an_index_is_held_against_the_hash_or_in_older_sets_against_the_tar(
    shards: Path, tmp_path: Path
):
    shard = shards / "train" / FIRST
    lines = shard.with_suffix(".idx").read_text().splitlines()
    words = lines[1].split(" ")
    wrong = {
        "moved": [lines[0], " ".join([words[0], str(int(words[1]) + 1), *words[2:]]), *lines[2:]],
        "renamed": [lines[0], lines[1].replace("video-0000", "video-0001"), *lines[2:]],
        "other kind": [lines[0], lines[1].replace("json ", "jpg ", 1), *lines[2:]],
        "fewer": lines[:-1],
        "cut": [lines[0], lines[1].rpartition(" ")[0], *lines[2:]],
        "no numbers": [lines[0], lines[1].replace(words[1], "x", 1), *lines[2:]],
        "empty": [],
    }
    index = tmp_path / "index"
    index.write_text("\n".join(lines) + "\n")
    right = hashlib.sha256(index.read_bytes()).hexdigest()
    entries: list[Any] = [
        SimpleNamespace(num_samples=9, index_sha256=None),
        SimpleNamespace(num_samples=9, index_sha256=right),
    ]
    for entry in entries:
        storage._compare_index(index, shard, entry)
    for content in wrong.values():
        index.write_text("\n".join(content) + "\n")
        for entry in entries:
            with pytest.raises(transfer.WrongContentError, match="the index"):
                storage._compare_index(index, shard, entry)


def test_a_cache_that_cannot_be_written_is_one_line(server: Misbehaving, tmp_path: Path):
    reader = open_at(server, tmp_path)
    (tmp_path / reader.manifest.digest).rmdir()
    with pytest.raises(ShardError, match=r"cannot be kept in data\.download\.folder"):
        reader.strip(0, FRAMES)
