"""Edits of a data set for tests, with correct digests after the edit."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from strata.dataload.reader import ShardReader
from strata.format.schema import MANIFEST_NAME, SAMPLES_NAME


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_json(folder: Path, head: dict[str, Any], rows: list[Any]) -> None:
    """Write a manifest with any head and rows, with the digest of docs/data-format.md."""
    lines = [canonical(row) for row in rows]
    head.pop("digest", None)
    digest = hashlib.sha256(b"\n".join([canonical(head), *lines])).hexdigest()
    (folder / SAMPLES_NAME).write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / MANIFEST_NAME).write_text(json.dumps(head | {"digest": digest}), encoding="utf-8")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any], list[Any]], None]) -> None:
    """Change the manifest's head and rows in place."""
    head = json.loads((folder / MANIFEST_NAME).read_bytes())
    rows = [json.loads(line) for line in (folder / SAMPLES_NAME).read_bytes().splitlines()]
    change(head, rows)
    write_json(folder, head, rows)


def edit_index(folder: Path, shard: int, change: Callable[[bytes], bytes]) -> None:
    """Change an index file and update its hash in the manifest."""

    def rehash(head: dict[str, Any], _: list[Any]) -> None:
        entry = head["shards"][shard]
        path = (folder / entry["name"]).with_suffix(".idx")
        content = change(path.read_bytes())
        path.write_bytes(content)
        entry["index_sha256"] = hashlib.sha256(content).hexdigest()

    edit_manifest(folder, rehash)


def flip(path: Path, place: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ mask]))


def place_of(folder: Path, sample: int, ext: str) -> tuple[Path, int, int]:
    """The tar of a sample's member, and the member's offset and size."""
    reader = ShardReader(folder)
    shard, members = reader.members(sample)
    reader.close()
    return folder / reader.manifest.shards[shard].name, *members[ext]


def all_strips(folder: Path) -> list[bytes]:
    """All strips of a set of the jpeg payload, as the loader reads them."""
    reader = ShardReader(folder)
    try:
        frames = [np.arange(count) for count in reader.num_frames.tolist()]
        return [s.tobytes() for s in reader.strips(np.arange(reader.num_samples), frames)]
    finally:
        reader.close()
