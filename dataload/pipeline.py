"""The DALI graph, a pure function of coded samples and parameters; alone imports nvidia.dali.

A sample's window is decoded once, all views are cut from it, and each view of the whole batch is
augmented in one graph: crop, resize and mirror in a single pass, colour as one affine map, blur.
Views leave as uint8 with channels last, which is the memory order that 3D convolutions like best
and a quarter of the bytes of float32; the model's first operation normalises them.

Colour and blur have two forms. A GPU takes the operators made for them. DALI's CPU versions of
those spend most of a sample's time (docs/log.md), its `filter` does not: so on the CPU a pixel's
colours become rows of an image that a filter of one column mixes, and the Gaussian is two filters.
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
"""The Gaussian is cut off at this many standard deviations."""
_NO_BLUR_SIGMA = 0.5
"""With a window of one pixel any sigma is the identity; DALI asks for one above 0."""
_WHITE = 255.0
CPU_VIDEO_CODECS = ("vp9", "mjpeg")
"""Of the codecs that shards have, those that DALI decodes without a GPU."""


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
    """Samples decoded together."""
    strip_frames: int
    """Frames of each sample's window."""
    coded: Literal["strip", "video", "frames"] = "strip"
    """Whether a sample is a tall JPEG, a video, or frames that are decoded already."""
    frames_on: Literal["cpu", "gpu"] = "cpu"
    """Where frames that are decoded already are given; on a GPU it is that which augments."""
    height: int
    """Rows of a stored frame."""
    width: int
    """Columns of a stored frame."""
    size: int
    """Rows and columns of a view."""
    views: tuple[ViewSlice, ...]
    photometric: bool
    """Whether colour and blur are part of the graph; evaluation leaves them out."""
    colour_maps: bool = False
    """Whether colour has gray or differs between frames, so that a GPU needs an affine map a frame
    instead of one twist a clip."""
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


def blur_taps(sigma: np.ndarray) -> list[np.ndarray]:
    """The Gaussian on the pixel grid for each sigma, summing to 1; `[1.]` where sigma is 0."""
    taps = []
    for window, width in zip(blur_window(sigma).tolist(), sigma.tolist(), strict=True):
        places = np.arange(window) - window // 2
        weight = np.exp(-0.5 * np.square(places / (width or 1.0)))
        taps.append((weight / weight.sum()).astype(np.float32))
    return taps


def _input(name: str, view: int) -> Any:
    return fn.external_source(name=f"{name}_{view}")


def _colour_by_filter(clip: Any, view: int, num_frames: int, size: int) -> Any:
    """Mix colours on the CPU: R, G, B and white as four rows, and a column of weights a channel."""
    planes: Any = fn.crop_mirror_normalize(
        clip,
        dtype=types.DALIDataType.UINT8,
        output_layout="FCHW",
        pad_output=True,
        # The policy decides that the fourth channel is filled with this and not with zero.
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
    """The Gaussian as a row and a column, for those samples that have it."""
    taps = _input("taps", view)
    # DALI turns this into a split of the batch: what is not blurred is not touched.
    if _input("blurred", view):
        across = fn.filter(clip, fn.expand_dims(taps, axes=0))
        clip = fn.filter(across, fn.expand_dims(taps, axes=1))
    return clip


def _colour_by_operator(clip: Any, view: int, maps: bool) -> Any:
    """Mix colours by the operators made for it."""
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
    """Colour and blur on the device that augments."""
    if spec.augment == "cpu":
        clip = _colour_by_filter(clip, view, spec.views[view].num_frames, spec.size)
        return _blur_by_filter(clip, view)
    clip = _colour_by_operator(clip, view, spec.colour_maps)
    return fn.gaussian_blur(clip, sigma=_input("sigma", view), window_size=_input("window", view))


def _view(frames: Any, view: int, spec: GraphSpec) -> Any:
    """Cut one view out of the window's frames and augment it."""
    cut = spec.views[view]
    stop = cut.start + (cut.num_frames - 1) * cut.step + 1
    # A strided slice along frames is a gather; sequence_rearrange does it without resampling.
    clip: Any = fn.sequence_rearrange(frames, new_order=list(range(cut.start, stop, cut.step)))
    clip = fn.resize(
        clip,
        size=[spec.size, spec.size],
        # A region that runs backwards is a mirror image: no pass of its own for the flip.
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
    # Each frame is asked for once and in order, since the decoder begins again to go back.
    seen = fn.decoders.video(coded, device=device, frames=fn.external_source(name="seen"))
    window: Any = fn.sequence_rearrange(seen, new_order=fn.external_source(name="order"))
    return fn.reshape(window, shape=shape, layout="FHWC")


def video_decoder_fault(video: np.ndarray, device_id: int) -> str | None:
    """Why this GPU does not decode a video, or None where it does.

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
    """Remove the Python files that DALI has translated a graph to, now that it is built.

    DALI leaves them in the temporary folder until the process exits by itself, so a signal leaves
    them for good.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file"):
            for path in (module.__file__, module.__cached__):
                if path is not None:
                    Path(path).unlink(missing_ok=True)


class ClipPipeline:
    """Decodes a batch of windows and augments every view of it.

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
                # Several ranks on a node would pin their threads to the same cores.
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
            views: The parameters of each view, `batch_size` long.
            places: For videos, which frames of each are the window, `[strip_frames]`, not
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
                # The offset is what white is weighted with.
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
    """Which samples of a failed batch are at fault, found by running the graph on each alone.

    Args:
        spec: The batch's graph.
        coded: As in `ClipPipeline.run`, like the next two.
        views: The parameters.
        places: The frames of videos.

    Returns:
        Places in the batch with what the decoder said of them.
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
