"""Data loading: from shards to batches on the device."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strata.dataload.webdataset_clips import webdataset

__all__ = ["webdataset"]


def __getattr__(name: str) -> Any:
    """Import the public function when it is first used, as it imports torch and webdataset."""
    if name == "webdataset":
        from strata.dataload.webdataset_clips import webdataset

        return webdataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
