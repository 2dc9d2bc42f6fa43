"""L_ins: two clips of a video attract, clips of other videos repel.

Shape suffixes: B videos of the global batch, R anchor videos (R = B unless a slice is given),
V = 2 views, C embedding size, M altered clips of each anchor's video.
"""

import torch
from torch import Tensor
from torch.nn import functional

from strata.train.losses.precision import full_precision, require_pairs, unit_length

__all__ = ["instance_loss", "pair_contrast"]


@full_precision
def pair_contrast(
    clips_BVC: Tensor,
    *,
    temperature: float,
    altered_RMC: Tensor | None = None,
    anchors: slice | None = None,
) -> Tensor:
    r"""Contrastive loss of two views, with all other clips and optional altered ones as negatives.

    As loops, with s(a, b) = <a, b> / tau of vectors at unit length::

        for i in anchors, v in (1, 2):
            positive = s(z[i, v], z[i, 3 - v])
            others = [s(z[i, v], z[j, u]) for j != i, u in (1, 2)]
            altered = [s(z[i, v], w) for w in altered[i]]
            total += log(exp(positive) + sum(exp(others + altered))) - positive
        return total / (2 R)

    computed as one `[2R, 2B + M]` matrix of logits with the anchors' own entries masked, so memory
    is O(B^2 + B C) where a pool of negatives per anchor takes O(B^2 C).

    Args:
        clips_BVC: `[B, 2, C]`, embeddings of the global batch; normalised here.
        temperature: tau, above 0.
        altered_RMC: `[R, M, C]`, altered clips of the anchors' own videos: more negatives, no more
            anchors. None for L_ins.
        anchors: Which videos are anchors, a slice of the global batch with both ends; all of them
            if None. With gradient through the gathered batch, the mean over ranks of the losses of
            their slices is the loss of the global batch, and each rank does only its share.

    Returns:
        Scalar, nats.

    Raises:
        ConfigError: Fewer than two videos, or not two views.
    """
    num_videos, num_views, _ = clips_BVC.shape
    require_pairs(num_videos, "L_ins or L_aug")
    if num_views != 2:
        # The positive of a clip is the only other clip of its video.
        raise ValueError(f"expected two views in dimension 1, got shape {tuple(clips_BVC.shape)}")
    first, last, _ = (anchors or slice(None)).indices(num_videos)

    # Video-major rows: the views of a video are adjacent, so the positive is at row XOR 1.
    clips = unit_length(clips_BVC).flatten(0, 1)
    row = torch.arange(2 * first, 2 * last, device=clips.device)
    anchor = clips[2 * first : 2 * last]
    logits = anchor @ clips.T / temperature
    logits = logits.scatter(1, row[:, None], -torch.inf)
    if altered_RMC is not None:
        altered = unit_length(altered_RMC)
        own = anchor.unflatten(0, (-1, 2)) @ altered.transpose(1, 2) / temperature
        logits = torch.cat([logits, own.flatten(0, 1)], dim=1)
    return functional.cross_entropy(logits, row ^ 1)


def instance_loss(
    clips_BVC: Tensor, *, temperature: float = 0.07, anchors: slice | None = None
) -> Tensor:
    """L_ins, instance discrimination at the high level: NT-Xent over two clips of each video.

    Source: method.md 4.1; Chen et al., SimCLR, arXiv 2002.05709, eq. 1. One positive and 2(B - 1)
    negatives; no momentum encoder. Deviation from the release: log-sum-exp instead of the log of a
    ratio of exponentials (its item 9), the same value.

    Args:
        clips_BVC: `[B, 2, C]`, see `pair_contrast`.
        temperature: tau.
        anchors: See `pair_contrast`.

    Returns:
        Scalar, nats; chance level log(2B - 1).

    Raises:
        ConfigError: Fewer than two videos.
    """
    return pair_contrast(clips_BVC, temperature=temperature, anchors=anchors)
