"""Read the windows of samples for any payload, and choose the decoder of a rank."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from strata.dataload.faults import Fault, SampleFaultError
from strata.dataload.graph_spec import CPU_VIDEO_CODECS
from strata.dataload.reader import ShardReader
from strata.errors import ConfigError, ShardError, VideoFault
from strata.format.schema import segment_ext
from strata.format.source_video import decode_frames, video_ext
from strata.format.strip_mp4 import assemble_mp4
from strata.logs import get_logger, warn_once

__all__ = ["CodedWindows", "choose_decoder", "read_windows", "refuse_mixed_payloads"]

logger = get_logger(__name__)


@dataclass(frozen=True)
class CodedWindows:
    """The windows of a batch's samples as coded bytes or decoded frames.

    Args:
        coded: N tall JPEGs or mp4 files, uint8; or for foreign videos and cached frames, decoded
            frames `[T, height, width, 3]`; cached frames on a GPU are one tensor.
        places: For mp4, the numbers of the window's frames in each file, `[T]`; else empty, because
            all coded frames are the window.
        num_frames: Total number of frames that are decoded for the windows.
        num_bytes: Total number of bytes that are read for the windows.
    """

    coded: list[np.ndarray] | torch.Tensor
    places: list[np.ndarray]
    num_frames: int
    num_bytes: int


def _sizes(coded: Sequence[np.ndarray]) -> int:
    return sum(c.size for c in coded)


def read_windows(
    reader: ShardReader,
    samples: Sequence[int] | np.ndarray,
    windows: Sequence[np.ndarray] | np.ndarray,
    threads: int = 1,
) -> CodedWindows:
    """Read the chosen frames of several samples, for any payload.

    Args:
        reader: The data set.
        samples: Sample indices.
        windows: Frame indices of each, `[T]`, not decreasing; repeats allowed.
        threads: Threads that decode foreign videos; others are not decoded here.

    Raises:
        SampleFaultError: Samples cannot be read; the message names all of them.
    """
    if reader.manifest.form.payload == "jpeg":
        strips = reader.strips(samples, windows)
        return CodedWindows(strips, [], sum(len(w) for w in windows), _sizes(strips))
    reader.fetch_ahead(np.asarray(samples, np.int64))
    if reader.manifest.form.payload == "foreign":
        return _decode_foreign(reader, samples, windows, threads)
    coded, places, faults, num_frames = [], [], [], 0
    for sample, window in zip(samples, windows, strict=True):
        try:
            frames, again = np.unique(np.asarray(window, np.int64), return_inverse=True)
            content, chosen, packets = _read_video(reader, int(sample), frames)
            coded.append(content)
            places.append(chosen[again])
            num_frames += packets
        except SampleFaultError as error:
            faults += error.faults
    if faults:
        raise SampleFaultError(faults)
    return CodedWindows(coded, places, num_frames, _sizes(coded))


def _decode_foreign(
    reader: ShardReader,
    samples: Sequence[int] | np.ndarray,
    windows: Sequence[np.ndarray] | np.ndarray,
    threads: int,
) -> CodedWindows:
    """Decode windows of foreign videos in threads; FFmpeg releases Python's lock meanwhile."""
    form = reader.manifest.form
    # Evaluation uses several clips of a video: it is decoded once for all of them.
    places: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(int(sample), []).append(place)
    pictures: list[np.ndarray] = [np.empty(0, np.uint8)] * len(samples)

    def decode(sample: int) -> tuple[int, int] | Fault:
        here = [np.asarray(windows[place], np.int64) for place in places[sample]]
        frames, again = np.unique(np.concatenate(here), return_inverse=True)
        _, members = reader.members(sample)
        try:
            content = reader.foreign_video(sample, video_ext(members) or "mp4")
            count = int(reader.num_frames[sample])
            decoded, num_decoded = decode_frames(content, reader.keys[sample], count, frames, form)
        except SampleFaultError as error:
            return error.faults[0]
        except VideoFault as error:
            return reader.fault(sample, f"{error.kind.value}: {error.detail}")
        for place, chosen in zip(
            places[sample], np.split(again, np.cumsum([len(w) for w in here])[:-1]), strict=True
        ):
            pictures[place] = decoded[chosen]
        return num_decoded, len(content)

    with ThreadPoolExecutor(threads, "foreign") as pool:
        counts = list(pool.map(decode, places))
    faults = [c for c in counts if isinstance(c, Fault)]
    if faults:
        raise SampleFaultError(faults)
    good = [c for c in counts if not isinstance(c, Fault)]
    return CodedWindows(pictures, [], sum(c[0] for c in good), sum(c[1] for c in good))


def _read_video(
    reader: ShardReader, sample: int, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    table = reader.table(sample)
    try:
        segments = [b""] * table.num_segments
        for segment in np.unique(frames // table.frames_per_segment).tolist():
            segments[segment] = reader.member(sample, segment_ext(segment, "mp4"))
    except IndexError as error:
        raise SampleFaultError([reader.fault(sample, f"no frame {frames[-1]}")]) from error
    try:
        return assemble_mp4(segments, table, reader.manifest.form, frames)
    except ShardError as error:
        raise SampleFaultError([reader.fault(sample, str(error))]) from error


def choose_decoder(
    reader: ShardReader,
    wanted: Literal["cpu", "gpu", "auto"],
    device: torch.device,
    default: Literal["cpu", "gpu"],
) -> Literal["cpu", "gpu"]:
    """Choose the device on which a rank decodes a data set.

    Args:
        reader: The data set.
        wanted: `data.decode`.
        device: The device on which the rank trains.
        default: The device on which it decodes JPEGs.

    Raises:
        ConfigError: No allowed device can decode the payload.
    """
    form = reader.manifest.form
    if form.payload == "jpeg":
        return default
    if form.payload == "foreign":
        if wanted == "gpu":
            raise ConfigError(
                f"data.decode is gpu, but {reader.location} has foreign videos, which only the "
                "CPU decodes; use data.decode auto or cpu"
            )
        return "cpu"
    # Here, since only videos need DALI.
    from strata.dataload.pipeline import video_decoder_fault

    again = "shard the videos again with --payload jpeg"
    if default == "gpu":
        first, _, _ = _read_video(reader, 0, np.array([0]))
        fault = video_decoder_fault(first, device.index or 0)
        if fault is None:
            return "gpu"
        if wanted == "gpu":
            raise ConfigError(
                f"data.decode is gpu, but this GPU does not decode {form.codec} video ({fault}); "
                f"use data.decode auto or cpu, or {again}"
            )
        warn_once(logger, f"this GPU does not decode {form.codec} video ({fault}); using the CPU")
    if form.codec not in CPU_VIDEO_CODECS:
        raise ConfigError(
            f"the shards hold {form.codec} video, which DALI decodes on a GPU's video decoder "
            f"only, and this rank has none; {again}, or --codec {CPU_VIDEO_CODECS[0]}"
        )
    return "cpu"


def refuse_mixed_payloads(readers: Sequence[ShardReader]) -> None:
    """Check that data sets use the same decoder, so that their results are comparable.

    Raises:
        ConfigError: The readers' payloads or codecs differ.
    """
    forms = [r.manifest.form for r in readers]
    kinds = [f.payload if f.payload != "mp4" else f"mp4 ({f.codec})" for f in forms]
    if len(set(kinds)) > 1:
        raise ConfigError(
            f"the shards of one run hold different payloads, {' and '.join(kinds)}; shard all "
            "videos with the same --payload and --codec"
        )
