"""The published training of this method, to compare with: frame files, pools of negatives, fp32.

Written from the description of the authors' release (method.md, Part II: 1.1 to 1.3, 4 and 9.15)
for `tools/bench.py published` only; nothing trains with it. Where the description leaves a choice,
the faster one is taken, so that the comparison is fair:

- only the frames that a sample needs are opened, not all of the video's, and they have the shards'
  small size where the release's users keep larger ones;
- batches travel as uint8, a quarter of the release's float32, and are normalised on the device;
- Sinkhorn, the prototype loss, the retrieval loss and the model are Strata's own.
"""

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as vision

from strata.dataload.clips import ClipSpec, training_window
from strata.dataload.reader import ShardReader
from strata.train.losses.prototypical import hard_labels, prototype_loss, sinkhorn
from strata.train.losses.temporal import retrieval_loss
from strata.train.method.model import Embeddings, VideoModel
from strata.train.method.settings import MethodConfig

__all__ = [
    "FrameFiles",
    "PublishedModel",
    "adam",
    "graph_by_rows",
    "pool_contrast",
    "published_loss",
    "write_frame_files",
]

_FRAME_SIZE = (200, 150)
"""Columns and rows that every frame is brought to right after decoding."""


class FrameFiles(Dataset[Tensor]):
    """Samples from folders of JPEG frames: `<root>/<video>/image_%05d.jpg`, numbered from 1.

    Args:
        root: The folder of folders.
        clips: The window; its long sequence is every second frame.
        size: Rows and columns of a view.
        length: Total number of samples; videos repeat where there are fewer.
    """

    def __init__(self, root: Path, clips: ClipSpec, size: int, length: int) -> None:
        self.videos = sorted(p for p in root.iterdir() if p.is_dir())
        self.counts = [len(list(video.iterdir())) for video in self.videos]
        self.clips, self.size, self.length = clips, size, length

    def __len__(self) -> int:
        """Total number of samples."""
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        """`[3, T, S, S, 3]`, uint8: two short clips and the long one."""
        # A generator per sample: the release's workers repeat each other's draws (its item 8).
        rng = np.random.default_rng(index)
        video = index % len(self.videos)
        window = training_window(
            np.array([self.counts[video]]), self.clips, rng.uniform(size=(1, 2))
        )[0]
        frames = [self._open(video, frame) for frame in window]
        half = len(frames) // 2
        views = (frames[:half], frames[half:], frames[::2])
        return torch.stack([self._augment(view, rng) for view in views])

    def _open(self, video: int, frame: int) -> Image.Image:
        with Image.open(self.videos[video] / f"image_{frame + 1:05d}.jpg") as picture:
            return picture.convert("RGB").resize(_FRAME_SIZE)

    def _augment(self, frames: list[Image.Image], rng: np.random.Generator) -> Tensor:
        left, top, width, height = self._crop(rng)
        box = (left, top, left + width, top + height)
        mirrored = rng.uniform() < 0.5
        done = []
        for frame in frames:
            shown = frame.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
            if mirrored:
                shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if rng.uniform() < 0.5:
                channel = shown.getchannel(int(rng.integers(3)))
                shown = Image.merge("RGB", (channel, channel, channel))
            done.append(np.asarray(_jitter(shown, rng)))
        return torch.from_numpy(np.stack(done))

    @staticmethod
    def _crop(rng: np.random.Generator) -> tuple[int, int, int, int]:
        columns, rows = _FRAME_SIZE
        for _ in range(10):
            area = rng.uniform(0.5, 1.0) * columns * rows
            aspect = rng.uniform(3 / 4, 4 / 3)
            width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if rng.uniform() < 0.5:
                width, height = height, width
            if width <= columns and height <= rows:
                left = int(rng.integers(columns - width + 1))
                return left, int(rng.integers(rows - height + 1)), width, height
        return (columns - rows) // 2, 0, rows, rows


def _jitter(frame: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation .5 and hue .25, in random order, drawn for each frame."""
    for step in rng.permutation(4):
        match int(step):
            case 0:
                frame = ImageEnhance.Brightness(frame).enhance(rng.uniform(0.5, 1.5))
            case 1:
                frame = ImageEnhance.Contrast(frame).enhance(rng.uniform(0.5, 1.5))
            case 2:
                frame = ImageEnhance.Color(frame).enhance(rng.uniform(0.5, 1.5))
            case _:
                turned: Any = vision.adjust_hue(cast(Any, frame), rng.uniform(-0.25, 0.25))
                frame = turned
    return frame


def write_frame_files(reader: ShardReader, root: Path, num_videos: int) -> None:
    """The first videos of a set as the folders that `FrameFiles` reads."""
    for sample in range(min(num_videos, reader.num_samples)):
        folder = root / f"{sample:06d}"
        folder.mkdir(parents=True)
        frames = np.arange(int(reader.num_frames[sample]))
        with Image.open(io.BytesIO(reader.strip(sample, frames).tobytes())) as picture:
            rows = np.asarray(picture.convert("RGB"))
        form = reader.manifest.form
        for number, frame in enumerate(rows.reshape(-1, form.height, form.width, 3), start=1):
            path = folder / f"image_{number:05d}.jpg"
            Image.fromarray(frame).save(path, quality=form.quality)


class PublishedModel(VideoModel):
    """The same network on inputs laid out channels first."""

    def _seen(self, clips: Tensor, mean: Tensor, scale: Tensor, second_of: int) -> Tensor:
        return super()._seen(clips, mean, scale, second_of).contiguous()


def pool_contrast(
    clips_BVC: Tensor, altered_BMC: Tensor | None = None, *, temperature: float = 0.07
) -> Tensor:
    """L_ins, or L_aug with altered clips: each anchor with a pool of its negatives, ratio of exps.

    The value of `strata.train.losses.instance.pair_contrast`; memory O(B^2 C).
    """
    clips = functional.normalize(clips_BVC, dim=2)
    altered = None if altered_BMC is None else functional.normalize(altered_BMC, dim=2)
    pools = []
    for video in range(len(clips)):
        negatives = [clips[:video].flatten(0, 1), clips[video + 1 :].flatten(0, 1)]
        if altered is not None:
            negatives.append(altered[video])
        pool = torch.cat(negatives)
        pools += [pool, pool]
    pool_ANC = torch.stack(pools)
    anchor_AC, positive_AC = clips.flatten(0, 1), clips.flip(1).flatten(0, 1)
    positive = ((anchor_AC * positive_AC).sum(dim=1) / temperature).exp()
    negative = ((anchor_AC[:, None] * pool_ANC).sum(dim=2) / temperature).exp().sum(dim=1)
    return -(positive / (positive + negative)).log().mean()


@torch.no_grad()
def graph_by_rows(
    clips_BVC: Tensor, labels_B: Tensor, *, temperature: float = 0.07, threshold: float = 0.05
) -> Tensor:
    """E, `[B, B]`: the semantic graph built row by row."""
    clips = functional.normalize(clips_BVC, dim=2)
    w = (clips[:, 0] @ clips[:, 1].T / temperature).softmax(dim=1)
    semantic = torch.zeros_like(w)
    for row in range(len(w)):
        semantic[row, labels_B == labels_B[row]] = 1.0
    keep = (w >= threshold) | torch.eye(len(w), dtype=torch.bool, device=w.device)
    kept = w * keep * semantic
    return kept / kept.sum(dim=1, keepdim=True)


def published_loss(
    model: VideoModel, out: Embeddings, config: MethodConfig, *, use_queue: bool
) -> Tensor:
    """The weighted total of a step, on one process."""
    model.queue.push(out.scores.detach())
    num_rows = len(model.queue) if use_queue else len(out.scores)
    assignments = sinkhorn(model.queue.rows()[-num_rows:], epsilon=config.sinkhorn_epsilon)
    assignments = assignments[-len(out.scores) :]
    weights, tau = config.weights, config.temperature
    total = weights.instance * pool_contrast(out.instance, temperature=tau)
    total = total + weights.prototype * prototype_loss(
        out.scores, assignments, temperature=config.prototype_temperature
    )
    if out.graph:
        target = graph_by_rows(
            out.instance.detach(),
            hard_labels(assignments),
            temperature=tau,
            threshold=config.graph_threshold,
        )
        for level, embedded in out.graph.items():
            unit = functional.normalize(embedded, dim=2)
            pi = (unit[:, 0] @ unit[:, 1].T / tau).softmax(dim=1)
            divisor = target.numel() if config.graph_divides_by_batch else len(target)
            cross_entropy = -(target * (pi + 1e-10).log()).sum() / divisor
            total = total + getattr(weights, f"graph_{level}") * cross_entropy
    for level, clips in out.clips.items():
        term = pool_contrast(clips, out.altered[level].flatten(1, 2), temperature=tau)
        total = total + getattr(weights, f"augmentation_{level}") * term
    for level, long_steps in out.long_steps.items():
        term = retrieval_loss(out.steps[level], long_steps, temperature=tau)
        total = total + getattr(weights, f"retrieval_{level}") * term
    return total


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The release's optimiser: Adam with L2 in the gradient."""
    return torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
