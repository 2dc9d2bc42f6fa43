"""Settings of sharding: those that decide the bytes, and those that do not."""

from dataclasses import dataclass, field
from typing import Literal

from strata.decoding import Damaged
from strata.errors import ConfigError
from strata.format.schema import NormalForm
from strata.limits import usable_cpus
from strata.ranges import check_range

__all__ = ["ReadBack", "ShardSettings"]

ReadBack = Literal["all", "sampled"]
"""Which frames of a JPEG sample are decoded back and compared before it is written."""


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Settings of sharding, without the videos and the folder."""

    form: NormalForm = field(default_factory=NormalForm)
    """The form of every sample."""
    samples_per_shard: int = 128
    """Sources to a shard; 128 clips of UCF101 are about 140 MB."""
    seed: int = 0
    """Seed of the shuffle, in [0, 2^32)."""
    read_back: ReadBack = "sampled"
    """`sampled`: every restart marker is counted, every 8th frame and the last decoded back and
    compared; `all`: every frame, for a sixth more CPU time. mp4 is always decoded completely."""
    damaged: Damaged = "reject"
    """Videos with damaged or missing frames: `reject` them, or `keep` what decodes, with a note."""
    executor: Literal["local", "ray"] = "local"
    """Whether processes of this machine or a Ray cluster make the parts."""
    ray_address: str = "auto"
    """Of the cluster, as `ray.init` takes it."""
    workers: int = 0
    """Processes; 0 for one on each CPU that this process may use, by affinity and quota."""
    worker_memory: float = 0.0
    """GB (10^9 bytes) of memory that a worker may take after its start, of which 0.15 are for
    libraries and small videos; 0 for no bound."""
    timeout_s: float = 300.0
    """Seconds without a packet, a frame or a segment after which a video counts as hung; a long or
    slow video does not."""
    samples_per_part: int = 16
    """Sources to a task; a shard is made of such parts, and its bytes do not depend on them."""
    slice_index: int = 0
    """Which slice of the parts to make, from 0."""
    slice_count: int = 1
    """Number of slices; each has the parts of a range of places."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        check_range(self, "samples_per_shard", "samples_per_part", at_least=1)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; use 0 to 2^32 - 1")
        check_range(self, "workers", at_least=0)
        check_range(self, "timeout_s", above=0, at_most=10**6)
        if self.worker_memory != 0:
            check_range(self, "worker_memory", at_least=0.25, at_most=10**6)
        if not 0 <= self.slice_index < self.slice_count:
            raise ConfigError(f"slice is {self.slice_index}/{self.slice_count}; use 0/n to (n-1)/n")

    @property
    def num_workers(self) -> int:
        """Processes to start."""
        return self.workers or usable_cpus()

    @property
    def worker_bytes(self) -> int:
        """Bound of the memory of a worker; 0 for none."""
        return int(self.worker_memory * 10**9)
