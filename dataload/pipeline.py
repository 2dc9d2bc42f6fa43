"""The DALI graph: a pure function of coded strips and parameters. The only importer of nvidia.dali.

One strip a sample is decoded once, all views are cut from it, and each view of the whole batch is
augmented in one graph: crop, resize and mirror in a single pass, colour as one 3x3 matrix, blur.
Views leave as uint8 with channels last, which is the memory order that 3D convolutions like best
and a quarter of the bytes of float32; the model's first operation normalises them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from torch import Tensor

from strata.dataload.augment import ViewParameters
from strata.logs import get_logger

__all__ = ["BLUR_RADIUS_SIGMAS", "ClipPipeline", "GraphSpec", "ViewSlice", "blur_window"]

logger = get_logger(__name__)

BLUR_RADIUS_SIGMAS = 3.0
"""The Gaussian is cut off at this many standard deviations."""
_NO_BLUR_SIGMA = 0.5
"""With a window of one pixel any sigma is the identity; DALI asks for one above 0."""


@dataclass(frozen=True)
class ViewSlice:
    """Which of a strip's frames are a view: `start`, `start + step`, ... `num_frames` of them."""

    start: int
    num_frames: int
    step: int = 1


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """The static shape of a graph."""

    batch_size: int
    """Strips decoded together."""
    strip_frames: int
    """Frames in each strip."""
    height: int
    """Rows of a stored frame."""
    width: int
    """Columns of a stored frame."""
    size: int
    """Rows and columns of a view."""
    views: tuple[ViewSlice, ...]
    photometric: bool
    """Whether colour and blur are part of the graph; evaluation leaves them out."""
    decode: Literal["cpu", "gpu"]
    augment: Literal["cpu", "gpu"]
    device_id: int | None
    """CUDA device, or None for a graph on the CPU alone."""
    num_threads: int


def blur_window(sigma: np.ndarray) -> np.ndarray:
    """Pixels of the Gaussian's window for each sigma; 1, the identity, where sigma is 0.

    Returns:
        int32, odd.
    """
    radius = np.ceil(BLUR_RADIUS_SIGMAS * sigma)
    return (2 * radius + 1).astype(np.int32)


def _view(frames: Any, view: int, spec: GraphSpec) -> Any:
    """Cut one view out of the strip's frames and augment it."""
    cut = spec.views[view]
    stop = cut.start + (cut.num_frames - 1) * cut.step + 1
    # A strided slice along frames is a gather; sequence_rearrange does it without resampling.
    clip: Any = fn.sequence_rearrange(frames, new_order=list(range(cut.start, stop, cut.step)))
    clip = fn.resize(
        clip,
        size=[spec.size, spec.size],
        # A region that runs backwards is a mirror image: no pass of its own for the flip.
        roi_start=fn.external_source(name=f"roi_start_{view}"),
        roi_end=fn.external_source(name=f"roi_end_{view}"),
        interp_type=types.DALIInterpType.INTERP_LINEAR,
        antialias=True,
    )
    if spec.photometric:
        clip = fn.color_twist(
            clip,
            brightness=fn.external_source(name=f"brightness_{view}"),
            contrast=fn.external_source(name=f"contrast_{view}"),
            saturation=fn.external_source(name=f"saturation_{view}"),
            hue=fn.external_source(name=f"hue_{view}"),
        )
        clip = fn.gaussian_blur(
            clip,
            sigma=fn.external_source(name=f"sigma_{view}"),
            window_size=fn.external_source(name=f"window_{view}"),
        )
    return clip


class ClipPipeline:
    """Decodes a batch of strips and augments every view of it.

    Args:
        spec: The graph's static shape.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._pipe: Any = self._build()

    def _build(self) -> Any:
        spec = self.spec

        @pipeline_def
        def graph() -> tuple[Any, ...]:
            strips = fn.external_source(name="strip")
            pictures = fn.decoders.image(
                strips,
                device="mixed" if spec.decode == "gpu" else "cpu",
                output_type=types.DALIImageType.RGB,
            )
            frames = fn.reshape(
                pictures,
                shape=[spec.strip_frames, spec.height, spec.width, 3],
                layout="FHWC",
            )
            if spec.augment == "gpu" and spec.decode == "cpu":
                frames = frames.gpu()
            return tuple(_view(frames, v, spec) for v in range(len(spec.views)))

        pipe = graph(
            batch_size=spec.batch_size,
            num_threads=spec.num_threads,
            device_id=spec.device_id,
            prefetch_queue_depth=1,
            # Several ranks on a node would pin their threads to the same cores.
            set_affinity=False,
        )
        pipe.build()
        return pipe

    def run(self, strips: Sequence[np.ndarray], views: Sequence[ViewParameters]) -> list[Tensor]:
        """Decode and augment one batch.

        Args:
            strips: `batch_size` tall JPEGs, uint8.
            views: The parameters of each view, `batch_size` long.

        Returns:
            For each view, uint8 `[batch_size, frames, size, size, 3]`, on the device that augments.

        Raises:
            RuntimeError: A strip did not decode.
        """
        pipe = self._pipe
        pipe.feed_input("strip", list(strips))
        for number, view in enumerate(views):
            self._feed_view(number, view)
        outputs = pipe.run()
        return [self._to_torch(out, cut) for out, cut in zip(outputs, self.spec.views, strict=True)]

    def _feed_view(self, number: int, view: ViewParameters) -> None:
        feed = self._pipe.feed_input
        top, left, bottom, right = view.box.T
        start = np.stack([top, np.where(view.flip, right, left)], axis=1)
        end = np.stack([bottom, np.where(view.flip, left, right)], axis=1)
        feed(f"roi_start_{number}", np.ascontiguousarray(start, np.float32))
        feed(f"roi_end_{number}", np.ascontiguousarray(end, np.float32))
        if self.spec.photometric:
            feed(f"brightness_{number}", view.brightness)
            feed(f"contrast_{number}", view.contrast)
            feed(f"saturation_{number}", view.saturation)
            feed(f"hue_{number}", view.hue_degrees)
            feed(f"sigma_{number}", np.where(view.sigma > 0, view.sigma, _NO_BLUR_SIGMA))
            feed(f"window_{number}", blur_window(view.sigma))

    def _to_torch(self, output: Any, cut: ViewSlice) -> Tensor:
        spec = self.spec
        shape = (spec.batch_size, cut.num_frames, spec.size, spec.size, 3)
        if spec.augment == "gpu":
            tensor = torch.empty(shape, dtype=torch.uint8, device=f"cuda:{spec.device_id}")
            stream = torch.cuda.current_stream(tensor.device)
            feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)
            return tensor
        # DALI reuses its buffer, so the batch is copied once.
        return torch.from_numpy(np.array(output.as_tensor(), copy=True).reshape(shape))

    def close(self) -> None:
        """Free the graph's buffers and threads."""
        self._pipe = None
