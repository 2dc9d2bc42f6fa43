"""Decoders alone, for `tools/bench.py device`: strips, single frames and video."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from av import VideoFrame
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from strata.dataload.reader import ShardReader
from strata.format.schema import NormalForm
from strata.preprocess.encode_mp4 import encode_mp4

__all__ = ["Decoding", "decodings"]

_DISTINCT = 16
"""Number of different videos and pictures; larger batches repeat them."""
_RATE = Fraction(25)
_LONG_GOP = 250
_LARGER = 2
"""Factor on the set's width and height, for one of the videos."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One way to decode a batch of windows."""

    stored: str
    """What is decoded."""
    device: str
    """DALI's name of the device: cpu or mixed."""
    threads: int
    """Threads of DALI's pool."""
    frames: int
    """Frames in a batch."""
    start: int = 0
    """First frame of the window in a video."""
    hardware_share: float | None = None
    """Share of the pictures for the JPEG engines; None is DALI's default."""
    run: Callable[[], Any]
    """Decodes a batch."""


def decodings(
    reader: ShardReader, strips: Sequence[np.ndarray], *, threads: Sequence[int], on_gpu: bool
) -> Iterator[Decoding]:
    """All decoders that a machine offers, one after the other; each is built when it is its turn.

    Args:
        reader: A set with jpeg payload.
        strips: JPEGs of the same number of frames each.
        threads: Threads of DALI's pool, one value after the other.
        on_gpu: Whether there is a GPU.
    """
    form = reader.manifest.form
    with Image.open(io.BytesIO(strips[0].tobytes())) as picture:
        frames = picture.height // form.height
    singles = _single_frames(strips[:_DISTINCT], form)
    devices = ("cpu", "mixed") if on_gpu else ("cpu",)
    for count in threads:
        for device in devices:
            for share in (None, 0.0, 1.0) if device == "mixed" else (None,):
                yield Decoding(
                    stored="strip",
                    device=device,
                    threads=count,
                    frames=len(strips) * frames,
                    hardware_share=share,
                    run=_pictures(strips, device, count, share),
                )
            yield Decoding(
                stored="single",
                device=device,
                threads=count,
                frames=len(singles),
                run=_pictures(singles, device, count, None),
            )
    for name, each, starts in _video_forms(form, frames, on_gpu=on_gpu):
        videos = _videos(reader, each, 2 * frames, len(strips))
        for count in threads:
            for start in starts:
                yield Decoding(
                    stored=name,
                    device="mixed" if on_gpu else "cpu",
                    threads=count,
                    frames=len(videos) * frames,
                    start=start,
                    run=_clips(videos, "mixed" if on_gpu else "cpu", count, start, frames),
                )


def _single_frames(strips: Sequence[np.ndarray], form: NormalForm) -> list[np.ndarray]:
    """Each frame as a separate JPEG of the set's quality."""
    singles = []
    for strip in strips:
        with Image.open(io.BytesIO(strip.tobytes())) as picture:
            rows = np.asarray(picture.convert("RGB"))
        for frame in rows.reshape(-1, form.height, form.width, 3):
            out = io.BytesIO()
            Image.fromarray(frame).save(out, "JPEG", quality=form.quality)
            singles.append(np.frombuffer(out.getvalue(), np.uint8))
    return singles


def _video_forms(
    form: NormalForm, frames: int, *, on_gpu: bool
) -> Iterator[tuple[str, NormalForm, tuple[int, ...]]]:
    """Inputs of the video decoder: name, form (GOP, size), starts of the window."""
    base = replace(form, payload="mp4", segment_frames=0, min_frames=1)
    if not on_gpu:
        yield "mjpeg", replace(base, codec="mjpeg", quantizer=3), (0, frames)
        yield "vp9 gop 16", replace(base, codec="vp9", quantizer=20, gop=16), (0, frames)
        return
    h264 = replace(base, codec="h264", quantizer=20, gop=16)
    yield "h264 gop 16", h264, (0, frames)
    yield f"h264 gop {_LONG_GOP}", replace(h264, gop=_LONG_GOP), (0, frames)
    width, height = _LARGER * form.width, _LARGER * form.height
    yield f"h264 gop 16, {width}x{height}", replace(h264, width=width, height=height), (0,)


def _videos(reader: ShardReader, form: NormalForm, frames: int, batch: int) -> list[np.ndarray]:
    """The set's first videos encoded as video, repeated to fill a batch."""
    files = []
    for sample in range(min(_DISTINCT, reader.num_samples, batch)):
        order = np.arange(frames) % reader.num_frames[sample]
        with Image.open(io.BytesIO(reader.strip(sample, order).tobytes())) as picture:
            rows = np.asarray(picture.convert("RGB"))
        pictures = rows.reshape(frames, -1, rows.shape[1], 3)
        planes = np.stack([_planes(picture, form) for picture in pictures])
        files.append(np.frombuffer(encode_mp4(planes, form, _RATE), np.uint8))
    return [files[number % len(files)] for number in range(batch)]


def _planes(picture: np.ndarray, form: NormalForm) -> np.ndarray:
    """Y, Cb and Cr of an RGB picture in a form's size, `[height * 3 / 2, width]`."""
    frame = VideoFrame.from_ndarray(picture, "rgb24")
    return frame.reformat(width=form.width, height=form.height, format="yuvj420p").to_ndarray()


def _run(graph: Any, name: str, batch: Sequence[np.ndarray], device: str) -> Callable[[], Any]:
    pipe: Any = graph(
        batch_size=len(batch), device_id=None if device == "cpu" else 0, prefetch_queue_depth=1
    )
    pipe.build()

    def run() -> Any:
        pipe.feed_input(name, list(batch))
        return pipe.run()

    return run


def _pictures(
    pictures: Sequence[np.ndarray], device: str, threads: int, share: float | None
) -> Callable[[], Any]:
    options: dict[str, Any] = {} if share is None else {"hw_decoder_load": share}

    @pipeline_def(num_threads=threads)
    def graph() -> Any:
        coded = fn.external_source(name="coded")
        return fn.decoders.image(
            coded, device=device, output_type=types.DALIImageType.RGB, **options
        )

    return _run(graph, "coded", pictures, device)


def _clips(
    videos: Sequence[np.ndarray], device: str, threads: int, start: int, frames: int
) -> Callable[[], Any]:
    @pipeline_def(num_threads=threads)
    def graph() -> Any:
        coded = fn.external_source(name="coded")
        return fn.decoders.video(coded, device=device, start_frame=start, sequence_length=frames)

    return _run(graph, "coded", videos, device)
