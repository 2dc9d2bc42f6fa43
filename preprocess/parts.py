"""Messages from a worker to the driver; the bytes of members pass without the driver reading them.

The worker lays members out as in the tar, in a file in memory (memfd), and sends its descriptor.
The driver has the kernel append that file to the shard. So one driver serves many workers, and no
temporary data remains, however a process ends.
"""

import ctypes
import mmap
import os
import time
import weakref
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from strata.errors import FaultKind
from strata.format.shard_tar import MemberPlace, append_members

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


@dataclass(frozen=True)
class Part:
    """Some finished members of a sample, laid out as in a tar."""

    members: tuple[MemberPlace, ...]
    num_bytes: int
    """Size of the part, with headers and padding."""
    num_frames: int | None
    """Frames of the complete sample, in its last part; None in the others."""
    notes: tuple[str, ...] = ()
    """Remarks about the video for the manifest, in the last part."""


@dataclass(frozen=True)
class Rejected:
    """The video cannot be used; the driver drops its earlier parts."""

    kind: FaultKind
    detail: str


@dataclass(frozen=True)
class WorkerFailure:
    """The worker met a bug of the program, not a fault of the video."""

    trace: str


@dataclass(frozen=True)
class Refused:
    """The system refused to store bytes (file size limit, memory); `errno` says why."""

    errno: int


class RefusedError(Exception):
    """A worker cannot store the bytes of a part; its argument is the system's error number."""


class Sent:
    """A received part; its bytes stay in memory until `close`.

    Args:
        part: Its description.
        descriptor: Of the file with the bytes; this object closes it.
    """

    def __init__(self, part: Part, descriptor: int) -> None:
        self.part = part
        self.descriptor = descriptor

    def close(self) -> None:
        """Free the memory."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Heartbeat:
    """Time of a worker's last progress, by `time.monotonic`: the worker writes, the driver reads.

    It is in anonymous memory, so neither /dev/shm nor a temporary folder is needed, which may be
    read-only, full or missing.
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
        """Pickle for a process that is being started: the descriptor of the memory."""
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, state: Any) -> None:
        """Map the same memory in the new process."""
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
        self._members: list[tuple[str, bytes]] = []
        self._owes_answer = False

    @property
    def is_empty(self) -> bool:
        """Whether no member was added since the last `send`."""
        return not self._members

    def add(self, ext: str, content: bytes) -> None:
        """Append a member."""
        self._members.append((ext, content))

    def send(self, num_frames: int | None = None, notes: tuple[str, ...] = ()) -> None:
        """Send the members that were added.

        At most one part of a sample is unread: sending the next one first waits for the driver's
        confirmation. So a long video does not fill the memory while a slower one, which comes
        before it in the shard, is being transcoded.

        Args:
            num_frames: Frames of the complete sample, if this is its last part.
            notes: Remarks about the video, with the last part.
        """
        if self._owes_answer:
            self._connection.recv()
        descriptor = os.memfd_create("strata-part")
        try:
            try:
                with open(descriptor, "wb", closefd=False) as file:
                    members = append_members(file, self._key, self._members)
            except OSError as error:
                raise RefusedError(error.errno) from error
            num_bytes = os.fstat(descriptor).st_size
            self._connection.send(Part(tuple(members), num_bytes, num_frames, notes))
            reduction.send_handle(self._connection, descriptor, None)
        finally:
            os.close(descriptor)
        self._members = []
        self._owes_answer = num_frames is None


def receive(connection: Connection) -> Sent | Rejected | Refused | WorkerFailure:
    """Receive a worker's next message, with its bytes.

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
