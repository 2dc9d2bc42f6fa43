"""The data set's table: shards, counts, hashes, and each source's status and reason."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strata.files import encode_text
from strata.preprocess.shards import replace_file, sync_folder
from strata.schema import (
    MANIFEST_NAME,
    SAMPLES_NAME,
    SCHEMA_VERSION,
    Manifest,
    NormalForm,
    ShardEntry,
    SourceRow,
)

__all__ = [
    "build_manifest",
    "canonical_json",
    "digest_of",
    "manifest_json",
    "rows_json",
    "write_manifest",
]


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 spelling of a value, for hashing and for files that are compared."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return encode_text(text)


def _row_json(row: SourceRow) -> bytes:
    return canonical_json({k: v for k, v in vars(row).items() if v is not None})


def _head(manifest: Manifest) -> dict[str, Any]:
    return {
        "schema": SCHEMA_VERSION,
        "dataset": manifest.dataset,
        "split": manifest.split,
        "form": dataclasses.asdict(manifest.form),
        "classes": list(manifest.classes),
        "shards": [dataclasses.asdict(s) for s in manifest.shards],
        "settings": manifest.settings,
    }


def digest_of(manifest: Manifest) -> str:
    """SHA-256 of all that the manifest holds but the digest itself."""
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
    """A manifest with its digest; the rows in the order of their source names."""
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
    """Write the rows, then the head: with the head's name in place the data set is complete."""
    replace_file(folder / SAMPLES_NAME, rows_json(manifest))
    replace_file(folder / MANIFEST_NAME, manifest_json(manifest))
    sync_folder(folder)
