"""How fast sharding is, against a bare loop and against ffmpeg, and what the payloads cost."""

import argparse
import io
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from strata.errors import ConfigError
from strata.preprocess.mp4 import encode_mp4, to_stored_range
from strata.preprocess.run import shard_set
from strata.preprocess.settings import ShardSettings
from strata.preprocess.sources import VIDEO_SUFFIXES, Source, SourceSet
from strata.preprocess.transcode import FrameSource, encode_strip
from strata.preprocess.worker import keep_freed_memory
from strata.schema import FrameTable, NormalForm
from strata.strip import assemble_strip, parse_strip

__all__ = ["bench_choices", "bench_preprocess", "main"]

_CLIP_FRAMES = 32


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: There are no videos.
    """
    parser = argparse.ArgumentParser(prog="tools/bench.py preprocess")
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--limit", type=int, default=100, help="videos, evenly chosen")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one for each CPU")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the best of each counts")
    parser.add_argument("--choices", action="store_true", help="compare payloads instead")
    args = parser.parse_args(argv)
    found = sorted(p for p in args.videos.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ConfigError(f"no videos in {args.videos}; mend --videos")
    chosen = found[:: max(len(found) // args.limit, 1)][: args.limit]
    workers = args.workers or len(os.sched_getaffinity(0))
    print(f"{len(chosen)} videos, {workers} processes, load {os.getloadavg()[0]:.1f} at the start")
    if args.choices:
        bench_choices(chosen)
    else:
        bench_preprocess(args.videos, chosen, workers, args.repeat)


def _bare_loop(path: Path) -> int:
    """Decode, scale and encode, and nothing else."""
    form = NormalForm(min_frames=1)
    source = FrameSource(path, path.name, form)
    for planes in source.segments():
        encode_strip(planes, form)
    return source.num_frames


def _floor(paths: Sequence[Path], workers: int) -> int:
    with multiprocessing.get_context("spawn").Pool(workers, keep_freed_memory) as pool:
        return sum(pool.imap_unordered(_bare_loop, paths))


def _ffmpeg(paths: Sequence[Path], workers: int, folder: Path) -> None:
    """One command line a video, as many at once as there are processes."""
    form = NormalForm()

    def convert(numbered: tuple[int, Path]) -> None:
        number, path = numbered
        call = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-threads", "1", "-i", str(path), "-an"]
        scale = f"scale={form.width}:{form.height}:flags=bicubic+accurate_rnd+bitexact:out_range=pc"
        call += ["-vf", scale, "-pix_fmt", "yuvj420p", "-c:v", "mjpeg", "-q:v", "3"]
        call += ["-threads", "1", "-f", "mjpeg", str(folder / f"{number}.mjpeg")]
        subprocess.run(call, check=True, capture_output=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(convert, enumerate(paths)))


def _cpu_seconds(*whose: int) -> float:
    """Of this process and all its children that have ended, or of one of the two."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(w) for w in whose or both]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _time(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of CPU; the second does not mind what else the machine does."""
    start_s, start_cpu_s = time.perf_counter(), _cpu_seconds()
    function()
    return time.perf_counter() - start_s, _cpu_seconds() - start_cpu_s


def bench_preprocess(videos: Path, paths: Sequence[Path], workers: int, repeat: int) -> None:
    """Sharding, the bare loop and ffmpeg in turns, all with the start of their processes.

    Args:
        videos: The folder that all paths are in.
        paths: Which videos.
        workers: Processes.
        repeat: Rounds.
    """
    sources = [
        Source(name=p.relative_to(videos).as_posix(), path=p, label=0, num_bytes=p.stat().st_size)
        for p in paths
    ]
    source_set = SourceSet(dataset="bench", split="all", classes=("any",), sources=tuple(sources))
    settings = ShardSettings(form=NormalForm(min_frames=1), workers=workers)
    reading_all = replace(settings, read_back="all")
    times: dict[str, list[tuple[float, float]]] = {
        "strata": [],
        "bare loop": [],
        "strata, all": [],
    }
    if shutil.which("ffmpeg"):
        times["ffmpeg"] = []
    else:
        print("ffmpeg: skipped, there is no such command here (apt-get install ffmpeg)")
    num_frames = 0
    driver_s: list[tuple[float, float]] = []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)

            def run(folder: Path = folder) -> None:
                nonlocal num_frames
                start_s, children_s = time.thread_time(), _cpu_seconds(resource.RUSAGE_CHILDREN)
                manifest = shard_set(source_set, videos, folder / "shards", settings)
                num_frames = sum(s.num_frames for s in manifest.shards)
                worker_s = _cpu_seconds(resource.RUSAGE_CHILDREN) - children_s
                driver_s.append((time.thread_time() - start_s, worker_s))

            times["strata"].append(_time(run))
            times["bare loop"].append(_time(lambda: _floor(paths, workers)))
            all_folder = folder / "all"
            times["strata, all"].append(
                _time(lambda f=all_folder: shard_set(source_set, videos, f, reading_all))
            )
            if "ffmpeg" in times:
                times["ffmpeg"].append(_time(lambda f=folder: _ffmpeg(paths, workers, f)))
    print(f"{'':<12}{'seconds':>9}{'videos/s':>10}{'frames/s':>10}{'CPU s':>9}{'CPU us/frame':>14}")
    best = {name: np.array(rounds).min(0) for name, rounds in times.items()}
    for name, (seconds, cpu_s) in best.items():
        every = ", ".join(f"{s:.2f}" for s, _ in times[name])
        print(
            f"{name:<12}{seconds:>9.2f}{len(paths) / seconds:>10.1f}{num_frames / seconds:>10,.0f}"
            f"{cpu_s:>9.2f}{cpu_s / num_frames * 1e6:>14.0f}   all rounds: {every}"
        )
    own_ms, worker_ms = np.array(driver_s).min(0) / len(paths) * 1e3
    print(
        f"driver's own thread {own_ms:.2f} ms a video, workers {worker_ms:.2f}: "
        f"computed, one driver feeds {worker_ms / own_ms:.0f} cores"
    )
    for name in list(times)[1:]:
        by_clock, by_cpu = best[name] / best["strata"]
        print(f"strata / {name}: {by_clock:.2f} of its rate by the clock, {by_cpu:.2f} by CPU time")


def _choices() -> list[NormalForm]:
    jpeg = [NormalForm(quality=q, min_frames=1) for q in (75, 85, 90, 95)]
    mp4 = NormalForm(payload="mp4", min_frames=1)
    return [
        *jpeg,
        *(replace(mp4, quantizer=q) for q in (18, 20, 23)),
        replace(mp4, gop=1),
        *(replace(mp4, codec="vp9", quantizer=q) for q in (20, 30)),
        *(replace(mp4, codec="mjpeg", quantizer=q) for q in (2, 4)),
    ]


def bench_choices(paths: Sequence[Path]) -> None:
    """Bytes, likeness and speed of the payloads on the first 64 frames of each video, one core."""
    print(
        f"{'payload':<22}{'bytes/frame':>12}{'PSNR dB':>9}{'SSIM':>8}{'encode us':>11}"
        f"{'decode us':>11}{'32 frames ms':>14}"
    )
    form = NormalForm(min_frames=1)
    scaled = [_first_frames(path, form) for path in paths]
    for each in _choices():
        rows = np.array([_measure(planes, each) for planes in scaled])
        num_bytes, psnr, ssim, encode_s, decode_s, clip_s = rows.mean(0)
        match each.payload:
            case "jpeg":
                name = f"jpeg q{each.quality}"
            case _:
                name = f"mp4 {each.codec} {each.quantizer} gop {each.gop}"
        print(
            f"{name:<22}{num_bytes:>12,.0f}{psnr:>9.2f}{ssim:>8.4f}{encode_s * 1e6:>11.0f}"
            f"{decode_s * 1e6:>11.0f}{clip_s * 1e3:>14.2f}",
            flush=True,
        )


def _first_frames(path: Path, form: NormalForm) -> np.ndarray:
    return next(iter(FrameSource(path, path.name, form).segments()))[:64].copy()


def _measure(planes: np.ndarray, form: NormalForm) -> tuple[float, ...]:
    """Bytes a frame, PSNR, SSIM, seconds to encode and decode a frame, seconds for a clip."""
    count, height = len(planes), form.height
    start_s = time.process_time()
    if form.payload == "jpeg":
        content = encode_strip(planes, form)
        encode_s = time.process_time() - start_s
        start_s = time.process_time()
        picture = Image.open(io.BytesIO(content))
        picture.draft("YCbCr", None)  # pyright: ignore[reportArgumentType]
        decoded = np.asarray(picture).reshape(count, height, form.width, 3)[..., 0]
        decode_s = time.process_time() - start_s
        expected = planes[:, :height]
        offsets, lengths = parse_strip(content)
        table = FrameTable(0, height, form.width, form.frames_per_segment, offsets, lengths)
        start_s = time.process_time()
        indices = np.arange(count // 2, count // 2 + min(_CLIP_FRAMES, count // 2))
        cut = assemble_strip([content], table, indices)
        np.asarray(Image.open(io.BytesIO(cut.tobytes())))
        clip_s = time.process_time() - start_s
    else:
        content = encode_mp4(planes, form, Fraction(25))
        encode_s = time.process_time() - start_s
        start_s = time.process_time()
        frames = _decode_mp4(content, None, 0, count)
        decode_s = time.process_time() - start_s
        decoded = np.stack(frames)[:, :height]
        expected = to_stored_range(planes, form)[:, :height]
        start_s = time.process_time()
        _decode_mp4(content, "rgb24", count // 2, min(_CLIP_FRAMES, count // 2))
        clip_s = time.process_time() - start_s
    error = decoded.astype(np.float64) - expected
    psnr = 10 * np.log10(255**2 / max(np.mean(np.square(error)), 1e-9))
    ssim = _ssim(decoded.astype(np.float64), expected.astype(np.float64))
    return len(content) / count, psnr, ssim, encode_s / count, decode_s / count, clip_s


def _decode_mp4(content: bytes, layout: str | None, first: int, count: int) -> list[np.ndarray]:
    """Frames from `first` on, decoded from the beginning as DALI does."""
    found: list[np.ndarray] = []
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for place, frame in enumerate(container.decode(stream)):
            if place >= first:
                found.append(frame.to_ndarray(format=layout) if layout else frame.to_ndarray())
            if len(found) == count:
                break
    return found


def _ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Mean SSIM of luma over 8 x 8 blocks that do not overlap (Wang et al. 2004)."""
    count, height, width = first.shape
    blocks = [x.reshape(count, height // 8, 8, width // 8, 8) for x in (first, second)]
    mean = [b.mean((2, 4)) for b in blocks]
    variance = [np.square(b).mean((2, 4)) - m**2 for b, m in zip(blocks, mean, strict=True)]
    covariance = (blocks[0] * blocks[1]).mean((2, 4)) - mean[0] * mean[1]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    over = (2 * mean[0] * mean[1] + c1) * (2 * covariance + c2)
    under = (mean[0] ** 2 + mean[1] ** 2 + c1) * (variance[0] + variance[1] + c2)
    return float((over / under).mean())
