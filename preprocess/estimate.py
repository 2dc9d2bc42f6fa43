"""The dry run: counts for each class and split, and an estimate of bytes and time."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from strata.errors import VideoFault
from strata.preprocess.datasets.folder import SourceSet
from strata.preprocess.datasets.listing import some_of
from strata.preprocess.plan import plan_shards
from strata.preprocess.sample import Sample
from strata.preprocess.settings import ShardSettings

__all__ = ["estimate_table"]

_SAMPLE_VIDEOS = 12
_SAMPLE_SECONDS = 15.0


@dataclass(kw_only=True)
class _Timed:
    """Sums over the videos that were timed."""

    videos: int = 0
    rejected: int = 0
    frames: int = 0
    source_bytes: int = 0
    shard_bytes: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0


def estimate_table(sets: Sequence[SourceSet], settings: ShardSettings) -> str:
    """Counts and an estimate of what a run would write and take, as text; nothing is written.

    A few videos are transcoded and verified in this process, in the order of the run. Time and size
    of the others are estimated by the bytes of their files.

    Args:
        sets: The sets of sources.
        settings: Settings of the run.
    """
    lines: list[str] = []
    for source_set in sets:
        lines += _counts(source_set)
    lines += _classes(sets)
    timed = _time_sample(sets, settings)
    total_bytes = sum(s.num_bytes for each in sets for s in each.present if s.fault is None)
    lines.append(
        f"timed: {timed.videos} videos, {timed.frames:,} frames in {timed.seconds:.2f} s of one "
        f"process ({timed.cpu_s / max(timed.frames, 1) * 1e6:,.0f} us of CPU time and "
        f"{timed.shard_bytes / max(timed.frames, 1):,.0f} bytes a frame), {timed.rejected} rejected"
    )
    if timed.source_bytes and timed.seconds:
        share = total_bytes / timed.source_bytes
        seconds = timed.seconds * share / settings.slice_count
        lines.append(
            f"estimate: {timed.shard_bytes * share:,.0f} bytes of shards; "
            f"{_duration(seconds)} of one process"
            + (f" for each of {settings.slice_count} slices" if settings.slice_count > 1 else "")
            + f", {_duration(seconds / settings.num_workers)} with {settings.num_workers} workers"
        )
    lines.append("dry run: nothing written")
    return "\n".join(lines)


def _counts(source_set: SourceSet) -> list[str]:
    present = source_set.present
    faults = Counter(s.fault[0].value for s in present if s.fault is not None)
    lines = [
        f"{source_set.dataset} {source_set.split}: {len(source_set.sources):,} listed, "
        f"{len(present):,} on disk, {len(source_set.sources) - len(present):,} absent, "
        f"{sum(s.num_bytes for s in present):,} bytes"
    ]
    lines += [f"  rejected as {kind}: {count:,}" for kind, count in sorted(faults.items())]
    return lines + [f"  note: {note}" for note in source_set.notes]


def _classes(sets: Sequence[SourceSet]) -> list[str]:
    """Lines with the videos on disk and listed, for each class and split."""
    classes = sets[0].classes
    if not classes:
        return []
    names = [some_of([name]) for name in classes]
    width = max(len("class"), *map(len, names))
    lines = ["  ".join([f"{'class':<{width}}", *(f"{s.split:>15}" for s in sets)])]
    listed = [Counter(s.label for s in each.sources) for each in sets]
    present = [Counter(s.label for s in each.present) for each in sets]
    for label, name in enumerate(names):
        if any(count[label] for count in listed):
            cells = [f"{p[label]:,} / {c[label]:,}" for p, c in zip(present, listed, strict=True)]
            lines.append("  ".join([f"{name:<{width}}", *(f"{cell:>15}" for cell in cells)]))
    return lines


def _time_sample(sets: Sequence[SourceSet], settings: ShardSettings) -> _Timed:
    timed = _Timed()
    chosen = [
        (source, each.classes)
        for each in sets
        for shard in plan_shards(each, settings)[:_SAMPLE_VIDEOS]
        for source in shard[:_SAMPLE_VIDEOS]
        if source.fault is None
    ]
    step = max(len(chosen) // _SAMPLE_VIDEOS, 1)
    for source, classes in chosen[::step][:_SAMPLE_VIDEOS]:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        sample = Sample(source, classes, settings)
        try:
            for _, content in sample.members():
                timed.shard_bytes += -(-len(content) // 512) * 512 + 512
            timed.frames += sample.num_frames
        except VideoFault:
            timed.rejected += 1
        timed.seconds += time.perf_counter() - start_s
        timed.cpu_s += time.process_time() - start_cpu_s
        timed.videos += 1
        timed.source_bytes += source.num_bytes
        if timed.seconds > _SAMPLE_SECONDS:
            break
    return timed


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
