"""Prefetch batches in a thread; raise its errors and stop when a batch is late."""

import faulthandler
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from strata.errors import StallError

__all__ = ["Prefetcher"]

ItemT = TypeVar("ItemT")
_POLL_S = 0.1


class _End:
    """Marks the end of the source."""


class Prefetcher(Generic[ItemT]):
    """Runs an iterator in a thread and queues its items.

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
        self._thread.start()

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

    def __iter__(self) -> "Prefetcher[ItemT]":
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
