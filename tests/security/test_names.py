"""Names and digests of a stranger's manifest never become a path outside the cache."""

import json
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from strata.dataload.reader import ShardReader
from strata.dataload.storage import DownloadConfig, LocalFolder, RemoteFolder
from strata.errors import ShardError
from strata.format.schema import ShardEntry

DIGEST = "0" * 64
ENTRY = ShardEntry(name="shard-000000.tar", num_samples=1, num_frames=1, num_bytes=4, sha256=DIGEST)
NAMES = [
    "../../escaped.tar",
    "/tmp/escaped.tar",
    "a/b.tar",
    "..",
    ".tar",
    ".hidden.tar",
    "",
    "shard.tar\n",
    "shard\0.tar",
    "shärd.tar",
    "x" * 300 + ".tar",
    "manifest.json",
]
DIGESTS = ["../" * 21 + "0", "", "0" * 63, "0" * 64 + "\n", "A" * 64, "/" + "0" * 63]


@pytest.fixture
def store(shards: Path):
    """A set in a store; returns how to put another manifest there."""
    files = fsspec.filesystem("memory")
    for path in sorted((shards / "train").iterdir()):
        files.pipe_file(f"/hostile/{path.name}", path.read_bytes())
    # What the escapes would fetch.
    files.pipe_file("/escaped.tar", b"evil")
    yield files
    files.rm("/hostile", recursive=True)
    files.rm("/escaped.tar")


def outside(root: Path, cache: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file() and cache not in p.parents]


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_named_like_a_path_is_refused(name: str, store, tmp_path: Path):
    cache = tmp_path / "a" / "b" / "cache"
    folder = RemoteFolder("memory://hostile", DownloadConfig(folder=cache))
    with pytest.raises(ShardError, match=r"manifest\.json (contains|names) the shard"):
        folder.check([replace(ENTRY, name=name)], DIGEST)
    folder.close()
    with pytest.raises(ShardError, match=r"manifest\.json (contains|names) the shard"):
        LocalFolder(tmp_path).fetch(replace(ENTRY, name=name))
    assert outside(tmp_path, cache) == []


@pytest.mark.parametrize("digest", DIGESTS)
def test_a_digest_that_is_none_is_refused(digest: str, store, tmp_path: Path):
    cache = tmp_path / "a" / "b" / "cache"
    folder = RemoteFolder("memory://hostile", DownloadConfig(folder=cache))
    with pytest.raises(ShardError, match="not a SHA-256"):
        folder.check([ENTRY], digest)
    folder.check([], DIGEST)
    with pytest.raises(ShardError, match="not a SHA-256"):
        folder.fetch(replace(ENTRY, sha256=digest, num_bytes=store.size("/hostile/" + ENTRY.name)))
    folder.close()
    assert outside(tmp_path, cache) == []


@pytest.mark.parametrize("field", ["name", "digest"])
def test_a_manifest_from_a_url_cannot_write_outside_the_cache(field: str, store, tmp_path: Path):
    head = json.loads(store.cat_file("/hostile/manifest.json"))
    if field == "name":
        head["shards"][0]["name"] = "../../escaped.tar"
    else:
        head["digest"] = "../" * 5 + "x" * 20
    store.pipe_file("/hostile/manifest.json", json.dumps(head).encode())
    cache = tmp_path / "a" / "b" / "cache"
    with pytest.raises(ShardError):
        ShardReader("memory://hostile", download=DownloadConfig(folder=cache)).strip(
            0, np.array([0])
        )
    assert outside(tmp_path, cache) == []
