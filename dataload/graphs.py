"""The pipelines of a rank: opened for the views of a batch, and run on its coded frames."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from strata import launch
from strata.dataload.augment import ViewParameters
from strata.dataload.config import DataConfig
from strata.dataload.cpu_pipeline import CpuPipeline
from strata.dataload.decode_windows import CodedWindows, choose_decoder
from strata.dataload.faults import SampleFaultError, UndecodableError
from strata.dataload.graph_spec import GraphSpec, ViewSlice
from strata.dataload.reader import ShardReader
from strata.errors import ConfigError
from strata.format.schema import Payload
from strata.limits import usable_cpus

if TYPE_CHECKING:
    from strata.dataload.pipeline import GpuPipeline

__all__ = ["GraphMaker", "Pipeline", "one_ahead", "pipeline_class"]

Pipeline: TypeAlias = "CpuPipeline | GpuPipeline"
ItemT = TypeVar("ItemT")

_CODED: dict[Payload, Literal["strip", "video", "frames"]] = {
    "jpeg": "strip",
    "mp4": "video",
    "foreign": "frames",
}


def one_ahead(begun: Iterator[Callable[[], ItemT]]) -> Iterator[ItemT]:
    """Finish each item after the next one has begun, so that threads always have work."""
    finish: Callable[[], ItemT] | None = None
    for coming in begun:
        if finish is not None:
            yield finish()
        finish = coming
    if finish is not None:
        yield finish()


def pipeline_class(augment: Literal["cpu", "gpu"]) -> "type[CpuPipeline] | type[GpuPipeline]":
    """The pipeline for the device that augments.

    Raises:
        ConfigError: It is the GPU, and DALI is missing.
    """
    if augment == "cpu":
        return CpuPipeline
    # Here, since a CPU does not need DALI.
    from strata.dataload.pipeline import GpuPipeline

    return GpuPipeline


class GraphMaker:
    """Opens and runs the pipelines of a rank; holds the settings that they share.

    Args:
        reader: The data set.
        config: Where to decode and augment, and the size of views.
        device: Where views go.

    Raises:
        ConfigError: The device does not support a setting.
    """

    def __init__(self, reader: ShardReader, config: DataConfig, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        for name in ("decode", "augment"):
            if getattr(config, name) == "gpu" and not on_gpu:
                raise ConfigError(
                    f"data.{name} is gpu, but this rank has no GPU; use data.{name} auto or cpu"
                )
        if config.cache == "device" and not on_gpu:
            raise ConfigError(
                "data.cache is device, but this rank has no GPU; use data.cache host or none"
            )
        self.reader = reader
        self.decode: Literal["cpu", "gpu"] = "gpu" if on_gpu and config.decode != "cpu" else "cpu"
        augments_on_gpu = config.augments_on(device).type == "cuda"
        self.augment: Literal["cpu", "gpu"] = "gpu" if augments_on_gpu else "cpu"
        self._pipeline = pipeline_class(self.augment)
        self.cached = config.cache != "none"
        if self.augment == "cpu" or self.cached:
            self.decode = "cpu"
        self.decode = choose_decoder(reader, config.decode, device, self.decode)
        self.device = device
        self.size = config.size
        self.colour_maps = config.views.per_frame or config.views.gray > 0
        self.threads = config.threads or max(1, usable_cpus() // launch.ranks_of_node())

    def build(
        self,
        *,
        batch_size: int,
        strip_frames: int,
        views: Sequence[ViewSlice],
        joined: int,
        photometric: bool,
    ) -> Pipeline:
        """Open a pipeline; `GraphSpec` describes the arguments."""
        form = self.reader.manifest.form
        return self._pipeline(
            GraphSpec(
                batch_size=batch_size,
                strip_frames=strip_frames,
                coded="frames" if self.cached else _CODED[form.payload],
                frames_on=self.augment if self.cached else "cpu",
                height=form.height,
                width=form.width,
                size=self.size,
                views=tuple(views),
                joined=joined,
                photometric=photometric,
                colour_maps=self.colour_maps,
                decode=self.decode,
                augment=self.augment,
                device_id=self.device.index if self.device.type == "cuda" else None,
                num_threads=self.threads,
            )
        )

    def start(
        self,
        pipeline: Pipeline,
        samples: Sequence[int],
        windows: CodedWindows,
        views: Sequence[ViewParameters],
    ) -> Callable[[], list[Tensor]]:
        """Start a batch.

        Returns:
            A function that waits for the batch and returns it on the device. It raises
            `SampleFaultError` with the samples that do not decode.
        """
        finish = pipeline.start(windows.coded, views, windows.places)

        def on_device() -> list[Tensor]:
            try:
                return [v.to(self.device, non_blocking=True) for v in finish()]
            except UndecodableError as error:
                raise SampleFaultError(
                    [self.reader.fault(samples[place], why) for place, why in error.faults]
                ) from error

        return on_device
