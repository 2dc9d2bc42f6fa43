"""The DALI graphs of a rank: built for the views of a batch, and run on its coded frames."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from strata import launch
from strata.dataload.augment import ViewParameters
from strata.dataload.config import DataConfig
from strata.dataload.decode_windows import CodedWindows, choose_decoder
from strata.dataload.faults import SampleFaultError
from strata.dataload.pipeline import ClipPipeline, GraphSpec, ViewSlice, find_undecodable
from strata.dataload.reader import ShardReader
from strata.errors import ConfigError
from strata.format.schema import Payload
from strata.limits import usable_cpus

__all__ = ["GraphMaker"]

_CODED: dict[Payload, Literal["strip", "video", "frames"]] = {
    "jpeg": "strip",
    "mp4": "video",
    "foreign": "frames",
}


class GraphMaker:
    """Builds and runs the DALI graphs of a rank; holds the settings that they share.

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
        self.augment: Literal["cpu", "gpu"] = "gpu" if on_gpu and config.augment != "cpu" else "cpu"
        self.cached = config.cache != "none"
        if self.augment == "cpu" or self.cached:
            self.decode = "cpu"
        self.decode = choose_decoder(reader, config.decode, device, self.decode)
        self.device = device
        self.size = config.size
        self.colour_maps = config.views.per_frame or config.views.gray > 0
        self.threads = config.threads or max(1, usable_cpus() // launch.ranks_of_node())

    def build(
        self, *, batch_size: int, strip_frames: int, views: Sequence[ViewSlice], photometric: bool
    ) -> ClipPipeline:
        """Build a graph; `strip_frames` are the frames of each sample's window."""
        form = self.reader.manifest.form
        return ClipPipeline(
            GraphSpec(
                batch_size=batch_size,
                strip_frames=strip_frames,
                coded="frames" if self.cached else _CODED[form.payload],
                frames_on=self.augment if self.cached else "cpu",
                height=form.height,
                width=form.width,
                size=self.size,
                views=tuple(views),
                photometric=photometric,
                colour_maps=self.colour_maps,
                decode=self.decode,
                augment=self.augment,
                device_id=self.device.index if self.device.type == "cuda" else None,
                num_threads=self.threads,
            )
        )

    def run(
        self,
        pipeline: ClipPipeline,
        samples: Sequence[int],
        windows: CodedWindows,
        views: Sequence[ViewParameters],
    ) -> list[Tensor]:
        """Run a graph; if it fails, raise an error with the faulty samples."""
        try:
            made = pipeline.run(windows.coded, views, windows.places)
            return [v.to(self.device, non_blocking=True) for v in made]
        except RuntimeError as error:
            if pipeline.spec.coded == "frames" or isinstance(windows.coded, Tensor):
                raise  # Cached frames were decoded before, so no sample is at fault.
            found = find_undecodable(pipeline.spec, windows.coded, views, windows.places)
            if not found:
                raise
            raise SampleFaultError(
                [self.reader.fault(samples[place], why) for place, why in found]
            ) from error
