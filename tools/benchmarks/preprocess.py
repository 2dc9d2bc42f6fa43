"""Speed of sharding beside a bare loop and ffmpeg's command line, and cost of each payload.

python tools/bench.py preprocess --videos DIR
"""

import io
import multiprocessing
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from strata.format.schema import FrameTable, NormalForm
from strata.format.strip_jpeg import assemble_strip, parse_strip
from strata.limits import usable_cpus
from strata.preprocess.encode_mp4 import encode_mp4, to_stored_range
from strata.preprocess.run import shard_set
from strata.preprocess.sample import keep_freed_memory
from strata.preprocess.settings import ShardSettings
from strata.preprocess.transcode import FrameSource, encode_strip
from strata.ranges import check_range
from strata.tools.benchmarks.measure import (
    find_videos,
    in_turns,
    machine,
    machine_line,
    parse_options,
    source_set_of,
    table,
)

__all__ = ["compare_payloads", "compare_speed", "main"]

_CLIP_FRAMES = 32


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Sharding beside a bare loop and ffmpeg, or the payloads beside each other."""

    videos: Path
    """Folder of videos."""
    limit: int = 100
    """Videos, evenly spaced in the order of their names."""
    workers: int = 0
    """Processes; 0 is one for each CPU."""
    repeat: int = 3
    """Rounds; the best of each contender counts."""
    choices: bool = False
    """Compare payloads instead of speed."""

    def __post_init__(self) -> None:
        check_range(self, "limit", "repeat", at_least=1)


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: An option is wrong, or there are no videos.
    """
    options = parse_options(PreprocessOptions, argv, "preprocess")
    paths = find_videos(options.videos, options.limit)
    workers = options.workers or usable_cpus()
    print(machine_line(machine()))
    print(f"{len(paths)} videos, {workers} processes")
    if options.choices:
        compare_payloads(paths)
    else:
        compare_speed(options.videos, paths, workers, options.repeat)


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
    """Seconds on the clock and of CPU; other work on the machine changes the second less."""
    start_s, start_cpu_s = time.perf_counter(), _cpu_seconds()
    function()
    return time.perf_counter() - start_s, _cpu_seconds() - start_cpu_s


class _Sharding:
    """Shards videos with the default settings, and measures where the CPU time is spent.

    Args:
        videos: The folder that all paths are in.
        paths: Which videos.
        workers: Processes.
    """

    def __init__(self, videos: Path, paths: Sequence[Path], workers: int) -> None:
        self._sources = source_set_of(videos, paths)
        self._settings = ShardSettings(form=NormalForm(min_frames=1), workers=workers)
        self.num_frames = 0
        self.driver_s: list[tuple[float, float]] = []
        """CPU seconds of the driver and of all workers, of each run."""

    def run(self, folder: Path) -> None:
        """Read back a sample of the frames, which is the default."""
        start_s, children_s = time.process_time(), _cpu_seconds(resource.RUSAGE_CHILDREN)
        manifest = shard_set(self._sources, folder / "shards", self._settings)
        self.num_frames = sum(s.num_frames for s in manifest.shards)
        worker_s = _cpu_seconds(resource.RUSAGE_CHILDREN) - children_s
        self.driver_s.append((time.process_time() - start_s, worker_s))

    def run_reading_all(self, folder: Path) -> None:
        """Read back every frame."""
        settings = replace(self._settings, read_back="all")
        shard_set(self._sources, folder / "shards", settings)


def compare_speed(videos: Path, paths: Sequence[Path], workers: int, repeat: int) -> None:
    """Sharding, the bare loop and ffmpeg in turns; each starts its own processes.

    Args:
        videos: The folder that all paths are in.
        paths: Which videos.
        workers: Processes.
        repeat: Rounds.
    """
    sharding = _Sharding(videos, paths, workers)
    contenders: dict[str, Callable[[Path], object]] = {
        "strata": sharding.run,
        "bare loop": lambda _: _floor(paths, workers),
        "strata, all": sharding.run_reading_all,
    }
    if shutil.which("ffmpeg"):
        contenders["ffmpeg"] = lambda folder: _ffmpeg(paths, workers, folder)
    else:
        print("ffmpeg: skipped, there is no such command here (apt-get install ffmpeg)")

    def timed(run: Callable[[Path], object]) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            return _time(lambda: run(Path(folder)))

    rounds = in_turns({n: partial(timed, run) for n, run in contenders.items()}, repeat)
    best = {name: np.array([r[name] for r in rounds]).min(0) for name in contenders}
    frames = sharding.num_frames
    head = ("", "seconds", "videos/s", "frames/s", "CPU s", "CPU us/frame", "all rounds, s")
    rows = [
        (
            name,
            f"{seconds:.2f}",
            f"{len(paths) / seconds:.1f}",
            f"{frames / seconds:,.0f}",
            f"{cpu_s:.2f}",
            f"{cpu_s / frames * 1e6:.0f}",
            ", ".join(f"{r[name][0]:.2f}" for r in rounds),
        )
        for name, (seconds, cpu_s) in best.items()
    ]
    print(table(head, rows))
    own_ms, worker_ms = np.array(sharding.driver_s).min(0) / len(paths) * 1e3
    print(
        f"driver {own_ms:.2f} ms a video, workers {worker_ms:.2f}: "
        f"computed, one driver feeds {worker_ms / own_ms:.0f} cores"
    )
    for name in list(contenders)[1:]:
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


def compare_payloads(paths: Sequence[Path]) -> None:
    """Bytes, quality and speed of the payloads on the first 64 frames of each video, one core."""
    head = ("payload", "bytes/frame", "PSNR dB", "SSIM")
    head += ("encode us/frame", "decode us/frame", "32 frames, ms")
    form = NormalForm(min_frames=1)
    scaled = [_first_frames(path, form) for path in paths]
    rows = []
    for each in _choices():
        measured = np.array([_measure(planes, each) for planes in scaled])
        num_bytes, psnr, ssim, encode_s, decode_s, clip_s = measured.mean(0)
        name = f"jpeg q{each.quality}"
        if each.payload != "jpeg":
            name = f"mp4 {each.codec} {each.quantizer} gop {each.gop}"
        cells = (f"{num_bytes:,.0f}", f"{psnr:.2f}", f"{ssim:.4f}", f"{encode_s * 1e6:.0f}")
        rows.append((name, *cells, f"{decode_s * 1e6:.0f}", f"{clip_s * 1e3:.2f}"))
    print(table(head, rows))


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
