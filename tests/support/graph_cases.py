"""Helpers of the pipelines' tests: images, augmentation cases, and running a pipeline."""

import dataclasses
import io

import numpy as np
from PIL import Image

from strata.dataload.augment import ViewParameters, centre_crop
from strata.dataload.cpu_pipeline import CpuPipeline
from strata.dataload.graph_spec import GraphSpec, ViewSlice
from strata.dataload.pipeline import GpuPipeline
from tests.support.shard_folders import moving_picture

HEIGHT, WIDTH, FRAMES, SIZE = 64, 96, 8, 48


def encode(frames: np.ndarray) -> np.ndarray:
    """Encode frames as a strip, as the sharder does."""
    out = io.BytesIO()
    Image.fromarray(np.concatenate(frames)).save(
        out, "JPEG", quality=95, restart_marker_rows=HEIGHT // 16
    )
    return np.frombuffer(out.getvalue(), np.uint8)


def moving_pictures(seed: int) -> np.ndarray:
    return moving_picture(seed, FRAMES, HEIGHT, WIDTH)


def run_graph(
    strips: list[np.ndarray],
    views: list[ViewParameters],
    cuts: tuple[ViewSlice, ...],
    pipeline: type[CpuPipeline] | type[GpuPipeline] = CpuPipeline,
    **changes,
) -> list[np.ndarray]:
    """Each view of a batch, `[B, T, SIZE, SIZE, 3]`."""
    spec = GraphSpec(
        batch_size=len(strips),
        strip_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        size=SIZE,
        views=cuts,
        photometric=True,
        decode="cpu",
        augment="cpu",
        device_id=None,
        num_threads=1,
    )
    opened = pipeline(dataclasses.replace(spec, **changes))
    first, *rest = opened.start(strips, views)()
    opened.close()
    return [v.cpu().numpy() for v in (first[:, 0], *rest)]


IDENTITY = centre_crop(1, height=HEIGHT, width=WIDTH)
ONE = np.ones((1, 1), np.float32)
FRAME = np.linspace(0, 1, FRAMES, dtype=np.float32)[None]
"""0 to 1 along the frames."""
CASES = {
    "centre": {},
    "box": {"box": np.array([[3, 10, 45, 81]], np.float32)},
    "whole frame": {"box": np.array([[0, 0, HEIGHT, WIDTH]], np.float32)},
    "box enlarged": {"box": np.array([[20, 30, 50, 60]], np.float32)},
    "flip": {"flip": np.array([True])},
    **{f"brightness {v}": {"brightness": v * ONE} for v in (0.5, 1.0, 1.2, 1.5)},
    **{f"contrast {v}": {"contrast": v * ONE} for v in (0.5, 1.0, 1.2, 1.5)},
    **{f"saturation {v}": {"saturation": v * ONE} for v in (0.5, 1.0, 1.2, 1.5)},
    **{f"hue {v}": {"hue_degrees": v * ONE} for v in (-90.0, 0.0, 33.0, 90.0)},
    **{f"gray {c}": {"gray": np.array([[c]], np.int8)} for c in (0, 1, 2)},
    **{f"blur {v}": {"sigma": v * ONE[0]} for v in (0.1, 0.7, 1.05, 2.0)},
    "all": {
        "box": np.array([[5, 0, 60, 70]], np.float32),
        "flip": np.array([True]),
        "brightness": 1.3 * ONE,
        "contrast": 0.7 * ONE,
        "saturation": 1.4 * ONE,
        "hue_degrees": -40 * ONE,
        "sigma": 1.1 * ONE[0],
    },
    "per frame": {
        "brightness": 0.5 + FRAME,
        "contrast": 1.5 - FRAME,
        "saturation": 0.5 + FRAME,
        "hue_degrees": 180 * FRAME - 90,
        "gray": np.array([[-1, 0, -1, 1, 2, -1, 0, -1]], np.int8),
        "sigma": 0.8 * ONE[0],
    },
}


def rows_of(name: str) -> ViewParameters:
    """A case with every photometric parameter of the shape `[1, FRAMES]`."""
    row = dataclasses.replace(IDENTITY, **CASES[name])
    each = ("brightness", "contrast", "saturation", "hue_degrees", "gray")
    spread = {n: np.broadcast_to(getattr(row, n), (1, FRAMES)).copy() for n in each}
    return dataclasses.replace(row, **spread)
