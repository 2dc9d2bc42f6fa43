"""Make batches ahead in a thread; raise its errors and stop when a batch is late."""

import faulthandler
import queue
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from strata.errors import StallError

__all__ = ["Loader", "Prefetcher", "SideStream"]

ItemT = TypeVar("ItemT")
_POLL_S = 0.1


class _End:
    """Marks the end of the source."""


class Prefetcher(Generic[ItemT]):
    """Runs an iterator in a thread, once started, and queues its items.

    Args:
        source: The iterator; its errors are raised in the consumer.
        depth: Number of items to prefetch.
        stall_s: Seconds after which a late item is a fault: the stacks of all threads are written
            to stderr and `StallError` is raised.
    """

    def __init__(self, source: Iterator[ItemT], *, depth: int, stall_s: float) -> None:
        self._queue: queue.Queue[ItemT | BaseException | _End] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._stalled = False
        self._stall_s = stall_s
        self._thread = threading.Thread(
            target=self._produce, args=(source,), name="strata-loader", daemon=True
        )

    def start(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def _put(self, item: ItemT | BaseException | _End) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue

    def _produce(self, source: Iterator[ItemT]) -> None:
        try:
            for item in source:
                self._put(item)
                if self._stop.is_set():
                    return
            self._put(_End())
        except BaseException as error:
            self._put(error)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ItemT:
        """Wait for the next item and return it.

        Raises:
            StopIteration: The source has ended.
            StallError: No item came for `stall_s` seconds.
        """
        try:
            item = self._queue.get(timeout=self._stall_s)
        except queue.Empty:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            self._stalled = True
            raise StallError(
                f"no batch for {self._stall_s:g} s: the storage or the decoder hangs (the stacks "
                "of all threads are above); fix it, or raise data.stall_s"
            ) from None
        if isinstance(item, _End):
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    @property
    def depth(self) -> int:
        """Number of items that are ready."""
        return self._queue.qsize()

    def close(self) -> None:
        """Stop the thread and wait for it, except if it hangs."""
        self._stop.set()
        if not self._stalled:
            self._thread.join(timeout=self._stall_s)


class OnDevice(Protocol):
    """A batch whose tensors are on a device."""

    def tensors(self) -> Sequence[Tensor]:
        """Its tensors on the device."""
        ...


BatchT = TypeVar("BatchT", bound=OnDevice)
_Event = torch.cuda.Event | None


class SideStream:
    """The CUDA side stream of a GPU loader, so that its work does not queue behind training.

    Args:
        device: Where batches are made; without a GPU there is no stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def produce(self, items: Iterator[BatchT]) -> Iterator[tuple[BatchT, _Event]]:
        """Make items on the side stream, each with an event that marks its completion."""
        if self._stream is None:
            for item in items:
                yield item, None
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            for item in items:
                event = torch.cuda.Event()
                event.record(self._stream)
                yield item, event

    @staticmethod
    def hand_over(item: BatchT, event: _Event) -> BatchT:
        """Make the consumer's stream wait for the item without blocking the host."""
        if event is not None:
            current = torch.cuda.current_stream()
            current.wait_event(event)
            for tensor in item.tensors():
                tensor.record_stream(current)
        return item


class Loader(ABC, Generic[BatchT]):
    """A source of batches with a thread that makes them ahead: start it, iterate, close it.

    A context manager starts and closes it. Nothing is made before the start.

    Args:
        device: Where batches go.
        depth: Number of batches to prefetch.
        stall_s: Seconds to wait for a batch, see `Prefetcher`.
    """

    def __init__(self, device: torch.device, *, depth: int, stall_s: float) -> None:
        self._device, self._depth, self._stall_s = device, depth, stall_s
        self._prefetcher: Prefetcher[tuple[BatchT, _Event]] | None = None

    @abstractmethod
    def _batches(self) -> Iterator[BatchT]:
        """The batches, made in the loader's thread."""

    @abstractmethod
    def _free(self) -> None:
        """Free what the batches needed; the thread has ended."""

    def start(self) -> Self:
        """Start to make batches.

        Raises:
            RuntimeError: It was started before.
        """
        if self._prefetcher is not None:
            raise RuntimeError("this loader was already started; make another one")
        source = SideStream(self._device).produce(self._batches())
        prefetcher = Prefetcher(source, depth=self._depth, stall_s=self._stall_s)
        self._prefetcher = prefetcher.start()
        return self

    @property
    def _running(self) -> Prefetcher[tuple[BatchT, _Event]]:
        if self._prefetcher is None:
            raise RuntimeError("this loader makes no batches yet; call start() first")
        return self._prefetcher

    def __iter__(self) -> Iterator[BatchT]:
        """Iterate over the batches in their order."""
        for item, event in self._running:
            yield SideStream.hand_over(item, event)

    @property
    def queue_depth(self) -> int:
        """Number of batches that are ready."""
        return self._running.depth

    def close(self) -> None:
        """Stop the thread and free what the batches needed."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._free()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
