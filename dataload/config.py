"""Settings of the training data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from strata.dataload.augment import AugmentSpec
from strata.dataload.clips import ClipSpec
from strata.dataload.frame_cache import CacheChoice
from strata.dataload.storage import DownloadConfig
from strata.errors import ConfigError

__all__ = ["DataConfig"]

DeviceChoice = Literal["cpu", "gpu", "auto"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the training data: shards, batch size, clips and augmentation."""

    shards: str | Path
    """A folder that tools/shard.py wrote, or its URL (s3://, gs://, http://)."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """The local cache of shards at a URL."""
    batch_size: int = 256
    """Samples in a global batch, over all ranks. TEXT: 256."""
    size: int = 112
    """Rows and columns of a view, in pixels. TEXT: 112."""
    clips: ClipSpec = field(default_factory=ClipSpec)
    """The window and its views."""
    views: AugmentSpec = field(default_factory=AugmentSpec)
    """Augmentation of each view."""
    decode: DeviceChoice = "auto"
    """Where frames are decoded; auto is the GPU if this rank trains on one that can decode."""
    augment: DeviceChoice = "auto"
    """Where views are augmented; auto measures both where this rank trains on a GPU and takes the
    faster one, see dataload/augment_choice.py."""
    cache: CacheChoice = "none"
    """Where decoded frames are cached, see dataload/frame_cache.py: host is memory that the ranks
    of a node share, device is each rank's GPU. Batches are bit-identical to those of decode cpu."""
    threads: int = 0
    """Threads of a rank that decode and augment; 0 divides the machine's cores equally among its
    ranks."""
    prefetch: int = 2
    """Batches to prefetch."""
    pool_samples: int = 16_384
    """Samples shuffled together, see dataload/plan.py."""
    check: Literal["size", "hash"] = "size"
    """Whether shards are checked at start by size or by SHA-256."""
    max_faults: int = 0
    """Distinct samples that may fail to decode on a rank before the run stops; dataload/faults.py
    describes their replacement. Evaluation replaces none: any fault stops it."""
    stall_s: float = 600.0
    """Seconds to wait for a batch before the run stops with the stacks of all threads."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        for name in ("batch_size", "size", "prefetch", "pool_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; use 1 or more")
        if self.max_faults < 0:
            raise ConfigError(f"data.max_faults is {self.max_faults}; use 0 or more")
        if self.threads < 0 or self.stall_s <= 0:
            raise ConfigError("data.threads must be 0 or more and data.stall_s above 0")
        if self.decode == "gpu" and self.augment == "cpu":
            raise ConfigError("data.augment cpu cannot follow data.decode gpu; decode on the cpu")
        if self.decode == "gpu" and self.cache != "none":
            raise ConfigError(
                f"data.cache {self.cache} keeps what the CPU decodes, but data.decode is gpu; use "
                "data.decode auto or cpu, or data.cache none"
            )
        if self.augment == "cpu" and self.cache == "device":
            raise ConfigError(
                "data.cache device is for augmenting on the GPU, but data.augment is cpu; use "
                "data.augment auto or gpu, or data.cache host"
            )

    def augments_on(self, device: torch.device) -> torch.device:
        """The device that augments for a rank that trains on `device`."""
        return torch.device("cpu") if self.augment == "cpu" else device
