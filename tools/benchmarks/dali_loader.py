"""A loader to compare with: DALI alone, its webdataset reader and its random operators.

Written as a careful user of DALI would do it: the reader maps the shards and shuffles, only the
rows of the strip between the window's first and last frame are decoded, and every random number is
drawn in the graph. Coded frames are not cut out, as no operator of DALI can do that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from torch import Tensor

from strata.dataload.augment import BLUR_RADIUS_SIGMAS, AugmentSpec
from strata.dataload.clips import ClipSpec
from strata.format.schema import FRAMES_EXT, INDEX_SUFFIX, NormalForm, segment_ext

__all__ = ["DaliPeer"]

_AHEAD = 2
_FRAMES_AT, _SEGMENT_AT = 2, 6
"""Where `frames.i32` has the number of frames of the video and of a segment."""
_NO_BLUR_SIGMA = 0.5


class DaliPeer:
    """An endless DALI pipeline over a shard folder with jpeg payload.

    Args:
        shards: The tars; their indices are beside them.
        form: The normal form.
        batch_size: Samples in a batch.
        threads: Threads of the pipeline.
        views: The recipe of augmentation.
        clips: The window and its views.
        size: Rows and columns of a view.
        device: Where pictures are decoded and augmented.
    """

    name = "dali"
    granularity = 1
    ahead = _AHEAD + 1
    pids: tuple[int, ...] = ()

    def __init__(
        self,
        shards: Sequence[Path],
        form: NormalForm,
        *,
        batch_size: int,
        threads: int,
        views: AugmentSpec,
        clips: ClipSpec,
        size: int,
        device: Literal["cpu", "gpu"] = "cpu",
    ) -> None:
        self._shapes = [
            (batch_size, frames, size, size, 3)
            for frames in (clips.clip_frames, clips.clip_frames, clips.long_frames)
        ]
        self._device = device

        @pipeline_def
        def graph() -> tuple[Any, ...]:
            members: Any = fn.readers.webdataset(
                paths=[str(s) for s in shards],
                index_paths=[str(s.with_suffix(INDEX_SUFFIX)) for s in shards],
                ext=[segment_ext(0), FRAMES_EXT],
                dtypes=[types.DALIDataType.UINT8, types.DALIDataType.INT32],
                random_shuffle=True,
                initial_fill=64,
                seed=1,
                name="reader",
            )
            coded, table = members
            first, order, span = _window(table, clips)
            rows = fn.decoders.image_slice(
                coded,
                start=fn.stack(first * form.height),
                shape=fn.stack(span * form.height),
                axes=[0],
                device="mixed" if device == "gpu" else "cpu",
                output_type=types.DALIImageType.RGB,
            )
            strip = fn.reshape(rows, shape=[-1, form.height, form.width, 3], layout="FHWC")
            frames: Any = fn.sequence_rearrange(strip, new_order=order)
            half, whole = clips.clip_frames, clips.window_frames
            cuts = (range(half), range(half, whole), range(0, whole, clips.long_stride))
            return tuple(_augment(frames, cut, views, size) for cut in cuts)

        self._pipe: Any = graph(
            batch_size=batch_size,
            num_threads=threads,
            device_id=0 if device == "gpu" else None,
            prefetch_queue_depth=_AHEAD,
        )
        self._pipe.build()

    def next(self) -> tuple[Tensor, ...]:
        """Two short clips and the long sequence, each uint8 `[b, T, S, S, 3]`."""
        outputs = self._pipe.run()
        return tuple(map(self._to_torch, outputs, self._shapes))

    def _to_torch(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        if self._device == "gpu":
            tensor = torch.empty(shape, dtype=torch.uint8, device="cuda:0")
            feed_ndarray(
                output.as_tensor(), tensor, cuda_stream=torch.cuda.current_stream(tensor.device)
            )
            return tensor
        return torch.from_numpy(np.array(output.as_tensor(), copy=True).reshape(shape))

    def close(self) -> None:
        """Free the pipeline."""
        self._pipe = None


def _window(table: Any, clips: ClipSpec) -> tuple[Any, Any, Any]:
    """First frame, order of frames from there, and their span, by method.md 1.2 in DALI."""
    frames = fn.cast(
        dali_math.min(table[_FRAMES_AT], table[_SEGMENT_AT]), dtype=types.DALIDataType.FLOAT
    )
    most = dali_math.min(frames / clips.window_frames, clips.max_stride)
    stride = 1.0 + fn.random.uniform(range=[0.0, 1.0]) * (most - 1.0)
    room = dali_math.floor(frames - clips.window_frames * stride)
    first = dali_math.min(dali_math.floor(fn.random.uniform(range=[0.0, 1.0]) * (room + 1.0)), room)
    points: Any = types.Constant(np.arange(clips.window_frames, dtype=np.float32)) * stride
    order = _to_int(dali_math.min(points + 0.5, frames - 1.0 - first))
    return _to_int(first), order, order[-1] + 1


def _to_int(value: Any) -> Any:
    return fn.cast(value, dtype=types.DALIDataType.INT32)


def _augment(frames: Any, cut: range, spec: AugmentSpec, size: int) -> Any:
    def factor(strength: float) -> Any:
        return fn.random.uniform(range=[1.0 - strength, 1.0 + strength])

    clip: Any = fn.sequence_rearrange(frames, new_order=list(cut))
    clip = fn.random_resized_crop(
        clip,
        size=[size, size],
        random_area=list(spec.crop_area),
        random_aspect_ratio=list(spec.crop_aspect),
        antialias=True,
    )
    clip = fn.flip(clip, horizontal=fn.random.coin_flip(probability=spec.flip))
    turn = 360.0 * spec.hue
    clip = fn.color_twist(
        clip,
        brightness=factor(spec.brightness),
        contrast=factor(spec.contrast),
        saturation=factor(spec.saturation),
        hue=fn.random.uniform(range=[-turn, turn]),
    )
    blurred = fn.cast(fn.random.coin_flip(probability=spec.blur), dtype=types.DALIDataType.FLOAT)
    sigma = fn.random.uniform(range=list(spec.blur_sigma))
    # A window of one pixel is the identity, so that clips without blur cost little.
    radius = _to_int(BLUR_RADIUS_SIGMAS * sigma + 1.0)
    window = 2 * radius * _to_int(blurred) + 1
    return fn.gaussian_blur(
        clip, sigma=blurred * sigma + (1.0 - blurred) * _NO_BLUR_SIGMA, window_size=window
    )
