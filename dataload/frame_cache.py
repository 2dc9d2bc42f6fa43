"""A cache of decoded frames in memory: from the second epoch on nothing is read or decoded.

libjpeg's smooth upsampling of chroma uses pixels of adjacent frames of a window, so the first and
last row of a frame depend on the window. Where a GPU augments, the cache stores the planes of a
JPEG: one of luma and two of chroma at half the size (4:2:0), 1.5 bytes per pixel; the GPU converts
each window to RGB. A CPU would take longer for that than to decode. Where it augments, the cache
stores each frame's RGB pixels, 3 bytes per pixel, and luma and chroma of its first and last row,
from which these two are made for each window. The conversion uses libjpeg's integer arithmetic. So
a window from the cache is bit-identical to that of the CPU's decoder, for any selection of frames,
and so are the batches.

A video is decoded completely at its first use: after one epoch all used videos are in the cache.
"""

import io
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from strata.dataload.decode_windows import CodedWindows
from strata.dataload.faults import Fault, SampleFaultError
from strata.dataload.reader import ShardReader
from strata.distributed import barrier, gather_objects
from strata.errors import ConfigError, WorldError
from strata.format.schema import NormalForm
from strata.limits import available_memory

__all__ = ["CacheChoice", "FrameCache", "cache_bytes", "decode_planes", "to_rgb"]

CacheChoice = Literal["none", "host", "device"]

_SHARES = {"host": 0.9, "device": 0.8}
"""Share of the free memory at start that the cache may use; activations need the rest."""
_FRAMES_AT_A_TIME = 64
"""Number of frames decoded together while the cache is filled."""
_ROWS_AT_A_TIME = 1024
"""Rows that a CPU converts at a time, so that intermediate results fit its cache."""
_SAMPLES_AT_A_TIME = 16
"""Samples that a GPU converts at a time, which bounds the memory of intermediate results."""
_GIGABYTE = 1e9


def _bytes_per_frame(form: NormalForm, device: torch.device) -> int:
    pixels = form.height * form.width
    return pixels * 3 // 2 if device.type == "cuda" else pixels * 3 + _edge_bytes(form)


def _edge_bytes(form: NormalForm) -> int:
    """Bytes of luma and chroma of a frame's first and last row."""
    return 4 * form.width


def cache_bytes(reader: ShardReader, device: torch.device) -> int:
    """Bytes that the cache needs for all frames of a data set.

    Args:
        reader: The data set.
        device: The device that augments.
    """
    return int(reader.num_frames.sum()) * _bytes_per_frame(reader.manifest.form, device)


def decode_planes(strip: np.ndarray, form: NormalForm) -> np.ndarray:
    """Decode a strip to the planes of its frames, without upsampling chroma.

    This takes two passes of libjpeg: luma as a gray image, and at half the size the stored chroma
    (with a luma that is not used).

    Args:
        strip: A tall JPEG of F frames.
        form: The frames' size.

    Returns:
        Shape `[F, height * width * 3 / 2]`, uint8: luma, blue and red chroma of each frame.

    Raises:
        OSError: The strip does not decode. SyntaxError and ValueError mean the same.
    """
    coded = strip.tobytes()
    with Image.open(io.BytesIO(coded)) as picture:
        picture.draft("L", picture.size)
        luma = np.asarray(picture)
    with Image.open(io.BytesIO(coded)) as picture:
        picture.draft("YCbCr", (picture.width // 2, picture.height // 2))
        chroma = np.asarray(picture)[..., 1:]
    count = len(luma) // form.height
    luma, chroma = luma.reshape(count, -1), chroma.reshape(count, -1, 2)
    return np.concatenate([luma, chroma[..., 0], chroma[..., 1]], axis=1)


def to_rgb(luma: Any, chroma: Any, out: Any, rows: int) -> None:
    """Upsample chroma and convert to RGB as libjpeg does (h2v2_fancy_upsample, ycc_rgb_convert).

    An upsampled pixel is 9/16 of its own chroma sample, 3/16 of the nearer neighbour in each
    direction and 1/16 of the diagonal one; conversion uses 16 fractional bits. It uses only
    operators that numpy and torch share, so that it runs on the host and on a GPU.

    Args:
        luma: Shape `[N, R, W]`, uint8: the frames of a window, stacked vertically.
        chroma: Shape `[N, 2, R / 2, W / 2]`, uint8: blue and red.
        out: Shape `[N, R, W, 3]`, uint8; receives the result.
        rows: Rows converted at a time, even.
    """
    num, height, width = luma.shape
    empty: Any = np.empty if isinstance(luma, np.ndarray) else _empty_like(luma)
    # Repeated at the border, which has no neighbour.
    near = empty((num, 2, height // 2 + 2, width // 2 + 2), "int16")
    near[:, :, 1:-1, 1:-1] = chroma
    near[:, :, 0], near[:, :, -1] = near[:, :, 1], near[:, :, -2]
    near[..., 0], near[..., -1] = near[..., 1], near[..., -2]
    for top in range(0, height, rows):
        count = min(rows, height - top)
        block = near[:, :, top // 2 : (top + count) // 2 + 2]
        tall = empty((num, 2, count // 2, 2, width // 2 + 2), "int16")
        own = block[:, :, 1:-1] * 3
        tall[:, :, :, 0] = own + block[:, :, :-2]
        tall[:, :, :, 1] = own + block[:, :, 2:]
        tall = tall.reshape(num, 2, count, width // 2 + 2)
        wide = empty((num, 2, count, width // 2, 2), "int16")
        own = tall[..., 1:-1] * 3
        wide[..., 0] = (own + tall[..., :-2] + 8) >> 4
        wide[..., 1] = (own + tall[..., 2:] + 7) >> 4
        wide = wide.reshape(num, 2, count, width)
        wide -= 128
        light = empty((num, count, width), "int16")
        light[...] = luma[:, top : top + count]
        blue, red, green = (empty((num, count, width), "int32") for _ in range(3))
        blue[...], red[...] = wide[:, 0], wide[:, 1]
        green[...] = -22554 * blue - 46802 * red
        red *= 91881
        blue *= 116130
        for channel, offset in enumerate((red, green, blue)):
            offset += 32768
            offset >>= 16
            offset += light
            out[:, top : top + count, :, channel] = offset.clip(0, 255)


def _empty_like(tensor: Tensor) -> Any:
    def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=tensor.device)

    return empty


class FrameCache:
    """Cache of the frames of a set, in host memory shared by a node's ranks or on this GPU.

    Args:
        reader: The set, of the jpeg payload.
        choice: Where frames are stored.
        device: Device of the windows; a GPU gets them as one tensor.
        threads: Threads that decode and convert on the CPU.

    Raises:
        ConfigError: The set does not fit, or has another payload.
        WorldError: The shared memory of another rank of this node cannot be opened.
    """

    def __init__(
        self,
        reader: ShardReader,
        choice: Literal["host", "device"],
        device: torch.device,
        threads: int,
    ) -> None:
        form = reader.manifest.form
        if form.payload != "jpeg":
            raise ConfigError(
                f"data.cache keeps frames of the jpeg payload, {reader.location} is "
                f"{form.payload}; use data.cache none, or shard again with --payload jpeg"
            )
        self._reader, self._form, self._device = reader, form, device
        _check_room(reader, choice, device)
        self._first = np.concatenate([[0], np.cumsum(reader.num_frames)]).astype(np.int64)
        shape = (int(self._first[-1]), _bytes_per_frame(form, device))
        self._frames: Any
        self._filled: Any
        if choice == "device":
            self._frames = torch.empty(shape, dtype=torch.uint8, device=device)
            self._filled = np.zeros(reader.num_samples, np.uint8)
        else:
            shared = np.frombuffer(_share(shape[0] * shape[1] + reader.num_samples), np.uint8)
            self._frames = shared[: shape[0] * shape[1]].reshape(shape)
            self._filled = shared[shape[0] * shape[1] :]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="strata-cache")

    def missing(self, samples: np.ndarray) -> np.ndarray:
        """Those of `samples` that are not in the cache yet, in their order."""
        return samples[self._filled[samples] == 0]

    def windows(
        self, samples: np.ndarray, windows: Sequence[np.ndarray] | np.ndarray
    ) -> CodedWindows:
        """The chosen frames of several samples; missing samples are decoded first.

        Args:
            samples: N sample indices.
            windows: Frame indices of each, `[T]`, the same T.

        Returns:
            The windows, with the numbers of frames decoded and bytes read to fill the cache.

        Raises:
            SampleFaultError: Samples cannot be read or decoded; the message names them all.
        """
        missing = np.unique(self.missing(samples)).tolist()
        faults: list[Fault] = []
        num_bytes = 0
        # The thread's default stream is that of training: copies would wait behind its steps.
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        for found in self._pool.map(partial(self._fill, stream=stream), missing):
            if isinstance(found, SampleFaultError):
                faults += found.faults
            else:
                num_bytes += found
        if faults:
            raise SampleFaultError(faults)
        places = self._first[samples, None] + np.asarray(windows)
        return CodedWindows(
            self._convert_on_gpu(places)
            if self._device.type == "cuda"
            else list(self._pool.map(self._window, places)),
            [],
            int(self._reader.num_frames[missing].sum()),
            num_bytes,
        )

    def _fill(self, sample: int, stream: torch.cuda.Stream | None) -> int | SampleFaultError:
        """Decode a complete video; return the number of coded bytes, or the fault."""
        count, start = int(self._reader.num_frames[sample]), int(self._first[sample])
        num_bytes = 0
        try:
            for low in range(0, count, _FRAMES_AT_A_TIME):
                frames = np.arange(low, min(low + _FRAMES_AT_A_TIME, count))
                strip = self._reader.strip(sample, frames)
                num_bytes += strip.size
                stored = decode_planes(strip, self._form)
                if self._device.type == "cpu":
                    stored = self._pictures(stored)
                place = slice(start + low, start + low + len(frames))
                with torch.cuda.stream(stream):
                    self._frames[place] = (
                        stored if isinstance(self._frames, np.ndarray) else torch.from_numpy(stored)
                    )
        except SampleFaultError as error:
            return error
        except (OSError, SyntaxError, ValueError) as error:
            return SampleFaultError([self._reader.fault(sample, str(error))])
        # Set last, so that no rank reads missing frames. Two ranks may write the same bytes.
        self._filled[sample] = 1
        return num_bytes

    def _split(self, planes: Any) -> tuple[Any, Any]:
        """Split N windows `[N, T, bytes]` into luma `[N, R, W]`, chroma `[N, 2, R / 2, W / 2]`."""
        form, (num, count) = self._form, planes.shape[:2]
        area = form.height * form.width
        luma = planes[..., :area].reshape(num, count * form.height, form.width)
        chroma = planes[..., area:].reshape(num, count, 2, form.height // 2, form.width // 2)
        chroma = chroma.swapaxes(1, 2)
        return luma, chroma.reshape(num, 2, count * form.height // 2, form.width // 2)

    def _pictures(self, planes: np.ndarray) -> np.ndarray:
        """What a CPU stores of frames: RGB, then luma and chroma of the first and last row."""
        form, count = self._form, len(planes)
        luma, chroma = self._split(planes[None])
        rgb = np.empty((1, count * form.height, form.width, 3), np.uint8)
        to_rgb(luma, chroma, rgb, _ROWS_AT_A_TIME)
        ends = [0, -1]
        luma = luma.reshape(count, -1, form.width)[:, ends]
        chroma = chroma.reshape(2, count, -1, form.width // 2)[:, :, ends].swapaxes(0, 1)
        return np.concatenate([each.reshape(count, -1) for each in (rgb, luma, chroma)], axis=1)

    def _window(self, places: np.ndarray) -> np.ndarray:
        """One window `[T, height, width, 3]` on the host."""
        form, count = self._form, len(places)
        stored = self._frames[places]
        edges = stored[:, -_edge_bytes(form) :]
        frames = stored[:, : -_edge_bytes(form)].reshape(count, form.height, form.width, 3)
        luma = edges[:, : 2 * form.width].reshape(count, 2, form.width)
        chroma = edges[:, 2 * form.width :].reshape(count, 2, 2, form.width // 2)
        # Pictures of four rows around each border: two of the frame above, two of the one below.
        # The window's ends have one frame, whose chroma is repeated.
        around = np.empty((count + 1, 2, 2, form.width // 2), np.uint8)
        around[1:, :, 0], around[0, :, 0] = chroma[:, :, 1], chroma[0, :, 0]
        around[:-1, :, 1], around[-1, :, 1] = chroma[:, :, 0], chroma[-1, :, 1]
        light = np.zeros((count + 1, 4, form.width), np.uint8)
        light[1:, 1], light[:-1, 2] = luma[:, 1], luma[:, 0]
        rows = np.empty((*light.shape, 3), np.uint8)
        to_rgb(light, around, rows, 4)
        frames[:, -1], frames[:, 0] = rows[1:, 1], rows[:-1, 2]
        return frames

    def _convert_on_gpu(self, places: np.ndarray) -> Tensor:
        """Convert all windows `[N, T, height, width, 3]` on the GPU."""
        form, (num, count) = self._form, places.shape
        out = torch.empty(
            (num, count * form.height, form.width, 3), dtype=torch.uint8, device=self._device
        )
        for start in range(0, num, _SAMPLES_AT_A_TIME):
            part = places[start : start + _SAMPLES_AT_A_TIME]
            luma, chroma = self._split(self._on_gpu(part))
            to_rgb(luma, chroma, out[start : start + len(part)], count * form.height)
        return out.view(num, count, form.height, form.width, 3)

    def _on_gpu(self, places: np.ndarray) -> Tensor:
        """Copy cached frames to the GPU: `[N, T, bytes]`."""
        if isinstance(self._frames, np.ndarray):
            shape = (*places.shape, self._frames.shape[1])
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            into = host.numpy()

            def gather(row: int) -> None:
                # With mode "raise" numpy would use an extra buffer.
                np.take(self._frames, places[row], axis=0, out=into[row], mode="clip")

            list(self._pool.map(gather, range(len(places))))
            return host.to(self._device, non_blocking=True)
        return self._frames[torch.from_numpy(places).to(self._device)]

    def close(self) -> None:
        """Free the memory."""
        # Does not wait: a read that hangs must not keep the process from ending.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._frames = self._filled = None


def _check_room(
    reader: ShardReader, choice: Literal["host", "device"], device: torch.device
) -> None:
    """Check that the set fits into memory.

    Raises:
        ConfigError: It does not; the message has the arithmetic.
    """
    if choice == "host":
        free, where = available_memory()
        other = "use data.cache none"
    else:
        free, where = torch.cuda.mem_get_info(device)[0], str(device)
        other = "use data.cache host or none"
    needed, share = cache_bytes(reader, device), _SHARES[choice]
    per_frame = _bytes_per_frame(reader.manifest.form, device)
    if needed > share * free:
        raise ConfigError(
            f"data.cache {choice} does not fit: {int(reader.num_frames.sum()):,} frames of "
            f"{per_frame:,} bytes are {needed / _GIGABYTE:,.2f} GB, "
            f"of the {free / _GIGABYTE:,.2f} GB that {where} has free it may use {share:.0%}, "
            f"{share * free / _GIGABYTE:,.2f} GB; {other}"
        )


def _share(num_bytes: int) -> mmap.mmap:
    """Zeroed memory that all ranks of this node share; it is freed when the last one ends.

    It has no name that could be left behind and no limit of its own, which /dev/shm has. The node's
    first rank creates it, and the others open it through /proc.
    """
    handle = os.memfd_create("strata-frames")
    try:
        os.ftruncate(handle, num_bytes)
        # The ranks must see each other's processes; containers of one machine may not.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        node = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
        every = gather_objects((node, os.getpid(), handle))
        _, pid, theirs = next(each for each in every if each[0] == node)
        if pid == os.getpid():
            mapped = mmap.mmap(handle, num_bytes)
        else:
            mapped = _open_shared(Path(f"/proc/{pid}/fd/{theirs}"), num_bytes)
        barrier()
    finally:
        os.close(handle)
    return mapped


def _open_shared(path: Path, num_bytes: int) -> mmap.mmap:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise WorldError(
            f"data.cache host: the memory of this node's first rank, {path}, cannot be opened "
            f"({error.strerror}); start all ranks as one user, or use data.cache none"
        ) from error
    try:
        return mmap.mmap(handle, num_bytes)
    finally:
        os.close(handle)
