"""The DALI graphs: decoding alone, and decoding with the views on a GPU.

This is the only module that imports nvidia.dali, and it is imported only where DALI is needed: on a
GPU, and for videos. A graph is a pure function of coded samples and
parameters. A sample's window is decoded once and all views are cut from it. On a GPU each view of
the complete batch is augmented in the same graph: crop, resize and mirror, colour as one affine
map, blur. On a CPU DALI decodes videos (`VideoDecoder`); strips and views are not its task there
(`strata.dataload.cpu_pipeline`).
Views are uint8 with channels last, which is the fastest memory order for 3D convolutions and a
quarter of the bytes of float32; the model's first operation normalises them.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.dataload.augment import ViewParameters, blur_window, colour_transforms
from strata.dataload.faults import UndecodableError
from strata.dataload.graph_spec import GraphSpec, ViewSlice
from strata.errors import ConfigError
from strata.logs import get_logger

try:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def
    from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
except ImportError as error:
    raise ConfigError(
        f"NVIDIA DALI cannot be imported ({error}); install strata-video[cuda13], [cuda12], or "
        "[cpu] for a machine without a GPU (docs/usage.md, Installation)"
    ) from error

__all__ = [
    "GpuPipeline",
    "VideoDecoder",
    "video_decoder_fault",
]

logger = get_logger(__name__)

_NO_BLUR_SIGMA = 0.5
"""Sigma for a window of one pixel, where any is the identity; DALI needs one above 0."""
_BUILDING = threading.Lock()
"""Held while a graph is defined, which DALI does in state that all threads share."""


def _input(name: str, view: int) -> Any:
    return fn.external_source(name=f"{name}_{view}")


def _colour(clip: Any, view: int, maps: bool) -> Any:
    """Mix colours: by one twist for a clip, or by an affine map for each of its frames."""
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


def _view(frames: Any, view: int, spec: GraphSpec) -> Any:
    """Cut one view out of the window's frames and augment it."""
    cut = spec.views[view].frames
    # sequence_rearrange takes a strided slice along frames without resampling.
    order = list(range(cut.start, cut.stop, cut.step))
    clip: Any = fn.sequence_rearrange(frames, new_order=order)
    # A real crop: with a region of the frame, the resize would use pixels around it.
    clip = fn.slice(
        clip,
        start=_input("crop_start", view),
        shape=_input("crop_shape", view),
        axis_names="HW",
    )
    clip = fn.resize(
        clip,
        size=[spec.size, spec.size],
        # A region with exchanged ends is a mirror image, so the flip needs no extra pass.
        roi_start=_input("roi_start", view),
        roi_end=_input("roi_end", view),
        interp_type=types.DALIInterpType.INTERP_LINEAR,
        antialias=True,
    )
    if not spec.photometric:
        return clip
    clip = _colour(clip, view, spec.colour_maps)
    return fn.gaussian_blur(clip, sigma=_input("sigma", view), window_size=_input("window", view))


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


def _feed_coded(pipe: Any, coded: Any, places: Sequence[np.ndarray]) -> None:
    """Feed the samples of a batch; `places` only for videos."""
    pipe.feed_input("coded", coded)
    if places:
        pairs = [np.unique(p, return_inverse=True) for p in places]
        pipe.feed_input("seen", [seen.astype(np.int32) for seen, _ in pairs])
        pipe.feed_input("order", [order.astype(np.int32) for _, order in pairs])


def video_decoder_fault(video: np.ndarray, device_id: int) -> str | None:
    """The reason why this GPU cannot decode a video; None if it can.

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


class VideoDecoder:
    """Decodes one window of a video after another on the CPU, in the thread that calls it.

    Args:
        spec: The windows.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self._spec = dataclasses.replace(spec, decode="cpu")
        self._pipe: Any = None
        self._shown: Any = None

    def _build(self) -> Any:
        spec = self._spec

        @pipeline_def
        def graph() -> Any:
            return _frames(spec)

        with _BUILDING:
            pipe: Any = graph(
                batch_size=1,
                num_threads=1,
                device_id=None,
                prefetch_queue_depth=1,
                # The calling thread waits for the result anyway.
                exec_async=False,
                exec_pipelined=False,
                set_affinity=False,
            )
            pipe.build()
        return pipe

    def decode(self, coded: np.ndarray, places: np.ndarray | None) -> np.ndarray:
        """Decode a window.

        Args:
            coded: A video, uint8.
            places: Numbers of the window's frames, `[T]`, not decreasing.

        Returns:
            Shape `[T, height, width, 3]`, uint8, in DALI's memory: valid until the next call.

        Raises:
            UndecodableError: It does not decode.
        """
        if self._pipe is None:
            self._pipe = self._build()
        _feed_coded(self._pipe, [coded], [] if places is None else [places])
        try:
            (self._shown,) = self._pipe.run()
        except RuntimeError as error:
            self._pipe = None  # A graph cannot be used after an error.
            raise UndecodableError([(0, _reason(error))]) from error
        return np.asarray(self._shown[0])


class GpuPipeline:
    """A DALI graph that decodes a batch of windows and augments its views on a GPU.

    With `augment` cpu it runs DALI's CPU versions of the same operators. They are slow; tests use
    them where there is no GPU.

    Args:
        spec: What is made of a batch.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._pipe: Any = self._build()

    def _build(self) -> Any:
        spec = self.spec

        @pipeline_def
        def graph() -> tuple[Any, ...]:
            frames = _frames(spec)
            if spec.augment == "gpu" and "gpu" not in (spec.decode, spec.frames_on):
                frames = frames.gpu()
            return tuple(_view(frames, v, spec) for v in range(len(spec.views)))

        with _BUILDING:
            pipe: Any = graph(
                batch_size=spec.batch_size,
                num_threads=spec.num_threads,
                device_id=spec.device_id,
                prefetch_queue_depth=1,
                # With affinity, several ranks on a node would pin their threads to the same cores.
                set_affinity=False,
            )
            pipe.build()
        return pipe

    def start(
        self,
        coded: Sequence[np.ndarray] | Tensor,
        views: Sequence[ViewParameters],
        places: Sequence[np.ndarray] = (),
    ) -> Callable[[], list[Tensor]]:
        """Prepare a batch; the graph runs when the batch is asked for.

        Args:
            coded: `batch_size` tall JPEGs, videos or decoded frames, uint8; frames on a GPU as one
                tensor `[batch_size, strip_frames, height, width, 3]`.
            views: The parameters of each view, each of length `batch_size`.
            places: For videos, the numbers of the window's frames, `[strip_frames]`, not
                decreasing.

        Returns:
            A function that returns the batch: tensors of `GraphSpec.shapes`, on the device that
            augments. It raises `UndecodableError` if samples do not decode.
        """

        def finish() -> list[Tensor]:
            try:
                return self._run(coded, views, places)
            except RuntimeError as error:
                if self.spec.coded == "frames" or isinstance(coded, Tensor):
                    raise  # Frames were decoded before, so no sample is at fault.
                found = _find_undecodable(self.spec, coded, views, places)
                if not found:
                    raise
                raise UndecodableError(found) from error

        return finish

    def _run(
        self,
        coded: Sequence[np.ndarray] | Tensor,
        views: Sequence[ViewParameters],
        places: Sequence[np.ndarray],
    ) -> list[Tensor]:
        if self._pipe is None:
            self._pipe = self._build()
        pipe = self._pipe
        _feed_coded(pipe, coded if isinstance(coded, Tensor) else list(coded), places)
        for number, view in enumerate(views):
            self._feed_view(number, view)
        try:
            outputs = pipe.run()
        except RuntimeError:
            self._pipe = None  # A graph cannot be used after an error.
            raise
        made = [self._to_torch(out, cut) for out, cut in zip(outputs, self.spec.views, strict=True)]
        joined = self.spec.joined
        return [torch.stack(made[:joined], dim=1), *made[joined:]]

    def _feed_view(self, number: int, view: ViewParameters) -> None:
        top, left, bottom, right = view.box.T
        height, width, zero = bottom - top, right - left, np.zeros_like(top)
        start = np.stack([zero, np.where(view.flip, width, zero)], axis=1)
        end = np.stack([height, np.where(view.flip, zero, width)], axis=1)
        inputs: dict[str, np.ndarray] = {
            "crop_start": np.stack([top, left], axis=1).astype(np.int32),
            "crop_shape": np.stack([height, width], axis=1).astype(np.int32),
            "roi_start": np.ascontiguousarray(start, np.float32),
            "roi_end": np.ascontiguousarray(end, np.float32),
        }
        if self.spec.photometric:
            inputs |= self._photometric_inputs(view, self.spec.views[number].num_frames)
        for name, value in inputs.items():
            self._pipe.feed_input(f"{name}_{number}", value)

    def _photometric_inputs(self, view: ViewParameters, num_frames: int) -> dict[str, np.ndarray]:
        inputs: dict[str, np.ndarray] = {
            "sigma": np.where(view.sigma > 0, view.sigma, _NO_BLUR_SIGMA),
            "window": blur_window(view.sigma),
        }
        if self.spec.colour_maps:
            maps = colour_transforms(view)
            maps = np.broadcast_to(maps, (len(maps), num_frames, 3, 4))
            return inputs | {"colour": np.ascontiguousarray(maps)}
        for name in ("brightness", "contrast", "saturation"):
            inputs[name] = np.ascontiguousarray(getattr(view, name)[:, 0])
        return inputs | {"hue": np.ascontiguousarray(view.hue_degrees[:, 0])}

    def _to_torch(self, output: Any, cut: ViewSlice) -> Tensor:
        spec = self.spec
        shape = (spec.batch_size, cut.num_frames, spec.size, spec.size, 3)
        if spec.augment == "cpu":
            return torch.from_numpy(np.array(output.as_tensor(), copy=True).reshape(shape))
        tensor = torch.empty(shape, dtype=torch.uint8, device=f"cuda:{spec.device_id}")
        stream = torch.cuda.current_stream(tensor.device)
        feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)
        return tensor

    def close(self) -> None:
        """Free the graph's buffers and threads."""
        self._pipe = None


def _find_undecodable(
    spec: GraphSpec,
    coded: Sequence[np.ndarray],
    views: Sequence[ViewParameters],
    places: Sequence[np.ndarray],
) -> list[tuple[int, str]]:
    """Find the faulty samples of a failed batch by running the graph on each one alone.

    Args:
        spec: The batch's graph.
        coded: As in `GpuPipeline.start`, like the next two.
        views: The parameters.
        places: The frames of videos.

    Returns:
        Positions in the batch, with the decoder's error.
    """
    faults = []
    alone = GpuPipeline(dataclasses.replace(spec, batch_size=1))
    for place in range(len(coded)):
        one = slice(place, place + 1)
        try:
            alone._run(coded[one], [_rows(view, one) for view in views], places[one])
        except RuntimeError as error:
            faults.append((place, _reason(error)))
    alone.close()
    return faults


def _rows(view: ViewParameters, rows: slice) -> ViewParameters:
    return ViewParameters(**{name: values[rows] for name, values in vars(view).items()})


def _reason(error: RuntimeError) -> str:
    """DALI's message on the cause, in one line, without its stack."""
    return str(error).partition("Stacktrace")[0].strip()
