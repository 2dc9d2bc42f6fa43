"""Another program can write the format: this one knows docs/data-format.md and no code."""

import dataclasses
import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image

from strata.dataload.clips import ClipSpec
from strata.dataload.config import DataConfig
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.format.schema import Manifest, NormalForm, SampleFacts, ShardEntry, SourceRow
from strata.preprocess.audit import check_folder
from tests.support.source_videos import moving_scene

WIDTH, HEIGHT, SEGMENT = 64, 48, 20
FORM = {"width": WIDTH, "height": HEIGHT, "fit": "stretch", "payload": "jpeg", "quality": 85}
FORM |= {"codec": "h264", "quantizer": 20, "gop": 16, "segment_frames": SEGMENT, "min_frames": 33}
CLASSES = ["gehen", "läuft"]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def checksum(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF


def strip(frames: np.ndarray) -> tuple[bytes, list[int], list[int]]:
    """Frames below each other with a restart at each one's end; where the coded bytes are."""
    out = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames))).save(
        out, "JPEG", quality=85, subsampling="4:2:0", restart_marker_rows=HEIGHT // 16
    )
    jpeg = out.getvalue()
    scan = jpeg.index(b"\xff\xda")
    ends = [k for k in range(scan, len(jpeg) - 1) if jpeg[k] == 255 and 0xD0 <= jpeg[k + 1] <= 0xD9]
    starts = [scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big"), *(k + 2 for k in ends)]
    return jpeg, starts[:-1], [end - start for start, end in zip(starts, ends, strict=False)]


def members(
    key: str, source: str, label: int, frames: np.ndarray, schema: int
) -> list[tuple[str, bytes]]:
    parts = [strip(frames[k : k + SEGMENT]) for k in range(0, len(frames), SEGMENT)]
    table = [schema, label, len(frames), HEIGHT, WIDTH, len(parts), SEGMENT, 0]
    table += [offset for part in parts for offset in part[1]]
    table += [length for part in parts for length in part[2]]
    facts = {"key": key, "source": source, "source_bytes": 1, "source_sha256": "0" * 64}
    facts |= {"label": label, "class_name": CLASSES[label], "num_frames": len(frames), "fps": 25.0}
    facts |= {"resampled": False, "deinterlaced": False, "source_width": 64, "source_height": 48}
    facts |= {"source_codec": "none", "source_pixel_format": "rgb24", "rotation_degrees": 0}
    segments = [(f"{key}.{number:03d}.jpg", part[0]) for number, part in enumerate(parts)]
    packed = struct.pack(f"<{len(table)}i", *table)
    if schema == 2:
        sums = [
            checksum(jpeg[offset : offset + length])
            for jpeg, offsets, lengths in parts
            for offset, length in zip(offsets, lengths, strict=True)
        ]
        sums += [checksum(jpeg[: offsets[0]]) for jpeg, offsets, _ in parts]
        packed += struct.pack(f"<{len(sums) + 1}I", *sums, checksum(canonical(facts)))
        packed += struct.pack("<I", checksum(packed))
    return [*segments, (f"{key}.frames.i32", packed), (f"{key}.json", canonical(facts))]


def write_set(folder: Path, videos: dict[str, np.ndarray], shard_size: int, schema: int) -> None:
    folder.mkdir()
    rows, shards, names = [], [], list(videos)
    for number, start in enumerate(range(0, len(names), shard_size)):
        chosen, lines, content = names[start : start + shard_size], [], b""
        for position, source in enumerate(chosen):
            label, frames = CLASSES.index(source.partition("/")[0]), videos[source]
            key = f"video{start + position}-{hashlib.sha256(source.encode()).hexdigest()[:10]}"
            words = []
            for name, member in members(key, source, label, frames, schema):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(member), 0o644
                content += info.tobuf(tarfile.USTAR_FORMAT)
                words += [name.split(".", 1)[1], str(len(content)), str(len(member)), name]
                content += member + bytes(-len(member) % 512)
            lines.append(" ".join(words) + "\n")
            row = {"source": source, "label": label, "num_frames": len(frames), "key": key}
            rows.append(row | {"status": "written", "shard": number, "position": position})
        name, content = f"shard-{number:06d}", content + bytes(1024)
        (folder / f"{name}.tar").write_bytes(content)
        index = f"v1.2 {len(lines)}\n" + "".join(lines)
        (folder / f"{name}.idx").write_text(index)
        entry = {"name": f"{name}.tar", "num_samples": len(chosen)}
        entry |= {"num_frames": sum(len(videos[s]) for s in chosen), "num_bytes": len(content)}
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        if schema == 2:
            entry["index_sha256"] = hashlib.sha256(index.encode()).hexdigest()
        shards.append(entry)
    rows.append({"source": "läuft/weg.avi", "label": 1, "num_frames": 0, "status": "absent"})
    written = [canonical(row) for row in sorted(rows, key=lambda row: row["source"])]
    (folder / "samples.jsonl").write_bytes(b"".join(row + b"\n" for row in written))
    head = {"schema": schema, "dataset": "theirs", "split": "all", "form": FORM}
    head |= {"classes": CLASSES, "shards": shards, "settings": {}}
    digest = hashlib.sha256(b"\n".join([canonical(head), *written])).hexdigest()
    text = json.dumps(head | {"digest": digest}, indent=1, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def videos() -> dict[str, np.ndarray]:
    names = [f"{CLASSES[k % 2]}/{k}.avi" for k in (3, 0, 4, 1, 2)]
    return {n: moving_scene(37 + k, WIDTH, HEIGHT, seed=k) for k, n in enumerate(names)}


@pytest.mark.parametrize("schema", [1, 2])
def test_shards_of_another_program_are_read(
    tmp_path: Path, videos: dict[str, np.ndarray], schema: int
) -> None:
    folder = tmp_path / "set"
    write_set(folder, videos, 2, schema)
    assert check_folder(folder, decode=-1) == []
    reader = ShardReader(folder, check="hash")
    for sample, frames in enumerate(videos.values()):
        chosen = np.array([len(frames) - 1, 0, 19, 20, 20, 7])
        picture = Image.open(io.BytesIO(reader.strip(sample, chosen).tobytes()))
        found = np.asarray(picture).reshape(-1, HEIGHT, WIDTH, 3)
        assert np.abs(found.astype(int) - frames[chosen]).mean() < 5
    config = DataConfig(
        shards=folder, batch_size=5, size=32, threads=1, clips=ClipSpec(max_stride=1.1)
    )
    loader = TrainLoader(
        reader,
        config,
        open_plan(reader, config, 0),
        world=World(),
        device=torch.device("cpu"),
        epochs=(0, 1),
    )
    with loader:
        (batch,) = list(loader)
    assert sorted(batch.samples.tolist()) == list(range(5))


def test_the_document_knows_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text(encoding="utf-8")
    for kind in (NormalForm, SampleFacts, ShardEntry, SourceRow, Manifest):
        names = {f.name for f in dataclasses.fields(kind)} - {"rows"}
        assert not {name for name in names if f"`{name}`" not in text}, kind
