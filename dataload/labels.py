"""Checks of data sets whose labels are used."""

from strata.dataload.decode_windows import refuse_mixed_payloads
from strata.dataload.reader import ShardReader
from strata.errors import ConfigError, ShardError

__all__ = ["check_labels", "check_pair"]


def check_labels(reader: ShardReader) -> None:
    """Check that a data set can be used for classification.

    Raises:
        ShardError: It is empty, or has samples without labels.
    """
    if not reader.num_samples:
        raise ShardError(f"{reader.location} has no samples; choose another set")
    if (reader.labels < 0).any():
        raise ShardError(
            f"{reader.location} has samples without labels; evaluate on a set with classes"
        )


def check_pair(train: ShardReader, test: ShardReader) -> None:
    """Check that a training and a test set have the same classes and payload.

    Raises:
        ConfigError: Their classes or payloads differ.
    """
    one, two = (r.manifest.classes for r in (train, test))
    if one != two:
        differing = ", ".join(sorted(set(one) ^ set(two))[:3]) or "another order"
        raise ConfigError(
            f"{train.location} and {test.location} have different classes ({len(one)} and "
            f"{len(two)}: {differing}); shard both from one data set"
        )
    refuse_mixed_payloads([train, test])
