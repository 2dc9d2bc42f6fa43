"""The graph constraint: lower levels follow the distribution graphs of the high level.

Shape suffixes: B videos of the global batch (rows: first view; columns, also B: second view),
R anchor videos (R = B unless a slice is given), V = 2 views, C embedding size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from strata.train.losses.precision import full_precision, require_pairs, unit_length

__all__ = ["DistributionGraphs", "distribution_graphs", "graph_loss"]


class DistributionGraphs(NamedTuple):
    """Graphs of the similarity of videos at the high level, without gradient."""

    instance_RB: Tensor
    """G_ins: similarities of view 1 to view 2, softmax over columns, those below eta set to 0
    except an anchor's with itself; rows do not sum to 1."""
    semantic_RB: Tensor
    """G_sem: bool, whether two videos have the same prototype; true for an anchor itself."""
    target_RB: Tensor
    """E: the product of both, normalised; rows sum to 1, an anchor's own weight is above 0."""


@full_precision
@torch.no_grad()
def distribution_graphs(
    clips_BVC: Tensor,
    labels_B: Tensor,
    *,
    temperature: float = 0.07,
    threshold: float = 0.05,
    anchors: slice | None = None,
) -> DistributionGraphs:
    """Compute G_ins, G_sem and the soft targets E, or the rows of them that a rank needs.

    As loops, with s(a, b) = <a, b> / tau of vectors at unit length::

        for i: W[i, :] = softmax([s(z[i, 1], z[j, 2]) for j])
        for i, j: G_ins[i, j] = W[i, j] if W[i, j] >= eta or i == j else 0
        for i, j: G_sem[i, j] = y[i] == y[j]
        for i, j: E[i, j] = G_ins[i, j] * G_sem[i, j] / sum_k(G_ins[i, k] * G_sem[i, k])

    E is a softmax over the kept logits, so a tiny diagonal cannot make it 0/0 (the release's
    item 12). With eta = 0.05 a row of G_ins keeps at most 20 entries.

    Source: method.md 4.6.

    Args:
        clips_BVC: `[B, 2, C]`, the embeddings of L_ins; the global batch.
        labels_B: `[B]`, int, see `prototypical.hard_labels`.
        temperature: tau.
        threshold: eta, in [0, 1].
        anchors: The rows to compute, a slice of the global batch with both ends; all if None. Of 8
            videos or more they are those of the complete graphs to the bit; of fewer, a matrix
            product may round them in another order.

    Returns:
        The three graphs.

    Raises:
        ConfigError: Fewer than two videos.
    """
    require_pairs(clips_BVC.shape[0], "the graph")
    rows = anchors or slice(None)
    clips = unit_length(clips_BVC)
    log_w = functional.log_softmax(clips[rows, 0] @ clips[:, 1].T / temperature, dim=1)
    w = log_w.exp()
    keep = w >= threshold
    keep.diagonal(rows.start or 0).fill_(True)
    semantic = labels_B[rows, None] == labels_B[None, :]
    target = log_w.masked_fill(~(keep & semantic), -torch.inf).softmax(dim=1)
    return DistributionGraphs(w * keep, semantic, target)


@full_precision
def graph_loss(
    clips_BVC: Tensor,
    target_RB: Tensor,
    *,
    temperature: float = 0.07,
    anchors: slice | None = None,
    divide_by_batch: bool = False,
) -> Tensor:
    """L_gr, the graph constraint: cross-entropy of a level's distribution over videos and E.

    As loops, with s(a, b) = <a, b> / tau of vectors at unit length::

        for i in anchors:
            log_pi = log_softmax([s(g[i, 1], g[j, 2]) for j])
            total -= sum(E[i, j] * log_pi[j] for j)
        return total / R            # / B once more, if divide_by_batch

    Source: method.md 4.7. Deviation from the release: log_softmax instead of log(p + 1e-10); and
    the mean is over rows, while the release's last commit averages over both indices, which makes
    its term 1/B of a cross-entropy.

    Args:
        clips_BVC: `[B, 2, C]`, the level's graph embeddings of the global batch.
        target_RB: `[R, B]`, the anchors' rows of E; treated as constant.
        temperature: tau.
        anchors: The rows of the loss, a slice of the global batch; all if None.
        divide_by_batch: The release's extra 1/B.

    Returns:
        Scalar, nats; chance level log B (log B / B with `divide_by_batch`).

    Raises:
        ConfigError: Fewer than two videos.
    """
    num_videos = clips_BVC.shape[0]
    require_pairs(num_videos, "the graph constraint")
    rows = anchors or slice(None)
    clips = unit_length(clips_BVC)
    log_pi = functional.log_softmax(clips[rows, 0] @ clips[:, 1].T / temperature, dim=1)
    loss = -(target_RB.detach() * log_pi).sum(dim=1).mean()
    return loss / num_videos if divide_by_batch else loss
