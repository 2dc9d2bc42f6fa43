"""Read and write the manifest: shards, counts, hashes, and each source video's status."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from strata.errors import ShardError
from strata.files import encode_text, write_atomic
from strata.format.schema import (
    MANIFEST_NAME,
    MAX_CLASSES,
    READABLE_VERSIONS,
    SAMPLES_NAME,
    SCHEMA_VERSION,
    SHARD_SUFFIX,
    Manifest,
    NormalForm,
    ShardEntry,
    SourceRow,
)
from strata.untrusted import Digest, checked_name, checked_text, decode_json, decode_json_lines

__all__ = [
    "build_manifest",
    "canonical_json",
    "digest_of",
    "manifest_json",
    "read_manifest",
    "rows_json",
    "write_manifest",
]

_MAX_HEAD_BYTES = 1 << 28
_MAX_KEY_LENGTH = 1024


def canonical_json(value: Any) -> bytes:
    """Encode a value as canonical UTF-8 JSON, for hashing and comparing files."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return encode_text(text)


def _without_none(record: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(record).items() if v is not None}


def _row_json(row: SourceRow) -> bytes:
    return canonical_json(_without_none(row))


def _head(manifest: Manifest) -> dict[str, Any]:
    return {
        "schema": manifest.schema,
        "dataset": manifest.dataset,
        "split": manifest.split,
        "form": dataclasses.asdict(manifest.form),
        "classes": list(manifest.classes),
        "shards": [_without_none(s) for s in manifest.shards],
        "settings": manifest.settings,
    }


def digest_of(manifest: Manifest) -> str:
    """SHA-256 of a manifest's content without the digest itself."""
    digest = hashlib.sha256(canonical_json(_head(manifest)))
    for row in manifest.rows:
        digest.update(b"\n" + _row_json(row))
    return digest.hexdigest()


def build_manifest(
    *,
    dataset: str,
    split: str,
    form: NormalForm,
    classes: Sequence[str],
    shards: Sequence[ShardEntry],
    settings: dict[str, Any],
    rows: Sequence[SourceRow],
) -> Manifest:
    """Make a manifest with its digest and its rows ordered by source name."""
    manifest = Manifest(
        dataset=dataset,
        split=split,
        form=form,
        classes=tuple(classes),
        shards=tuple(shards),
        settings=settings,
        digest="",
        rows=tuple(sorted(rows, key=lambda r: r.source)),
    )
    return dataclasses.replace(manifest, digest=digest_of(manifest))


def rows_json(manifest: Manifest) -> bytes:
    """The content of `samples.jsonl`."""
    return b"".join(_row_json(row) + b"\n" for row in manifest.rows)


def manifest_json(manifest: Manifest) -> bytes:
    """The content of `manifest.json`."""
    head = {**_head(manifest), "digest": manifest.digest}
    return encode_text(json.dumps(head, indent=1, ensure_ascii=False) + "\n")


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the rows, then the head, whose presence marks the data set as complete."""
    write_atomic(folder / SAMPLES_NAME, rows_json(manifest))
    write_atomic(folder / MANIFEST_NAME, manifest_json(manifest))


@dataclass(frozen=True, kw_only=True)
class _Version:
    schema: int


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The content of `manifest.json`."""

    schema: int
    dataset: str
    split: str
    form: NormalForm
    classes: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_CLASSES)]
    shards: tuple[ShardEntry, ...]
    settings: dict[str, Any]
    digest: Annotated[str, Digest]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a shard folder and check its types, ranges, names and digest.

    Raises:
        ShardError: The folder or its manifest is missing, damaged, or of another version.
    """
    if not folder.is_dir():
        raise ShardError(
            f"shard folder {folder} does not exist; make it with tools/shard.py, or correct the "
            "path"
        )
    path, rows_path = folder / MANIFEST_NAME, folder / SAMPLES_NAME
    if not path.is_file():
        sets = sorted(below.parent.name for below in folder.glob(f"*/{MANIFEST_NAME}"))
        if sets:
            raise ShardError(
                f"{folder} is the folder of {len(sets)} shard folders, {', '.join(sets[:6])}; give "
                f"one of them, for instance {folder / sets[-1]}"
            )
        raise ShardError(
            f"shard folder {folder} has no {MANIFEST_NAME}; sharding did not finish or this is "
            "another kind of folder: run the same tools/shard.py command again"
        )
    try:
        content, rows_content = path.read_bytes(), rows_path.read_bytes()
    except OSError as error:
        raise ShardError(f"{folder}: the manifest cannot be read ({error}); copy it again") from (
            error
        )
    version = decode_json(content, _Version, path, ShardError, max_bytes=_MAX_HEAD_BYTES).schema
    if version not in READABLE_VERSIONS:
        raise ShardError(
            f"{path}: schema {version}, this program reads 1 to {SCHEMA_VERSION}; update the "
            "program, or shard the videos again"
        )
    try:
        head = decode_json(content, _Head, path, ShardError)
    except ShardError as error:
        if str(path) in str(error):
            raise
        # The normal form's own check does not know the file.
        raise ShardError(f"{path}: {error}") from error
    raw = decode_json(content, dict[str, Any], path, ShardError)
    missing = {f.name for f in dataclasses.fields(NormalForm)} - raw["form"].keys()
    if missing:
        raise ShardError(f"{path}: the form has no {', '.join(sorted(missing))}; shard again")
    if _digest_of_files(raw, rows_content) != head.digest:
        raise ShardError(
            f"{path} or {SAMPLES_NAME} is damaged: the digest is not that of their content; copy "
            "the folder again, or run the same tools/shard.py again"
        )
    manifest = Manifest(
        **{name: value for name, value in vars(head).items()},
        rows=tuple(decode_json_lines(rows_content, SourceRow, rows_path, ShardError)),
    )
    _check_head(manifest, path)
    _check_rows(manifest, rows_path)
    return manifest


def _digest_of_files(raw: dict[str, Any], rows_content: bytes) -> str:
    """Compute the digest from the files' bytes, without encoding the rows again."""
    head = {name: value for name, value in raw.items() if name != "digest"}
    digest = hashlib.sha256(canonical_json(head))
    if rows_content:
        digest.update(b"\n" + rows_content.removesuffix(b"\n"))
    return digest.hexdigest()


def _check_head(manifest: Manifest, path: Path) -> None:
    """Check the names of shards, and that index files have hashes."""
    for what, name in (("dataset", manifest.dataset), ("split", manifest.split)):
        checked_text(name, what, path, ShardError)
    for name in manifest.classes:
        checked_text(name, "class", path, ShardError)
    names = [checked_name(e.name, "shard", path, ShardError) for e in manifest.shards]
    if len(set(names)) < len(names) or not all(name.endswith(SHARD_SUFFIX) for name in names):
        raise ShardError(f"{path}: the shards must be different files named *{SHARD_SUFFIX}")
    if manifest.schema > 1 and any(e.index_sha256 is None for e in manifest.shards):
        raise ShardError(f"{path}: a shard has no `index_sha256`; shard the videos again")


def _check_rows(manifest: Manifest, path: Path) -> None:
    """Check that the rows of written samples agree with the shards' entries.

    Raises:
        ShardError: A row lacks a field, or names a class or shard that does not exist; or places
            or counts do not agree with the shards' entries.
    """
    num_shards, num_classes = len(manifest.shards), len(manifest.classes)
    is_foreign = manifest.form.payload == "foreign"
    for row in manifest.rows:
        if row.label >= num_classes:
            raise ShardError(
                f"{path}: {row.source!r} has the label {row.label}, there are {num_classes} classes"
            )
        if row.status != "written":
            continue
        if row.key is None or row.shard is None or row.position is None or not row.num_frames:
            raise ShardError(f"{path}: {row.source!r} is written, but has no complete place")
        if row.shard >= num_shards:
            raise ShardError(f"{path}: {row.source!r} is in shard {row.shard} of {num_shards}")
        if is_foreign:
            checked_text(row.key, "key", path, ShardError, _MAX_KEY_LENGTH)
        else:
            checked_name(row.key, "key", path, ShardError)
    written = manifest.written
    shards = np.array([row.shard for row in written], np.int64)
    counts = np.array([e.num_samples for e in manifest.shards], np.int64)
    frames = np.bincount(shards, [row.num_frames for row in written], num_shards)
    ends = np.cumsum(counts)
    places = np.arange(len(written)) - (ends - counts)[shards]
    if (
        not np.array_equal(np.bincount(shards, minlength=num_shards), counts)
        or not np.array_equal(np.array([row.position for row in written], np.int64), places)
        or not np.array_equal(frames, [e.num_frames for e in manifest.shards])
    ):
        raise ShardError(
            f"{path}: the samples' places, or their numbers of frames, are not those of the shards "
            f"in {MANIFEST_NAME}; run the same tools/shard.py again"
        )
