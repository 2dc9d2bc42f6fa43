"""Sharding from and to a real S3 server that fails: the same bytes as between local folders."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from strata import transfer
from strata.errors import ConfigError, ShardError
from strata.files import LockRecord
from strata.preprocess import places
from strata.preprocess.command import main
from tests.integration.test_sharding import SMALL, contents, shards, videos
from tests.support.object_store import BUCKET, FaultyStore, put_folder, s3_server, stored

pytest.importorskip("s3fs")
pytest.importorskip("moto")

__all__ = ["shards", "videos"]
OUT = f"s3://{BUCKET}/out"


def argv(out: str, *options: str) -> list[str]:
    words = ["folder", "--videos", f"s3://{BUCKET}/videos", "--out", out, "--workers", "2"]
    return [*words, *SMALL, "--max-rejects", "1", "--log", "none", *options]


@pytest.fixture(scope="module")
def server(videos: Path) -> Iterator[FaultyStore]:
    with s3_server() as store:
        put_folder(videos, "videos")
        yield store


@pytest.fixture
def store(server: FaultyStore) -> FaultyStore:
    server.every = 0
    server.asked.clear()
    return server


def test_the_same_bytes_through_a_store_that_fails(
    store: FaultyStore, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.every = 9
    main(argv(OUT, "--slice", "0/2", "--samples-per-part", "2"))
    with pytest.raises(ShardError, match=r"s3://bucket/out/train: 2 of 3 shards are not finished"):
        main(["merge", f"{OUT}/train"])
    main(argv(OUT, "--samples-per-part", "2"))
    store.every = 0
    assert stored("out/train") == contents(shards)
    assert {"GET 500", "PUT 500", "GET cut"} <= store.failed.keys(), store.failed
    main(argv(OUT))  # It is complete.
    main(["merge", OUT, "--max-rejects", "1"])
    assert f"folder train -> {OUT}/train" in capsys.readouterr().out


def test_each_source_is_read_once_and_the_manifest_comes_last(store: FaultyStore) -> None:
    main(argv(f"{OUT}/once"))
    reads = {
        path: count
        for (method, path), count in store.asked.items()
        if method == "GET" and path.startswith(f"/{BUCKET}/videos/")
    }
    assert set(reads.values()) == {1}
    assert len(reads) == 12
    puts = [path for method, path in store.asked if method == "PUT"]
    assert puts[-1] == f"/{BUCKET}/out/once/train/manifest.json"


def test_what_a_store_lacks_is_one_line(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"there is no file below s3://bucket/nothing; correct"):
        main(["folder", "--videos", f"s3://{BUCKET}/nothing", "--out", OUT])
    monkeypatch.setattr(transfer, "_RETRY_S", 0.0)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    store.every = 1
    with pytest.raises(ShardError, match=r"s3://bucket/videos/ was not read in 5 attempts"):
        main(argv(OUT))


def test_a_url_has_one_driver_at_a_time(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_RENEW_S", 0.05)
    place = places.open_place(f"{OUT}/locked")
    here, elsewhere = LockRecord.own(), msgspec.structs.replace(LockRecord.own(), machine="x")
    store.every = 5
    with place.locked("lock"), ExitStack() as second:
        with pytest.raises(ShardError, match=r"process \d+ on .* is sharding into s3://bucket/out"):
            second.enter_context(place.locked("lock"))
        # As it looks from another machine: it is renewed.
        monkeypatch.setattr(LockRecord, "own", lambda: elsewhere)
        with pytest.raises(ShardError, match=r"process \d+ on .* is sharding into s3://bucket/out"):
            second.enter_context(place.locked("lock"))
        monkeypatch.undo()
    # One that ended, also by a kill on this machine, is followed at once.
    with place.locked("lock"):
        pass
    dead = msgspec.structs.replace(here, started=here.started + 1)
    place.write("lock.2", msgspec.json.encode(dead))
    with place.locked("lock"):
        pass
    assert list(place.names("")) == ["lock.3"]
    # Of several that find a dead one of another machine, one gets it.
    place.write("lock.3", msgspec.json.encode(elsewhere))
    monkeypatch.setattr(places, "_STALE_S", 0.0)
    wait_for_end = places.RemotePlace._wait_for_end
    with ExitStack() as faster:

        def be_slower(self: places.RemotePlace, lease: str) -> None:
            wait_for_end(self, lease)
            monkeypatch.setattr(places.RemotePlace, "_wait_for_end", wait_for_end)
            faster.enter_context(place.locked("lock"))

        monkeypatch.setattr(places.RemotePlace, "_wait_for_end", be_slower)
        with pytest.raises(ShardError, match=r"another process is sharding"):
            faster.enter_context(place.locked("lock"))
        assert list(place.names("")) == ["lock.4"]


def test_a_store_decides_who_creates_a_file(store: FaultyStore) -> None:
    files = transfer.Store(f"{OUT}/created")
    assert files.create("a", b"1")
    assert files.create("a", b"1")  # As after an answer that was lost.
    assert not files.create("a", b"2")
    assert stored("out/created") == {"a": b"1"}
