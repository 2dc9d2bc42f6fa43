"""Draw synthetic videos: moving objects in front of a moving background, as arrays of frames.

A class is a combination of an outline, two textures, a motion and a camera. Colours, brightness,
contrast, places, sizes, counts, speeds, directions and the details of every texture are random for
each video, from one distribution that all classes share, so they do not predict the class. Lengths
are in heights of the picture unless a name ends in `_px`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["SCENE_CLASSES", "SceneClass", "draw_video"]

_TILE = 192
"""Texels along each side of a texture, which repeats without a seam."""
_CYCLES = 6
"""Periods of the pattern along each side of a texture."""

Rng = np.random.Generator
Floats = np.ndarray


# --- outlines: signed distance-like fields, negative inside, in units of the object's radius ----


def _star(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    points, depth = int(rng.integers(5, 7)), rng.uniform(0.45, 0.6)

    def field(x: Floats, y: Floats) -> Floats:
        turn = np.arctan2(y, x) * np.float32(points / (2 * np.pi))
        ramp = np.abs(turn - np.round(turn)) * np.float32(2.0)
        return np.hypot(x, y) - (1 - np.float32(depth) * ramp)

    return field


def _ring(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    half = np.float32(rng.uniform(0.17, 0.25))

    def field(x: Floats, y: Floats) -> Floats:
        return np.abs(np.hypot(x, y) - (1 - half)) - half

    return field


def _cross(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    arm = np.float32(rng.uniform(0.24, 0.34))

    def field(x: Floats, y: Floats) -> Floats:
        x, y = np.abs(x), np.abs(y)
        return np.maximum(np.maximum(x, y) - np.float32(0.95), np.minimum(x, y) - arm)

    return field


def _crescent(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    shift = np.float32(rng.uniform(0.4, 0.55))

    def field(x: Floats, y: Floats) -> Floats:
        bite = np.float32(0.85) - np.hypot(x - shift, y)
        return np.maximum(np.hypot(x, y) - 1, bite)

    return field


def _bar(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    half = np.float32(rng.uniform(0.22, 0.32))

    def field(x: Floats, y: Floats) -> Floats:
        return np.hypot(np.maximum(np.abs(x) - (1 - half), 0), y) - half

    return field


def _triangle(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    stretch = np.float32(rng.uniform(0.9, 1.15))

    def field(x: Floats, y: Floats) -> Floats:
        slope = np.abs(y) * np.float32(0.866) * stretch + x * np.float32(0.5)
        return np.maximum(slope, -x) - np.float32(0.55)

    return field


def _flower(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    petals, depth = int(rng.integers(4, 6)), np.float32(rng.uniform(0.2, 0.28))

    def field(x: Floats, y: Floats) -> Floats:
        return np.hypot(x, y) - (1 - depth + depth * np.cos(np.arctan2(y, x) * petals))

    return field


def _block(rng: Rng) -> Callable[[Floats, Floats], Floats]:
    side = np.float32(rng.uniform(0.6, 0.8))

    def field(x: Floats, y: Floats) -> Floats:
        return np.maximum(np.abs(x) - np.float32(0.8), np.abs(y) - side)

    return field


# --- textures: fields over the unit torus, any range; `_tile` gives all one distribution --------


def _points(rng: Rng, side: int, jitter: float) -> Floats:
    """Points of a `side` × `side` lattice on the unit torus, each moved by up to `jitter` cells."""
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    shifted = (grid + 0.5 + rng.uniform(-jitter, jitter, grid.shape)) / side
    return shifted.astype(np.float32)


def _torus_distances(u: Floats, v: Floats, points: Floats, nearest: int) -> list[Floats]:
    """The distances from each texel to its `nearest` closest points, closest first."""
    best = [np.full(u.shape, 9.0, np.float32) for _ in range(nearest)]
    for px, py in points:
        du, dv = u - px, v - py
        distance = np.hypot(du - np.round(du), dv - np.round(dv))
        for rank in range(nearest):
            lower = np.minimum(best[rank], distance)
            distance = np.maximum(best[rank], distance)
            best[rank] = lower
    return best


def _noise(rng: Rng, low: float, high: float) -> Floats:
    """Seamless noise whose waves number between `low` and `high` along a side."""
    white = np.fft.rfft2(rng.standard_normal((_TILE, _TILE)))
    rows = np.fft.fftfreq(_TILE)[:, None] * _TILE
    columns = np.fft.rfftfreq(_TILE)[None, :] * _TILE
    waves = np.hypot(rows, columns)
    band = np.exp(-0.5 * ((waves - (low + high) / 2) / ((high - low) / 2)) ** 2)
    field = np.fft.irfft2(white * band, (_TILE, _TILE))
    return (field / field.std()).astype(np.float32)


def _wave(phase: Floats) -> Floats:
    """A wave between -1 and 1, of period 1."""
    return np.sin(np.float32(2 * np.pi) * phase)


def _stripes(rng: Rng, u: Floats, v: Floats) -> Floats:
    return _wave(_CYCLES * u) - np.float32(rng.uniform(-0.3, 0.3))


def _checks(rng: Rng, u: Floats, v: Floats) -> Floats:
    del rng
    half = _CYCLES // 2
    return _wave(half * (u + v)) * _wave(half * (u - v))


def _dots(rng: Rng, u: Floats, v: Floats) -> Floats:
    (near,) = _torus_distances(u, v, _points(rng, _CYCLES, 0.15), 1)
    return np.float32(rng.uniform(0.27, 0.36)) - near * _CYCLES


def _cells(rng: Rng, u: Floats, v: Floats) -> Floats:
    near, second = _torus_distances(u, v, _points(rng, _CYCLES - 1, 0.45), 2)
    return (second - near) * _CYCLES - np.float32(rng.uniform(0.2, 0.3))


def _clouds(rng: Rng, u: Floats, v: Floats) -> Floats:
    del u, v
    return _noise(rng, 2.0, 4.5)


def _ripples(rng: Rng, u: Floats, v: Floats) -> Floats:
    (near,) = _torus_distances(u, v, _points(rng, 2, 0.3), 1)
    return _wave(near * (_CYCLES + 2))


def _chevrons(rng: Rng, u: Floats, v: Floats) -> Floats:
    folded = np.abs(3 * u - np.round(3 * u)) * np.float32(rng.uniform(1.5, 2.2))
    return _wave(_CYCLES * v + folded)


def _mesh(rng: Rng, u: Floats, v: Floats) -> Floats:
    lines = np.maximum(np.cos(2 * np.pi * 5 * u), np.cos(2 * np.pi * 5 * v))
    return (lines - np.float32(rng.uniform(0.7, 0.85))).astype(np.float32)


def _worms(rng: Rng, u: Floats, v: Floats) -> Floats:
    del u, v
    return np.float32(0.45) - np.abs(_noise(rng, 3.0, 5.0))


def _bricks(rng: Rng, u: Floats, v: Floats) -> Floats:
    row = np.floor(_CYCLES * v)
    across = 3 * u + row * np.float32(0.5)
    gap_u = np.abs(across - np.round(across)) * 2
    gap_v = np.abs(_CYCLES * v - np.round(_CYCLES * v))
    return np.minimum(gap_u, gap_v) - np.float32(rng.uniform(0.1, 0.16))


_TextureField = Callable[[Rng, Floats, Floats], Floats]


def _tile(rng: Rng, texture: _TextureField) -> np.ndarray:
    """A texture as palette indices, uint8 `[_TILE, _TILE]`; half of the texels on either side."""
    axis = (np.arange(_TILE, dtype=np.float32) + 0.5) / _TILE
    u, v = np.meshgrid(axis, axis)
    bend, phase = np.float32(rng.uniform(0.0, 0.02)), rng.uniform(0, 1, 2).astype(np.float32)
    field = texture(rng, u + bend * _wave(2 * v + phase[0]), v + bend * _wave(2 * u + phase[1]))
    spread = field.std()
    soft = np.tanh(field / (np.float32(0.5) * spread))
    soft = soft - soft.mean()
    soft = soft / soft.std()
    return np.clip(128 + 48 * soft, 0, 255).astype(np.uint8)


# --- motions: place (x, y), angle and size over time --------------------------------------------


@dataclass(frozen=True)
class _Path:
    """Where an object is in each frame: each field has shape `[F]`, float64."""

    x: Floats
    y: Floats
    angle: Floats
    size: Floats


def _lurch(cycle: Floats, share: float) -> Floats:
    """Grows by 1 each cycle, most of it within the first `share` of the cycle: an arrow of time."""
    whole = np.floor(cycle)
    part = np.clip((cycle - whole) / share, 0, 1)
    return whole + 1 - (1 - part) ** 2


_Motion = Callable[[Rng, Floats, float], _Path]
"""Takes a generator, the cycles passed in each frame, and +1 or -1; starts near (0, 0)."""


def _drift(rng: Rng, cycle: Floats, sign: float) -> _Path:
    way = rng.uniform(0.35, 0.5) * cycle
    tilt = rng.uniform(-0.3, 0.3)
    still = np.zeros_like(cycle)
    return _Path(sign * way * np.cos(tilt), way * np.sin(tilt), still, still + 1)


def _spin(rng: Rng, cycle: Floats, sign: float) -> _Path:
    still = np.zeros_like(cycle)
    turn = sign * (np.pi / 2) * _lurch(cycle * 2, rng.uniform(0.5, 0.7))
    return _Path(still, still, turn, still + 1)


def _pulse(rng: Rng, cycle: Floats, sign: float) -> _Path:
    still = np.zeros_like(cycle)
    part = cycle - np.floor(cycle)
    rise = np.float64(rng.uniform(0.2, 0.3))
    saw = np.where(part < rise, part / rise, (1 - part) / (1 - rise))
    return _Path(still, still, still + sign * 0.2, 0.55 + 0.7 * saw)


def _orbit(rng: Rng, cycle: Floats, sign: float) -> _Path:
    radius, turn = rng.uniform(0.2, 0.28), 2 * np.pi * sign * cycle
    still = np.zeros_like(cycle)
    return _Path(radius * np.cos(turn), radius * np.sin(turn), still, still + 1)


def _zigzag(rng: Rng, cycle: Floats, sign: float) -> _Path:
    fold = 4 * np.abs(cycle - np.round(cycle)) - 1
    height = rng.uniform(0.17, 0.25)
    still = np.zeros_like(cycle)
    return _Path(sign * 0.25 * cycle, height * fold, still, still + 1)


def _bounce(rng: Rng, cycle: Floats, sign: float) -> _Path:
    part = 2 * cycle - np.floor(2 * cycle)
    height = rng.uniform(0.35, 0.5)
    hop = 4 * part * (1 - part)
    still = np.zeros_like(cycle)
    return _Path(sign * 0.12 * cycle, height * (0.5 - hop), still, still + 1)


def _swing(rng: Rng, cycle: Floats, sign: float) -> _Path:
    length, reach = rng.uniform(0.4, 0.55), rng.uniform(0.7, 1.0)
    lean = sign * reach * np.sin(2 * np.pi * cycle)
    return _Path(length * np.sin(lean), length * (np.cos(lean) - 0.8), -lean, np.ones_like(cycle))


def _dart(rng: Rng, cycle: Floats, sign: float) -> _Path:
    way = 0.33 * _lurch(cycle * 1.5, rng.uniform(0.3, 0.4))
    tilt = sign * rng.uniform(0.6, 1.0)
    still = np.zeros_like(cycle)
    return _Path(way * np.sin(tilt), -way * np.cos(tilt), still, still + 1)


# --- classes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneClass:
    """Properties that all videos of a class share.

    Args:
        name: The class's name, which is also its folder's.
        outline: Draws the outline of the objects.
        surface: The texture of the objects.
        scenery: The texture of the background.
        motion: How the objects move.
        camera: How the background moves: sideways, around the middle, nearer, back and forth.
    """

    name: str
    outline: Callable[[Rng], Callable[[Floats, Floats], Floats]]
    surface: _TextureField
    scenery: _TextureField
    motion: _Motion
    camera: tuple[float, float, float, float]


SCENE_CLASSES = (
    SceneClass("darting-stars", _star, _stripes, _cells, _dart, (0.0, 0.0, 0.0, 1.0)),
    SceneClass("orbiting-rings", _ring, _dots, _chevrons, _orbit, (0.0, 1.0, 0.0, 0.0)),
    SceneClass("spinning-crosses", _cross, _clouds, _dots, _spin, (1.0, 0.0, 0.0, 0.0)),
    SceneClass("swinging-crescents", _crescent, _checks, _ripples, _swing, (0.0, 0.0, 0.0, 0.0)),
    SceneClass("drifting-bars", _bar, _mesh, _clouds, _drift, (-0.5, 0.5, 0.0, 0.0)),
    SceneClass("zigzagging-triangles", _triangle, _worms, _stripes, _zigzag, (0.0, 0.0, 1.0, 0.0)),
    SceneClass("pulsing-flowers", _flower, _ripples, _bricks, _pulse, (0.5, 0.0, 0.0, 0.5)),
    SceneClass("bouncing-blocks", _block, _chevrons, _worms, _bounce, (0.0, 0.5, 0.5, 0.0)),
)
"""All classes; `--classes N` uses the first N."""


# --- a video ------------------------------------------------------------------------------------


def _palette(rng: Rng) -> Floats:
    """256 colours on a line through a random colour, shape `[256, 3]`, 0 to 255."""
    middle = 108 + rng.uniform(-12, 12) + rng.uniform(-15, 15, 3)
    way = rng.choice([-1.0, 1.0]) + rng.uniform(-0.2, 0.2, 3)
    reach = rng.uniform(110, 130)
    line = np.linspace(-1.3, 1.3, 256)[:, None] * way * reach
    return np.clip(middle + line, 0, 255).astype(np.float32)


def _scenery(
    rng: Rng, scene: SceneClass, frames: int, width: int, height: int, cycle: Floats
) -> np.ndarray:
    """The background's frames, uint8 `[F, H, W, 3]`."""
    tile = _tile(rng, scene.scenery)
    colours = _palette(rng).astype(np.uint8)
    sideways, around, nearer, fro = scene.camera
    sign = rng.choice([-1.0, 1.0])
    speed = rng.uniform(0.7, 1.3)
    heading = rng.uniform(-0.4, 0.4)
    shift = speed * (0.25 * sideways * cycle + 0.08 * fro * np.sin(2 * np.pi * cycle))
    lean = rng.uniform(-0.4, 0.4) + sign * speed * 0.35 * around * cycle
    zoom = np.exp(speed * 0.25 * nearer * np.sin(np.pi * cycle))
    texels = _TILE / (_CYCLES * rng.uniform(0.11, 0.15))
    x = ((np.arange(width, dtype=np.float32) - width / 2) / height)[None, None, :]
    y = ((np.arange(height, dtype=np.float32) - height / 2) / height)[None, :, None]
    cos = (np.cos(lean) * texels / zoom).astype(np.float32)[:, None, None]
    sin = (np.sin(lean) * texels / zoom).astype(np.float32)[:, None, None]
    start = rng.uniform(0, _TILE, 2) + 64 * _TILE
    shift_u = (start[0] + texels * sign * shift * np.cos(heading)).astype(np.float32)
    shift_v = (start[1] + texels * shift * np.sin(heading)).astype(np.float32)
    column = (x * cos + y * sin + shift_u[:, None, None]).astype(np.int32) % _TILE
    row = (y * cos - x * sin + shift_v[:, None, None]).astype(np.int32) % _TILE
    return colours[np.take(tile.ravel(), row * _TILE + column)]


def _paint_objects(
    rng: Rng, scene: SceneClass, video: np.ndarray, cycle: Floats, count: int
) -> None:
    """Paint the moving objects over the frames, in place."""
    frames, height, width, _ = video.shape
    aspect = width / height
    tile = _tile(rng, scene.surface).ravel()
    colours = _palette(rng)
    outline = scene.outline(rng)
    radius = rng.uniform(0.2, 0.3) * (3 / count) ** 0.5
    texels = _TILE / (_CYCLES * rng.uniform(0.09, 0.12))
    sign = rng.choice([-1.0, 1.0])
    places = (np.arange(count) + rng.uniform(0.3, 0.7, count)) / count * aspect
    rng.shuffle(places)
    for place in places:
        path = scene.motion(rng, cycle + rng.uniform(0, 1), sign)
        own = radius * rng.uniform(0.85, 1.15)
        margin = own * 1.3
        x = np.mod(place + path.x + margin, aspect + 2 * margin) - margin
        y = rng.uniform(0.3, 0.7) + path.y
        y = np.mod(y + margin, 1 + 2 * margin) - margin
        angle = rng.uniform(-0.4, 0.4) + path.angle
        size_px = (own * height * path.size).astype(np.float32)[:, None, None]
        half_px = int(np.ceil(size_px.max() * 1.05)) + 1
        x_px, y_px = x * height, y * height
        left, top = np.floor(x_px).astype(int), np.floor(y_px).astype(int)
        steps = np.arange(-half_px, half_px + 1, dtype=np.float32)
        dx = steps[None, None, :] - (x_px - left).astype(np.float32)[:, None, None]
        dy = steps[None, :, None] - (y_px - top).astype(np.float32)[:, None, None]
        cos = np.cos(angle).astype(np.float32)[:, None, None]
        sin = np.sin(angle).astype(np.float32)[:, None, None]
        u, v = (dx * cos + dy * sin) / size_px, (dy * cos - dx * sin) / size_px
        cover = np.clip(np.float32(0.5) - outline(u, v) * size_px, 0, 1)
        grain = np.float32(own * texels)
        column = (u * grain + 8 * _TILE).astype(np.int32) % _TILE
        row = (v * grain + 8 * _TILE).astype(np.int32) % _TILE
        paint = colours[np.take(tile, row * _TILE + column)]
        for frame in range(frames):
            y0, x0 = top[frame] - half_px, left[frame] - half_px
            rows = slice(max(y0, 0), min(y0 + len(steps), height))
            cols = slice(max(x0, 0), min(x0 + len(steps), width))
            if rows.start >= rows.stop or cols.start >= cols.stop:
                continue
            inner = (
                slice(rows.start - y0, rows.stop - y0),
                slice(cols.start - x0, cols.stop - x0),
            )
            part = cover[frame][inner][..., None]
            under = video[frame, rows, cols]
            video[frame, rows, cols] = under + part * (paint[frame][inner] - under)


def draw_video(
    label: int, index: int, *, seed: int, frames: int, width: int, height: int
) -> np.ndarray:
    """Draw one video; it depends only on the arguments.

    Args:
        label: The class's place in `SCENE_CLASSES`.
        index: Which video of the class.
        seed: The data set's seed.
        frames: F.
        width: W, pixels.
        height: H, pixels.

    Returns:
        Shape `[F, H, W, 3]`, uint8, RGB.
    """
    scene = SCENE_CLASSES[label]
    rng = np.random.default_rng((seed, label, index))
    cycle = np.arange(frames) / rng.uniform(13, 19) + rng.uniform(0, 1)
    video = _scenery(rng, scene, frames, width, height, cycle)
    _paint_objects(rng, scene, video, cycle, int(rng.integers(2, 5)))
    return video
