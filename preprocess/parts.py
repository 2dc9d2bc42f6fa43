"""How finished members go from a worker to the driver, which never touches their bytes.

The worker lays them out as they will stand in the tar, in a file that lives in memory only, and
sends its descriptor. The driver has the kernel copy it behind what the shard holds already. So one
driver feeds many workers, and nothing is left over however a process ends.
"""

import ctypes
import mmap
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from strata.errors import FaultKind
from strata.preprocess.shards import BLOCK, tar_header

__all__ = [
    "Heartbeat",
    "Part",
    "PartPacker",
    "Refused",
    "RefusedError",
    "Rejected",
    "Sent",
    "WorkerFailure",
    "receive",
]

_MOST_BUFFERS = 512
"""To one `writev`; Linux takes 1024."""


@dataclass(frozen=True)
class Part:
    """Some finished members of the sample under way, as they stand in a tar."""

    members: tuple[tuple[str, int, int], ...]
    """Name, offset of the content from the part's start, and size of the content."""
    num_bytes: int
    """All of it, headers and padding too."""
    num_frames: int | None
    """Of the whole sample, where this is its last part."""
    notes: tuple[str, ...] = ()
    """What is remarkable about the video, with the last part."""


@dataclass(frozen=True)
class Rejected:
    """The video cannot be used; parts sent before are void."""

    kind: FaultKind
    detail: str


@dataclass(frozen=True)
class WorkerFailure:
    """The program itself is at fault, not the video."""

    trace: str


@dataclass(frozen=True)
class Refused:
    """The system takes no more bytes (a limit of file size, memory); as `errno` says."""

    errno: int


class RefusedError(Exception):
    """A worker cannot keep the bytes of a part; holds the system's error number."""


class Sent:
    """A part that has arrived; its bytes wait in memory until it is closed.

    Args:
        part: What it is.
        descriptor: Of the bytes; owned from now on.
    """

    def __init__(self, part: Part, descriptor: int) -> None:
        self.part = part
        self.descriptor = descriptor

    def close(self) -> None:
        """Give the memory back."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Heartbeat:
    """When a worker last got on, by `time.monotonic`: it writes, the driver reads.

    It lives in memory without a file, so that neither /dev/shm nor a temporary folder is needed,
    which may be read-only, full or missing.
    """

    def __init__(self) -> None:
        descriptor = os.memfd_create("strata-heartbeat")
        os.ftruncate(descriptor, ctypes.sizeof(ctypes.c_double))
        self._attach(descriptor)
        self.value = time.monotonic()

    def _attach(self, descriptor: int) -> None:
        # The mapping keeps a descriptor of its own.
        self._memory = mmap.mmap(descriptor, ctypes.sizeof(ctypes.c_double))
        self._descriptor = descriptor
        self._value = ctypes.c_double.from_buffer(self._memory)
        weakref.finalize(self, os.close, descriptor)

    @property
    def value(self) -> float:
        """Seconds."""
        return self._value.value

    @value.setter
    def value(self, seconds: float) -> None:
        self._value.value = seconds

    def __getstate__(self) -> object:
        """Hand the memory to a process that is being started."""
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, state: Any) -> None:
        """Take the memory in the new process."""
        self._attach(state.detach())


class PartPacker:
    """Collects the members of one sample and sends them.

    Args:
        connection: To the driver.
        key: Of the sample.
    """

    def __init__(self, connection: Connection, key: str) -> None:
        self._connection = connection
        self._key = key
        self._buffers: list[bytes] = []
        self._members: list[tuple[str, int, int]] = []
        self._num_bytes = 0
        self._owes_answer = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        return not self._members

    def add(self, ext: str, content: bytes) -> None:
        """Append a member."""
        name = f"{self._key}.{ext}"
        header = tar_header(name, len(content))
        padding = bytes(-len(content) % BLOCK)
        self._members.append((name, self._num_bytes + len(header), len(content)))
        self._buffers += [header, content, padding]
        self._num_bytes += len(header) + len(content) + len(padding)

    def send(self, num_frames: int | None = None, notes: tuple[str, ...] = ()) -> None:
        """Send what was added.

        Of one sample at most one part waits unread: sending another first waits for the driver's
        word that it has taken the one before. So a long video does not fill the memory while a
        slower one, which comes before it in the shard, is being done.

        Args:
            num_frames: Of the whole sample, if this is its last part.
            notes: What is remarkable about the video, with the last part.
        """
        if self._owes_answer:
            self._connection.recv()
        part = Part(tuple(self._members), self._num_bytes, num_frames, notes)
        descriptor = os.memfd_create("strata-part")
        try:
            try:
                _write_all(descriptor, self._buffers)
            except OSError as error:
                raise RefusedError(error.errno) from error
            self._connection.send(part)
            reduction.send_handle(self._connection, descriptor, None)
        finally:
            os.close(descriptor)
        self._buffers, self._members, self._num_bytes = [], [], 0
        self._owes_answer = num_frames is None


def _write_all(descriptor: int, buffers: Sequence[bytes]) -> None:
    left = [memoryview(b) for b in buffers if b]
    while left:
        written = os.writev(descriptor, left[:_MOST_BUFFERS])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def receive(connection: Connection) -> Sent | Rejected | Refused | WorkerFailure:
    """Take a worker's next message, and its bytes with it.

    Raises:
        EOFError: The worker is gone.
    """
    try:
        message = connection.recv()
        if not isinstance(message, Part):
            return message
        sent = Sent(message, reduction.recv_handle(connection))
        if message.num_frames is None:
            connection.send(None)
    except (ConnectionResetError, BrokenPipeError) as error:
        raise EOFError from error
    return sent
