"""Loaders to compare with: webdataset with PyAV, PIL or torchvision in a torch DataLoader.

Written as a careful user would do it: only the window's frames are converted (and, where the
payload allows it, decoded), decoding starts at the key frame before the window, augmentation works
on uint8, workers have one thread each, and batches are made in the workers. Spawned workers import
this file, so nothing here imports DALI.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from webdataset.compat import WebDataset

from strata.dataload.augment import AugmentSpec
from strata.dataload.clips import ClipSpec, training_window
from strata.format.schema import FRAMES_EXT, FrameTable, segment_ext
from strata.format.strip_jpeg import assemble_strip

__all__ = ["DECODERS", "PaperTransform", "TorchPeer", "decode_mp4", "decode_pil", "decode_torch"]

_SHUFFLE_BUFFER = 64
_PREFETCH = 2

Sample = dict[str, Any]
Decoder = Callable[[Sample, np.ndarray], Tensor]


class PaperTransform:
    """The `paper` recipe in torchvision v2: one random draw for all frames of a clip.

    Args:
        spec: Ranges of the recipe.
        size: Rows and columns of a view.
    """

    def __init__(self, spec: AugmentSpec, size: int) -> None:
        self._spec = spec
        self._geometry = v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, scale=spec.crop_area, ratio=spec.crop_aspect, antialias=True
                ),
                v2.RandomHorizontalFlip(spec.flip),
                v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue),
            ]
        )

    def __call__(self, clip: Tensor) -> Tensor:
        """Augment a clip.

        Args:
            clip: uint8 `[T, 3, H, W]`.

        Returns:
            uint8 `[T, 3, size, size]`.
        """
        # Measured: 81 ms a sample against 92 with the decoder's channels last.
        clip = self._geometry(clip.contiguous())
        if float(torch.rand(())) < self._spec.blur:
            sigma = float(torch.empty(()).uniform_(*self._spec.blur_sigma))
            # The window that the sigma needs, not one for the widest: up to six times less work.
            window = 2 * math.ceil(3 * sigma) + 1
            clip = v2.functional.gaussian_blur(clip, [window, window], [sigma, sigma])
        return clip.contiguous()


def decode_mp4(sample: Sample, window: np.ndarray) -> Tensor:
    """Frames of the first mp4 member by PyAV, from the key frame before the window on."""
    wanted, first = np.unique(window), int(window[0])
    found: list[np.ndarray] = []
    # One converter for all frames: `frame.to_ndarray(format=...)` would set one up for each.
    converter = VideoReformatter()
    with av.open(io.BytesIO(sample[segment_ext(0, "mp4")]), "r") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        rate, base = stream.average_rate, stream.time_base
        if rate is None or base is None:
            raise ValueError("the mp4 has no constant rate")
        ticks = 1 / (rate * base)
        if first:
            container.seek(int(first * ticks), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and round(frame.pts / ticks) == wanted[len(found)]:
                found.append(converter.reformat(frame, format="rgb24").to_ndarray())
                if len(found) == len(wanted):
                    break
    frames = np.stack(found)[np.searchsorted(wanted, window)]
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _strip(sample: Sample, window: np.ndarray) -> np.ndarray:
    """The window's frames as one JPEG, cut out as Strata does it."""
    table = FrameTable.from_bytes(sample[FRAMES_EXT])
    return assemble_strip([sample[segment_ext(0)]], table, window)


def decode_pil(sample: Sample, window: np.ndarray) -> Tensor:
    """The window's frames by PIL."""
    with Image.open(io.BytesIO(_strip(sample, window).tobytes())) as picture:
        rows = np.asarray(picture.convert("RGB"))
    frames = rows.reshape(len(window), -1, rows.shape[1], 3)
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)


def decode_torch(sample: Sample, window: np.ndarray) -> Tensor:
    """The window's frames by torchvision."""
    coded = torch.from_numpy(_strip(sample, window))
    rows: Any = decode_jpeg(coded, ImageReadMode.RGB)
    return rows.unflatten(1, (len(window), -1)).permute(1, 0, 2, 3)


def decode_completely(sample: Sample, window: np.ndarray) -> Tensor:
    """The window's frames by torchvision, which decodes the complete strip."""
    height = FrameTable.from_bytes(sample[FRAMES_EXT]).height
    coded = torch.frombuffer(bytearray(sample[segment_ext(0)]), dtype=torch.uint8)
    rows: Any = decode_jpeg(coded, ImageReadMode.RGB)
    return rows.unflatten(1, (-1, height)).permute(1, 0, 2, 3)[torch.from_numpy(window)]


DECODERS: dict[str, Decoder] = {
    "mp4-pyav": decode_mp4,
    "jpeg-pil": decode_pil,
    "jpeg-torchvision": decode_torch,
    "jpeg-complete": decode_completely,
}
"""By the peer's name; the part before the dash is the payload."""


def draw_window(sample: Sample, clips: ClipSpec) -> np.ndarray:
    """A window at a random place and stride, `[W]`, from torch's generator of this worker."""
    table = FrameTable.from_bytes(sample[FRAMES_EXT])
    frames = min(table.num_frames, table.frames_per_segment)
    draws = torch.rand(1, 2, dtype=torch.float64).numpy()
    return training_window(np.array([frames]), clips, draws)[0]


def cut_views(frames: Tensor, clips: ClipSpec) -> tuple[Tensor, ...]:
    """The two short clips and the long sequence of a window's frames `[W, 3, H, W]`."""
    half = clips.clip_frames
    return frames[:half], frames[half:], frames[:: clips.long_stride]


def _make(
    sample: Sample, decode: Decoder, clips: ClipSpec, transform: PaperTransform
) -> tuple[Tensor, ...]:
    views = cut_views(decode(sample, draw_window(sample, clips)), clips)
    return tuple(transform(view) for view in views)


def _collate(samples: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(view) for view in zip(*samples, strict=True))


class TorchPeer:
    """webdataset in an endless torch DataLoader.

    Args:
        name: One of `DECODERS`.
        shards: The tars of a shard folder of that payload.
        batch_size: Samples in a batch.
        workers: Processes, each with one thread.
        views: The recipe of augmentation.
        clips: The window and its views.
        size: Rows and columns of a view.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Path],
        *,
        batch_size: int,
        workers: int,
        views: AugmentSpec,
        clips: ClipSpec,
        size: int,
    ) -> None:
        self.name = name
        self.ahead = workers * _PREFETCH + workers
        self.granularity = workers
        make = partial(
            _make, decode=DECODERS[name], clips=clips, transform=PaperTransform(views, size)
        )
        dataset: Any = WebDataset(
            [str(s) for s in shards], shardshuffle=len(shards), empty_check=False, seed=0
        )
        dataset = dataset.repeat().shuffle(_SHUFFLE_BUFFER).map(make)
        dataset = dataset.batched(batch_size, collation_fn=_collate, partial=False)
        self._loader: Any = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            # DALI's threads are in this process: forking it would not be safe.
            multiprocessing_context="spawn",
        )
        self._batches: Iterator[tuple[Tensor, ...]] = iter(self._loader)

    def next(self) -> tuple[Tensor, ...]:
        """Two short clips and the long sequence, each uint8 `[b, T, 3, S, S]`."""
        return next(self._batches)

    @property
    def pids(self) -> list[int]:
        """The workers' processes."""
        workers: Any = getattr(self._batches, "_workers", [])
        return [w.pid for w in workers if w.pid is not None]

    def close(self) -> None:
        """End the workers."""
        shut_down: Any = getattr(self._batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
