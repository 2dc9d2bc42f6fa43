"""The command behind `tools/verify_shards.py`: folders in, one line a fault out."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from strata.errors import ShardError
from strata.format.manifest import read_manifest
from strata.preprocess.audit import check_folder

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ShardError: A folder has a fault; each was printed before.
    """
    parser = argparse.ArgumentParser(
        prog="tools/verify_shards.py",
        description="Hash every file of shard folders and decode a sample of the videos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="folders with a manifest.json")
    parser.add_argument("--decode", type=int, default=64, help="samples to decode; -1 for all")
    parser.add_argument("--seed", type=int, default=0, help="which samples")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one for each CPU")
    args = parser.parse_args(argv)
    num_faults = 0
    for folder in args.folders:
        start_s = time.monotonic()
        try:
            faults = check_folder(folder, decode=args.decode, seed=args.seed, workers=args.workers)
        except OSError as error:
            raise ShardError(f"{folder} cannot be read ({error}); give permission") from error
        for fault in faults:
            print(f"{folder}: {fault}")
        num_faults += len(faults)
        if not faults:
            manifest = read_manifest(folder)
            decoded = manifest.num_samples if args.decode < 0 else args.decode
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
