"""The pairs of a training set and a test set that an evaluation measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.dataload.labels import check_pair
from strata.dataload.reader import ShardReader
from strata.errors import ConfigError

__all__ = ["SetPair", "open_pair", "open_pairs"]


@dataclass(frozen=True, kw_only=True)
class SetPair:
    """A training set and a test set of the same classes, both open."""

    data: str
    split: str
    train: ShardReader
    test: ShardReader

    @property
    def title(self) -> str:
        """The data set and its split, in words."""
        return f"{self.data}, {'split ' if self.split.isdigit() else ''}{self.split}"

    def facts(self) -> dict[str, dict[str, Any]]:
        """Folder, manifest digest and numbers of videos of both sets, for the report."""
        return {
            name: {
                "folder": str(reader.location),
                "manifest_digest": reader.manifest.digest,
                "num_listed": reader.num_listed,
                "num_videos": reader.num_samples,
            }
            for name, reader in (("train", self.train), ("test", self.test))
        }


def open_pairs(
    data: Sequence[Path],
    splits: Sequence[int],
    train: Path | None,
    test: Path | None,
) -> list[SetPair]:
    """Open the sets of an evaluation and compare their classes.

    Args:
        data: Folders with train01, test01 and so on.
        splits: Splits of each of these folders.
        train: One training set, instead of `data`.
        test: Its test set.

    Raises:
        ConfigError: Neither or both are given, or the classes of a pair differ.
        ShardError: A folder is missing or incomplete.
    """
    if data:
        if train is not None or test is not None:
            raise ConfigError("give either --data or --train and --test, not all")
        if not splits:
            raise ConfigError("--splits is empty; use for instance [1,2,3]")
        return [
            open_pair(root / f"train{n:02d}", root / f"test{n:02d}", root.name, str(n))
            for root in data
            for n in splits
        ]
    if train is None or test is None:
        raise ConfigError("give --train and --test, or --data with folders of train01 and test01")
    return [open_pair(train, test)]


def open_pair(train: Path, test: Path, data: str = "", split: str = "") -> SetPair:
    """Open one training set and its test set; names that are not given are the manifests'.

    Raises:
        ConfigError: The classes differ.
        ShardError: A folder is missing or incomplete.
    """
    gallery, queries = ShardReader(train), ShardReader(test)
    check_pair(gallery, queries)
    return SetPair(
        data=data or gallery.manifest.dataset,
        split=split or f"{gallery.manifest.split}/{queries.manifest.split}",
        train=gallery,
        test=queries,
    )
