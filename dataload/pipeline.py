"""The DALI graph that decodes and augments; the only module that imports nvidia.dali.

The graph is a pure function of coded samples and parameters. A sample's window is decoded once, all
views are cut from it, and each view of the complete batch is augmented in one graph: crop, resize
and mirror in a single pass, colour as one affine map, blur. Views are uint8 with channels last,
which is the fastest memory order for 3D convolutions and a quarter of the bytes of float32; the
model's first operation normalises them.

Colour and blur have two implementations. A GPU uses DALI's operators for them. Their CPU versions
would take most of a sample's time (docs/log.md), while `filter` is fast: so on the CPU the colours
of a pixel become rows of an image that a filter of one column mixes, and the blur is two filters.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from torch import Tensor

from strata.dataload.augment import ViewParameters, colour_transforms
from strata.logs import get_logger

__all__ = [
    "BLUR_RADIUS_SIGMAS",
    "CPU_VIDEO_CODECS",
    "ClipPipeline",
    "GraphSpec",
    "ViewSlice",
    "blur_taps",
    "blur_window",
    "find_undecodable",
    "video_decoder_fault",
]

logger = get_logger(__name__)

BLUR_RADIUS_SIGMAS = 3.0
"""Number of standard deviations at which the Gaussian is truncated."""
_NO_BLUR_SIGMA = 0.5
"""Sigma for a window of one pixel, where any is the identity; DALI needs one above 0."""
_WHITE = 255.0
CPU_VIDEO_CODECS = ("vp9", "mjpeg")
"""Codecs of shards that DALI decodes without a GPU."""


@dataclass(frozen=True)
class ViewSlice:
    """The frames of a strip that are a view: `num_frames` from `start` at distance `step`."""

    start: int
    num_frames: int
    step: int = 1


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """The static shape of a graph."""

    batch_size: int
    """Samples decoded together."""
    strip_frames: int
    """Frames of each sample's window."""
    coded: Literal["strip", "video", "frames"] = "strip"
    """Whether a sample is a tall JPEG, a video, or decoded frames."""
    frames_on: Literal["cpu", "gpu"] = "cpu"
    """Device of decoded frames at the input; if a GPU, the one that augments."""
    height: int
    """Rows of a stored frame."""
    width: int
    """Columns of a stored frame."""
    size: int
    """Rows and columns of a view."""
    views: tuple[ViewSlice, ...]
    photometric: bool
    """Whether the graph has colour and blur; in evaluation it does not."""
    colour_maps: bool = False
    """Whether colour has gray or differs between frames, so that a GPU needs an affine map per
    frame instead of one colour twist per clip."""
    decode: Literal["cpu", "gpu"]
    augment: Literal["cpu", "gpu"]
    device_id: int | None
    """CUDA device, or None for a graph on the CPU only."""
    num_threads: int


def blur_window(sigma: np.ndarray) -> np.ndarray:
    """Width of the Gaussian's window in pixels for each sigma; 1, the identity, for sigma 0.

    Returns:
        int32, odd.
    """
    radius = np.ceil(BLUR_RADIUS_SIGMAS * sigma)
    return (2 * radius + 1).astype(np.int32)


def blur_taps(sigma: np.ndarray) -> list[np.ndarray]:
    """Gaussian weights on the pixel grid for each sigma, summing to 1; `[1.]` for sigma 0."""
    taps = []
    for window, width in zip(blur_window(sigma).tolist(), sigma.tolist(), strict=True):
        places = np.arange(window) - window // 2
        weight = np.exp(-0.5 * np.square(places / (width or 1.0)))
        taps.append((weight / weight.sum()).astype(np.float32))
    return taps


def _input(name: str, view: int) -> Any:
    return fn.external_source(name=f"{name}_{view}")


def _colour_by_filter(clip: Any, view: int, num_frames: int, size: int) -> Any:
    """Mix colours on the CPU by a filter: R, G, B and white as rows, weights as columns."""
    planes: Any = fn.crop_mirror_normalize(
        clip,
        dtype=types.DALIDataType.UINT8,
        output_layout="FCHW",
        pad_output=True,
        # With this policy the fourth channel is filled with this value and not with zero.
        fill_values=_WHITE,
        out_of_bounds_policy="pad",
    )
    rows = fn.reshape(planes, shape=[num_frames, 4, size * size, 1], layout="FHWC")
    weights = _input("colour", view)
    mixed = [
        fn.filter(rows, fn.per_frame(weights[:, channel]), mode="valid") for channel in range(3)
    ]
    joined = fn.reshape(fn.cat(*mixed, axis=1), shape=[num_frames, 3, size, size], layout="FCHW")
    return fn.crop_mirror_normalize(joined, dtype=types.DALIDataType.UINT8, output_layout="FHWC")


def _blur_by_filter(clip: Any, view: int) -> Any:
    """Blur by a row filter and a column filter, only the samples that have blur."""
    taps = _input("taps", view)
    # DALI splits the batch here, so samples without blur are unchanged.
    if _input("blurred", view):
        across = fn.filter(clip, fn.expand_dims(taps, axes=0))
        clip = fn.filter(across, fn.expand_dims(taps, axes=1))
    return clip


def _colour_by_operator(clip: Any, view: int, maps: bool) -> Any:
    """Mix colours by DALI's colour operators."""
    if maps:
        each = fn.per_frame(_input("colour", view))
        return fn.coord_transform(clip, MT=each, dtype=types.DALIDataType.UINT8)
    return fn.color_twist(
        clip,
        brightness=_input("brightness", view),
        contrast=_input("contrast", view),
        saturation=_input("saturation", view),
        hue=_input("hue", view),
    )


def _photometric(clip: Any, view: int, spec: GraphSpec) -> Any:
    """Apply colour and blur on the device that augments."""
    if spec.augment == "cpu":
        clip = _colour_by_filter(clip, view, spec.views[view].num_frames, spec.size)
        return _blur_by_filter(clip, view)
    clip = _colour_by_operator(clip, view, spec.colour_maps)
    return fn.gaussian_blur(clip, sigma=_input("sigma", view), window_size=_input("window", view))


def _view(frames: Any, view: int, spec: GraphSpec) -> Any:
    """Cut one view out of the window's frames and augment it."""
    cut = spec.views[view]
    stop = cut.start + (cut.num_frames - 1) * cut.step + 1
    # sequence_rearrange takes a strided slice along frames without resampling.
    clip: Any = fn.sequence_rearrange(frames, new_order=list(range(cut.start, stop, cut.step)))
    clip = fn.resize(
        clip,
        size=[spec.size, spec.size],
        # A region with exchanged ends is a mirror image, so the flip needs no extra pass.
        roi_start=_input("roi_start", view),
        roi_end=_input("roi_end", view),
        interp_type=types.DALIInterpType.INTERP_LINEAR,
        antialias=True,
    )
    return _photometric(clip, view, spec) if spec.photometric else clip


def _frames(spec: GraphSpec) -> Any:
    """Decode the window of every sample: `[frames, height, width, 3]`, uint8."""
    if spec.coded == "frames":
        return fn.external_source(name="coded", device=spec.frames_on, layout="FHWC")
    coded = fn.external_source(name="coded")
    device = "mixed" if spec.decode == "gpu" else "cpu"
    shape = [spec.strip_frames, spec.height, spec.width, 3]
    if spec.coded == "strip":
        pictures = fn.decoders.image(coded, device=device, output_type=types.DALIImageType.RGB)
        return fn.reshape(pictures, shape=shape, layout="FHWC")
    # Each frame is requested once and in order, since the decoder restarts to go back.
    seen = fn.decoders.video(coded, device=device, frames=fn.external_source(name="seen"))
    window: Any = fn.sequence_rearrange(seen, new_order=fn.external_source(name="order"))
    return fn.reshape(window, shape=shape, layout="FHWC")


def video_decoder_fault(video: np.ndarray, device_id: int) -> str | None:
    """Why this GPU cannot decode a video; None if it can.

    Args:
        video: Shape `[B]`, uint8: a file of the kind to decode.
        device_id: CUDA device.
    """

    @pipeline_def
    def graph() -> Any:
        return fn.decoders.video(fn.external_source(name="coded"), device="mixed", frames=[0])

    try:
        pipe: Any = graph(batch_size=1, num_threads=1, device_id=device_id, set_affinity=False)
        pipe.build()
        pipe.feed_input("coded", [video])
        pipe.run()
    except RuntimeError as error:
        return _reason(error)
    return None


def _remove_generated_sources() -> None:
    """Remove the Python files that DALI generated from a graph, once it is built.

    DALI removes them from the temporary folder only at a normal exit, so after a signal they would
    remain.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file"):
            for path in (module.__file__, module.__cached__):
                if path is not None:
                    Path(path).unlink(missing_ok=True)


class ClipPipeline:
    """A built DALI graph that decodes a batch of windows and augments its views.

    Args:
        spec: The graph's static shape.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._pipe: Any = self._build()

    def _build(self) -> Any:
        spec = self.spec

        @pipeline_def(enable_conditionals=True)
        def graph() -> tuple[Any, ...]:
            frames = _frames(spec)
            if spec.augment == "gpu" and "gpu" not in (spec.decode, spec.frames_on):
                frames = frames.gpu()
            return tuple(_view(frames, v, spec) for v in range(len(spec.views)))

        try:
            pipe = graph(
                batch_size=spec.batch_size,
                num_threads=spec.num_threads,
                device_id=spec.device_id,
                prefetch_queue_depth=1,
                # With affinity, several ranks on a node would pin their threads to the same cores.
                set_affinity=False,
            )
            pipe.build()
        finally:
            _remove_generated_sources()
        return pipe

    def run(
        self,
        coded: Sequence[np.ndarray] | Tensor,
        views: Sequence[ViewParameters],
        places: Sequence[np.ndarray] = (),
    ) -> list[Tensor]:
        """Decode and augment one batch.

        Args:
            coded: `batch_size` tall JPEGs, videos or decoded frames, uint8; frames on a GPU as one
                tensor `[batch_size, strip_frames, height, width, 3]`.
            views: The parameters of each view, each of length `batch_size`.
            places: For videos, the numbers of the window's frames, `[strip_frames]`, not
                decreasing.

        Returns:
            For each view, uint8 `[batch_size, frames, size, size, 3]`, on the device that augments.

        Raises:
            RuntimeError: A sample did not decode.
        """
        pipe = self._pipe
        pipe.feed_input("coded", coded if isinstance(coded, Tensor) else list(coded))
        if self.spec.coded == "video":
            pairs = [np.unique(p, return_inverse=True) for p in places]
            pipe.feed_input("seen", [seen.astype(np.int32) for seen, _ in pairs])
            pipe.feed_input("order", [order.astype(np.int32) for _, order in pairs])
        for number, view in enumerate(views):
            self._feed_view(number, view)
        outputs = pipe.run()
        return [self._to_torch(out, cut) for out, cut in zip(outputs, self.spec.views, strict=True)]

    def _feed_view(self, number: int, view: ViewParameters) -> None:
        top, left, bottom, right = view.box.T
        start = np.stack([top, np.where(view.flip, right, left)], axis=1)
        end = np.stack([bottom, np.where(view.flip, left, right)], axis=1)
        inputs: dict[str, Any] = {
            "roi_start": np.ascontiguousarray(start, np.float32),
            "roi_end": np.ascontiguousarray(end, np.float32),
        }
        if self.spec.photometric:
            inputs |= self._photometric_inputs(view, self.spec.views[number].num_frames)
        for name, value in inputs.items():
            self._pipe.feed_input(f"{name}_{number}", value)

    def _photometric_inputs(self, view: ViewParameters, num_frames: int) -> dict[str, Any]:
        spec = self.spec
        inputs: dict[str, Any] = {}
        if spec.augment == "cpu" or spec.colour_maps:
            maps = colour_transforms(view)
            maps = np.broadcast_to(maps, (len(maps), num_frames, 3, 4))
            if spec.augment == "cpu":
                # The offset is the weight of white.
                maps = (maps / np.array([1, 1, 1, _WHITE], np.float32))[..., None]
            inputs["colour"] = np.ascontiguousarray(maps)
        else:
            for name in ("brightness", "contrast", "saturation"):
                inputs[name] = np.ascontiguousarray(getattr(view, name)[:, 0])
            inputs["hue"] = np.ascontiguousarray(view.hue_degrees[:, 0])
        if spec.augment == "cpu":
            inputs["taps"] = blur_taps(view.sigma)
            inputs["blurred"] = [np.array(sigma > 0) for sigma in view.sigma]
        else:
            inputs["sigma"] = np.where(view.sigma > 0, view.sigma, _NO_BLUR_SIGMA)
            inputs["window"] = blur_window(view.sigma)
        return inputs

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


def find_undecodable(
    spec: GraphSpec,
    coded: Sequence[np.ndarray],
    views: Sequence[ViewParameters],
    places: Sequence[np.ndarray] = (),
) -> list[tuple[int, str]]:
    """Find the faulty samples of a failed batch by running the graph on each one alone.

    Args:
        spec: The batch's graph.
        coded: As in `ClipPipeline.run`, like the next two.
        views: The parameters.
        places: The frames of videos.

    Returns:
        Positions in the batch, with the decoder's error.
    """
    faults = []
    alone: ClipPipeline | None = None
    for place in range(len(coded)):
        one = slice(place, place + 1)
        if alone is None:
            alone = ClipPipeline(dataclasses.replace(spec, batch_size=1))
        try:
            alone.run(coded[one], [_rows(view, one) for view in views], places[one])
        except RuntimeError as error:
            faults.append((place, _reason(error)))
            alone.close()  # A graph cannot be used after an error.
            alone = None
    if alone is not None:
        alone.close()
    return faults


def _rows(view: ViewParameters, rows: slice) -> ViewParameters:
    return ViewParameters(**{name: values[rows] for name, values in vars(view).items()})


def _reason(error: RuntimeError) -> str:
    """What DALI says of the cause, in one line, without its stack."""
    return str(error).partition("Stacktrace")[0].strip()
