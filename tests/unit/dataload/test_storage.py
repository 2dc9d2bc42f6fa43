"""Shards at a URL give the samples of the folder, through a bounded and verified cache."""

import functools
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest

from strata import transfer
from strata.dataload import reader as reader_module
from strata.dataload.config import DataConfig
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.dataload.storage import DownloadConfig
from strata.errors import ConfigError, ShardError

FRAMES = np.array([0, 32, 5, 17])


class _Handler(http.server.SimpleHTTPRequestHandler):
    """HTTP server of a folder that counts requests and can truncate responses."""

    asked: ClassVar[Counter[str]] = Counter()
    cut: ClassVar[Counter[str]] = Counter()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        if self.cut[name]:
            self.cut[name] -= 1
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return
        super().do_GET()

    def log_message(self, format: str, *args):
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    _Handler.asked.clear()
    _Handler.cut.clear()
    handler = functools.partial(_Handler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def memory(shards: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    for path in sorted((shards / "train").iterdir()):
        store.pipe_file(f"/set/{path.name}", path.read_bytes())
    yield "memory://set"
    store.rm("/set", recursive=True)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "_RETRY_S", 0.0)


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*/*.tar"))


def same_samples(one: ShardReader, two: ShardReader):
    assert one.keys == two.keys
    samples = np.arange(one.num_samples)[::3]
    for a, b in zip(
        one.strips(samples, [FRAMES] * len(samples)),
        two.strips(samples, [FRAMES] * len(samples)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scheme", ["http", "memory", "file", "folded"])
def test_a_url_holds_what_the_folder_holds(
    scheme: str, shards: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    match scheme:
        case "http":
            url = f"{request.getfixturevalue('server')}/train"
        case "file":
            url = f"file://{shards / 'train'}"
        case "memory":
            url = request.getfixturevalue("memory") + "/"
        case _:
            url = Path(request.getfixturevalue("memory"))
    reader = ShardReader(url, download=DownloadConfig(folder=tmp_path))
    assert kept(tmp_path) == []
    same_samples(reader, ShardReader(shards / "train"))
    assert kept(tmp_path) == [f"shard-{k:06d}.tar" for k in range(3)]
    assert not list(tmp_path.rglob("*.part"))
    reader.close()


def test_a_shard_is_downloaded_once_for_all_readers(server: str, tmp_path: Path):
    readers = [
        ShardReader(f"{server}/train", download=DownloadConfig(folder=tmp_path)) for _ in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda r: r.strip(0, FRAMES), readers))
    assert _Handler.asked["shard-000000.tar"] == 1
    ShardReader(f"{server}/train", download=DownloadConfig(folder=tmp_path)).strip(0, FRAMES)
    assert _Handler.asked["shard-000000.tar"] == 1


def test_an_interrupted_download_is_repeated(server: str, shards: Path, tmp_path: Path):
    _Handler.cut["shard-000001.tar"] = 2
    reader = ShardReader(f"{server}/train", download=DownloadConfig(folder=tmp_path))
    same_samples(reader, ShardReader(shards / "train"))
    assert _Handler.asked["shard-000001.tar"] == 3


def test_a_download_that_always_fails_is_an_error(server: str, tmp_path: Path):
    _Handler.cut["shard-000001.tar"] = 99
    reader = ShardReader(f"{server}/train", download=DownloadConfig(folder=tmp_path))
    with pytest.raises(ShardError, match=r"train/shard-000001\.tar was not read in 5 attempts"):
        reader.strip(12, FRAMES)
    assert kept(tmp_path) == []
    assert not list(tmp_path.rglob("*.part"))
    _Handler.cut.clear()
    assert reader.strip(12, FRAMES).size


def test_a_changed_shard_is_never_used(memory: str, tmp_path: Path):
    reader = ShardReader(memory, download=DownloadConfig(folder=tmp_path))
    store = fsspec.filesystem("memory")
    content = bytearray(store.cat_file("/set/shard-000002.tar"))
    content[len(content) // 2] ^= 1
    store.pipe_file("/set/shard-000002.tar", bytes(content))
    assert reader.strip(0, FRAMES).size
    with pytest.raises(ShardError, match=r"shard-000002\.tar .*SHA-256 differs"):
        reader.strip(20, FRAMES)
    store.pipe_file("/set/shard-000002.tar", bytes(content[:-512]))
    with pytest.raises(ShardError, match=r"shard-000002\.tar has \d+ bytes, the manifest says"):
        ShardReader(memory, download=DownloadConfig(folder=tmp_path))
    store.rm_file("/set/shard-000002.tar")
    with pytest.raises(ShardError, match="a shard does not exist"):
        ShardReader(memory, download=DownloadConfig(folder=tmp_path))


def test_the_cache_is_bounded_and_what_is_open_stays_readable(
    memory: str, shards: Path, tmp_path: Path
):
    folder = ShardReader(shards / "train")
    sizes = [s.num_bytes for s in folder.manifest.shards]
    limit = max(sizes) * 1.5 / 1e9
    reader = ShardReader(memory, download=DownloadConfig(folder=tmp_path, gigabytes=limit))
    same_samples(reader, folder)
    assert len(kept(tmp_path)) == 1
    # Shards removed from the cache are still open here, and later downloaded again.
    same_samples(reader, folder)
    reader._files.close()
    same_samples(reader, folder)
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*.tar")) <= limit * 1e9


def test_few_descriptors_serve_many_shards(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader_module, "_OPEN_SHARDS", 1)
    reader = ShardReader(shards / "train")
    same_samples(reader, ShardReader(shards / "train"))
    assert len(reader._files._open) == 1


def test_a_damaged_file_in_the_cache_is_fetched_again(server: str, shards: Path, tmp_path: Path):
    download = DownloadConfig(folder=tmp_path)
    ShardReader(f"{server}/train", download=download).strip(0, FRAMES)
    (path,) = tmp_path.glob("*/shard-000000.tar")
    path.write_bytes(path.read_bytes()[:1000])
    same_samples(ShardReader(f"{server}/train", download=download), ShardReader(shards / "train"))


def test_upcoming_shards_are_downloaded_early(server: str, tmp_path: Path):
    reader = ShardReader(f"{server}/train", download=DownloadConfig(folder=tmp_path))
    reader.fetch_ahead(np.array([20, 1]))
    reader._place._pool.shutdown(wait=True, cancel_futures=True)  # pyright: ignore[reportAttributeAccessIssue]
    assert set(kept(tmp_path)) <= {"shard-000000.tar", "shard-000002.tar"}
    assert kept(tmp_path)


def test_a_cache_smaller_than_a_pool_is_refused(memory: str, tmp_path: Path):
    config = DataConfig(
        shards=memory,
        batch_size=4,
        download=DownloadConfig(folder=tmp_path, gigabytes=1e-4),
    )
    reader = ShardReader(memory, download=config.download)
    with pytest.raises(ConfigError, match=r"data\.download\.gigabytes is 0\.0001, but data\.pool"):
        open_plan(reader, config, 0)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("zz://bucket/x", ConfigError, r"zz://bucket/x cannot be opened: Protocol not known"),
        ("memory://nothing", ShardError, r"memory://nothing/manifest\.json does not exist"),
        ("http://127.0.0.1:9/x", ShardError, r"manifest\.json was not read in 5 attempts"),
    ],
)
def test_a_wrong_url_is_one_clear_line(url: str, error: type, message: str, tmp_path: Path):
    with pytest.raises(error, match=message):
        ShardReader(url, download=DownloadConfig(folder=tmp_path))


def test_a_cache_without_room_is_refused():
    with pytest.raises(ConfigError, match=r"data\.download\.gigabytes is 0"):
        DownloadConfig(gigabytes=0)
