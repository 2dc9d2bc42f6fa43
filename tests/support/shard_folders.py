"""Shard folders for tests, written from the description of the format only."""

import hashlib
import io
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from strata.format.manifest import build_manifest, digest_of, write_manifest
from strata.format.schema import (
    Checksums,
    FrameTable,
    Manifest,
    NormalForm,
    SampleFacts,
    ShardEntry,
    SourceRow,
    checksum,
    segment_checksums,
    segment_ext,
)
from strata.format.strip_jpeg import parse_strip
from strata.preprocess.encode_mp4 import encode_mp4, verify_mp4

HEIGHT, WIDTH = 48, 64
_FULL_BT601: dict[str, Any] = {"format": "yuvj420p", "dst_colorspace": 5, "dst_color_range": 2}


def moving_picture(seed: int, num_frames: int, height: int = HEIGHT, width: int = WIDTH):
    """Make frames of smooth moving noise: uint8 `[F, height, width, 3]`."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    wide = Image.fromarray(small).resize((width + 2 * num_frames, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(wide)
    return np.stack([pixels[:, 2 * t : 2 * t + width] for t in range(num_frames)])


def encode_strip(frames: np.ndarray) -> bytes:
    """Encode vertically stacked frames as one JPEG with a restart marker after each frame."""
    out = io.BytesIO()
    Image.fromarray(np.concatenate(frames)).save(
        out, "JPEG", quality=90, subsampling="4:2:0", restart_marker_rows=frames.shape[1] // 16
    )
    return out.getvalue()


def make_shards(
    folder: Path,
    *,
    num_videos: int,
    num_classes: int,
    shard_size: int,
    seed: int,
    form: NormalForm | None = None,
    schema: int = 2,
    empty_class: int | None = None,
) -> None:
    """Make a small labelled data set; video i has 33 + i % 5 frames, class i % num_classes.

    Videos of `empty_class` have the next class instead.
    With `schema` 1 it has the older format without checksums.
    """
    folder.mkdir(parents=True)
    form = form or NormalForm(width=WIDTH, height=HEIGHT)
    rows, shards = [], []
    for number, start in enumerate(range(0, num_videos, shard_size)):
        name = f"shard-{number:06d}"
        lines, total = [], 0
        path = folder / f"{name}.tar"
        members = range(start, min(start + shard_size, num_videos))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, video in enumerate(members):
                frames = moving_picture(
                    1000 * seed + video, 33 + video % 5, form.height, form.width
                )
                key, label = f"video-{video:04d}", video % num_classes
                if label == empty_class:
                    label = (label + 1) % num_classes
                line = []
                for ext, content in _members(key, label, frames, form, schema):
                    info = tarfile.TarInfo(f"{key}.{ext}")
                    info.size = len(content)
                    offset = tar.offset + 512
                    tar.addfile(info, io.BytesIO(content))
                    line += [ext, str(offset), str(len(content)), f"{key}.{ext}"]
                lines.append(" ".join(line))
                total += len(frames)
                rows.append(
                    SourceRow(
                        source=f"{key}.avi",
                        status="written",
                        key=key,
                        label=label,
                        num_frames=len(frames),
                        shard=number,
                        position=place,
                    )
                )
        index = ("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n").encode()
        (folder / f"{name}.idx").write_bytes(index)
        content = path.read_bytes()
        shards.append(
            ShardEntry(
                name=path.name,
                num_samples=len(lines),
                num_frames=total,
                num_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                index_sha256=hashlib.sha256(index).hexdigest() if schema > 1 else None,
            )
        )
    manifest = build_manifest(
        dataset="made",
        split=folder.name,
        form=form,
        classes=[f"class-{k}" for k in range(num_classes)],
        shards=shards,
        settings={},
        rows=rows,
    )
    rewrite(replace(manifest, schema=schema), folder)


def rewrite(manifest: Manifest, folder: Path) -> None:
    """Write a changed manifest with its correct digest."""
    write_manifest(replace(manifest, digest=digest_of(manifest)), folder)


def table_of(
    segments: list[bytes],
    places: list[tuple[np.ndarray, np.ndarray]],
    form: NormalForm,
    label: int = 0,
    facts: bytes = b"",
) -> FrameTable:
    """The frame table of segments whose frames are at `places`."""
    found = [segment_checksums(s, *p, form.payload) for s, p in zip(segments, places, strict=True)]
    return FrameTable(
        label=label,
        height=form.height,
        width=form.width,
        frames_per_segment=form.frames_per_segment,
        offsets=np.concatenate([p[0] for p in places]),
        lengths=np.concatenate([p[1] for p in places]),
        checksums=Checksums(
            frames=np.concatenate([f[0] for f in found]),
            heads=np.array([f[1] for f in found], np.uint32),
            facts=checksum(facts),
        ),
    )


def old_table(table: FrameTable) -> bytes:
    """Encode a frame table as in version 1, without checksums."""
    fixed = [1, table.label, table.num_frames, table.height, table.width, table.num_segments]
    numbers = [np.array([*fixed, table.frames_per_segment, 0]), table.offsets, table.lengths]
    return np.concatenate(numbers).astype("<i4").tobytes()


def encode_mp4_segments(
    frames: np.ndarray, form: NormalForm
) -> tuple[list[bytes], list[tuple[np.ndarray, np.ndarray]]]:
    """Encode frames as the mp4 payload, and find the packets."""
    full = [VideoFrame.from_ndarray(f, format="rgb24").reformat(**_FULL_BT601) for f in frames]
    planes = np.stack([f.to_ndarray() for f in full])
    segments, places = [], []
    for start in range(0, len(frames), form.frames_per_segment):
        part = planes[start : start + form.frames_per_segment]
        segments.append(encode_mp4(part, form, Fraction(25)))
        places.append(verify_mp4(segments[-1], part, form, "made"))
    return segments, places


def encode_segments(frames: np.ndarray, form: NormalForm) -> tuple[list[bytes], FrameTable]:
    """Encode frames as the mp4 payload, with their frame table."""
    segments, places = encode_mp4_segments(frames, form)
    return segments, table_of(segments, places, form)


def _members(
    key: str, label: int, frames: np.ndarray, form: NormalForm, schema: int
) -> list[tuple[str, bytes]]:
    if form.payload == "mp4":
        segments, places = encode_mp4_segments(frames, form)
    else:
        per = form.frames_per_segment
        segments = [encode_strip(frames[k : k + per]) for k in range(0, len(frames), per)]
        places = [parse_strip(segment) for segment in segments]
    facts = SampleFacts(
        key=key,
        source=f"{key}.avi",
        source_sha256="0" * 64,
        source_bytes=0,
        label=label,
        class_name=f"class-{label}",
        num_frames=len(frames),
        fps=25.0,
        source_width=form.width,
        source_height=form.height,
        source_codec="made",
        source_pixel_format="rgb24",
        rotation_degrees=0,
    ).to_json()
    table = table_of(segments, places, form, label, facts)
    content = table.to_bytes() if schema > 1 else old_table(table)
    named = [(segment_ext(k, form.payload), s) for k, s in enumerate(segments)]
    return [*named, ("frames.i32", content), ("json", facts)]
