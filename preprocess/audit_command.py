"""The command behind `tools/verify_shards.py`: it checks shard folders and prints each fault."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from strata.config import parse_config
from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.preprocess.audit import check_folder

__all__ = ["AuditOptions", "main"]


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Hash every file of shard folders and decode a sample of the videos."""

    folders: tuple[Path, ...]
    """Folders with a manifest.json; may be given without the option's name."""
    decode: int = 64
    """Number of samples to decode; -1 for all."""
    seed: int = 0
    """Seed that chooses the samples."""
    workers: int = 0
    """Threads; 0 is one for each CPU."""


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: An argument is unknown or has the wrong type.
        ShardError: A folder has a fault; each was printed before.
    """
    options = parse_config(
        AuditOptions,
        argv,
        prog="tools/verify_shards.py",
        description=(AuditOptions.__doc__ or "").splitlines()[0],
        positional="folders",
    )
    num_faults = 0
    for folder in options.folders:
        start_s = time.monotonic()
        try:
            faults = check_folder(
                folder, decode=options.decode, seed=options.seed, workers=options.workers
            )
        except OSError as error:
            raise ShardError(f"{folder} cannot be read ({error}); give permission") from error
        for fault in faults:
            print(f"{folder}: {fault}")
        num_faults += len(faults)
        if not faults:
            manifest = read_manifest(folder)
            decoded = manifest.num_samples if options.decode < 0 else options.decode
            print(
                f"{folder}: sound: {manifest.num_samples:,} samples in {len(manifest.shards):,} "
                f"shards, {sum(s.num_bytes for s in manifest.shards):,} bytes hashed, "
                f"{min(decoded, manifest.num_samples):,} samples decoded, "
                f"{time.monotonic() - start_s:.1f} s"
            )
    if num_faults:
        raise ShardError(
            f"{num_faults} faults; copy the folder again, or remove it and shard the videos again"
        )
