"""Batches on the CPU: threads take samples, decode their windows and make their views.

A sample's bits depend only on its bytes and parameters, so they are the same for any number of
threads. Views are written straight into the batch, which is pinned memory if a GPU trains on it.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from strata.dataload.augment import ViewParameters
from strata.dataload.cpu_views import ClipParameters, ViewMaker, clip_parameters
from strata.dataload.faults import UndecodableError
from strata.dataload.graph_spec import GraphSpec
from strata.dataload.strip_decoder import StripDecoder

__all__ = ["CpuPipeline", "window_decoder"]


def window_decoder(spec: GraphSpec) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
    """A function that decodes one window after another, for one thread.

    Args:
        spec: The windows.

    Returns:
        A function of a coded window and, for a video, the numbers of its frames. It returns frames
        `[T, height, width, 3]`, valid until the next call, or raises `UndecodableError`.
    """
    if spec.coded == "frames":
        return lambda coded, _: coded
    if spec.coded == "strip":
        strips = StripDecoder(spec.strip_frames, spec.height, spec.width)
        return lambda coded, _: strips.decode(coded)
    # Here, since only videos need DALI.
    from strata.dataload.pipeline import VideoDecoder

    return VideoDecoder(spec).decode


class _BatchMemory:
    """Memory of batches, used again once nobody refers to the batch.

    New memory for each batch would cost a page fault for each 4 KiB.

    Args:
        pinned: Whether copies to a GPU start from it; torch's own cache then does the same.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor, uint8, of any content."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        free = self._free.setdefault(int(np.prod(shape)), [])
        memory = free.pop() if free else np.empty(shape, np.uint8)
        # The tensor's storage holds this array, so it ends with the last tensor that shares it.
        array = memory.reshape(shape).view()
        weakref.finalize(array, free.append, memory).atexit = False
        return torch.from_numpy(array)


class _Worker:
    """The decoder and the buffers of a thread.

    Args:
        spec: What is made of a sample.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self._cuts = [cut.frames for cut in spec.views]
        self._decode = window_decoder(spec)
        self._maker = ViewMaker(spec.size)

    def make(
        self,
        coded: np.ndarray,
        places: np.ndarray | None,
        views: Sequence[ClipParameters],
        out: Sequence[np.ndarray],
    ) -> None:
        """Decode a window and write its views."""
        frames = self._decode(coded, places)
        for cut, view, target in zip(self._cuts, views, out, strict=True):
            self._maker.make(frames[cut], view, target)


class CpuPipeline:
    """Decodes and augments batches in threads.

    Args:
        spec: What is made of a batch.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._pool = ThreadPoolExecutor(spec.num_threads, "strata-views")
        self._own = threading.local()
        self._memory = _BatchMemory(pinned=spec.device_id is not None)

    def start(
        self,
        coded: Sequence[np.ndarray] | Tensor,
        views: Sequence[ViewParameters],
        places: Sequence[np.ndarray] = (),
    ) -> Callable[[], list[Tensor]]:
        """Start to make a batch; the threads take its samples after those of earlier batches.

        Args:
            coded: As in `GpuPipeline.start`, like the next two, but not on a GPU.
            views: The parameters.
            places: The frames of videos.

        Returns:
            A function that waits for the batch and returns it, as that of `GpuPipeline.start`.
        """
        spec = self.spec
        clips = [clip_parameters(view, photometric=spec.photometric) for view in views]
        batch = [self._memory.take(shape) for shape in spec.shapes]
        slots = [tensor.numpy() for tensor in batch]
        tasks = [
            self._pool.submit(
                self._make,
                np.asarray(coded[row]),
                places[row] if places else None,
                [view[row] for view in clips],
                [*slots[0][row], *(slot[row] for slot in slots[1:])],
            )
            for row in range(spec.batch_size)
        ]
        return partial(_finish, tasks, batch)

    def _make(
        self,
        coded: np.ndarray,
        places: np.ndarray | None,
        views: list[ClipParameters],
        out: list[np.ndarray],
    ) -> str | None:
        """Make a sample's views; return why it does not decode, or None."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = _Worker(self.spec)
        try:
            worker.make(coded, places, views, out)
        except UndecodableError as error:
            return error.faults[0][1]
        return None

    def close(self) -> None:
        """End the threads; their decoders and buffers end with them."""
        self._pool.shutdown(cancel_futures=True)


def _finish(tasks: Sequence[Future[str | None]], batch: list[Tensor]) -> list[Tensor]:
    """Wait for all samples of a batch.

    Raises:
        UndecodableError: Samples did not decode.
    """
    reasons = [task.result() for task in tasks]
    faults = [(row, reason) for row, reason in enumerate(reasons) if reason is not None]
    if faults:
        raise UndecodableError(faults)
    return batch
