"""Label-free measures of the representation's health, which the losses do not show.

Every function returns scalars on the device of its input without waiting for the device (except
`embedding_health`, see there); read them every N steps. The reasons are in method.md, end of
Part I.

Shape suffixes: B videos, S videos in the queue, N clips, V = 2 views, A alterations, C embedding
size, K prototypes.
"""

import math

import torch
from torch import Tensor

from strata.train.losses.graph import DistributionGraphs
from strata.train.losses.precision import full_precision, unit_length

__all__ = [
    "IDENTITY_MASS",
    "alteration_health",
    "chance_levels",
    "embedding_health",
    "graph_health",
    "graph_in_words",
    "health_series",
    "prototype_health",
]

IDENTITY_MASS = 1e-3
"""Off-diagonal mass of E below which the graph is treated as the identity."""


@torch.no_grad()
def graph_health(graphs: DistributionGraphs, anchors: slice | None = None) -> dict[str, Tensor]:
    """Distance of the graph from the identity, at which the constraint is only an InfoNCE.

    Args:
        graphs: The rows of the anchors; the mean over ranks is that of the global batch.
        anchors: As in `distribution_graphs`.

    Returns:
        `graph_off_diagonal_mass`: mean over rows of E's weight of other videos, in [0, 1);
        `graph_semantic_partners`: other videos of the same prototype, mean over rows;
        `graph_instance_partners`: other videos above eta, mean over rows.
    """
    off_diagonal = 1 - graphs.target_RB.diagonal((anchors or slice(None)).start or 0)
    dtype = graphs.target_RB.dtype
    return {
        "graph_off_diagonal_mass": off_diagonal.mean(),
        "graph_semantic_partners": graphs.semantic_RB.sum(dim=1).to(dtype).mean() - 1,
        "graph_instance_partners": (graphs.instance_RB > 0).sum(dim=1).to(dtype).mean() - 1,
    }


def graph_in_words(mass: float) -> str:
    """Describe the meaning of `graph_off_diagonal_mass` for the graph constraint."""
    if mass < IDENTITY_MASS:
        return (
            "the graph is the identity: no video is connected to another one, and L_gr only "
            "separates a video's two views from other videos"
        )
    return f"the graph gives {mass:.1%} of a video's weight to other videos"


@full_precision
@torch.no_grad()
def prototype_health(scores_SVK: Tensor, assignments_SVK: Tensor) -> dict[str, Tensor]:
    """Number and entropy of the used prototypes, before and after Sinkhorn.

    Sinkhorn distributes even a collapsed representation over all prototypes; only the nearest
    prototypes show the collapse.

    Args:
        scores_SVK: `[S, V, K]`, the input of Sinkhorn.
        assignments_SVK: `[S, V, K]`, its result.

    Returns:
        `prototypes_in_use`: distinct prototypes among the samples' largest scores; and
        `prototype_entropy_nats`: entropy of their use, at most log K;
        `assigned_prototypes_in_use`, `assigned_prototype_entropy_nats`: the same of the largest
        assignments.
    """
    health: dict[str, Tensor] = {}
    for prefix, values in (("", scores_SVK), ("assigned_", assignments_SVK)):
        nearest = values.argmax(dim=2).flatten()
        # Not bincount: it waits for the device to read the largest index.
        counts = values.new_zeros(values.shape[2])
        counts.scatter_add_(0, nearest, values.new_ones(()).expand_as(nearest))
        health[f"{prefix}prototypes_in_use"] = (counts > 0).sum().to(values.dtype)
        share = counts / nearest.numel()
        health[f"{prefix}prototype_entropy_nats"] = torch.special.entr(share).sum()
    return health


@full_precision
@torch.no_grad()
def alteration_health(clips_BVC: Tensor, altered_BAVC: Tensor) -> dict[str, Tensor]:
    """Cosine between a clip's embedding and that of the altered clip; 1 means blind to time.

    Args:
        clips_BVC: `[B, V, C]`.
        altered_BAVC: `[B, A, V, C]`, the same clips.

    Returns:
        `cosine_altered_<a>` for each alteration, counted from 0 in the order given.
    """
    cosine = (unit_length(clips_BVC)[:, None] * unit_length(altered_BAVC)).sum(dim=3)
    means = cosine.mean(dim=(0, 2))
    return {f"cosine_altered_{a}": means[a] for a in range(means.shape[0])}


@full_precision
@torch.no_grad()
def embedding_health(embeddings_NC: Tensor) -> dict[str, Tensor]:
    """Spread and effective rank of normalised embeddings.

    Only the eigenvalues wait for a CUDA device, because the solver checks its result: of a C x C
    matrix, once every N steps.

    Args:
        embeddings_NC: `[N, C]`, any length.

    Returns:
        `embedding_std`: standard deviation per dimension, averaged over dimensions, times sqrt(C):
        1 for directions uniform on the sphere, 0 if collapsed to a point;
        `embedding_effective_rank`: exp of the entropy of the covariance's eigenvalues, from 1 to
        min(C, N - 1); 0 if collapsed (Roy and Vetterli, EUSIPCO 2007, with eigenvalues in place of
        singular values).
    """
    unit = unit_length(embeddings_NC)
    centred = unit - unit.mean(dim=0)
    num_clips, size = unit.shape
    variance = centred.square().mean(dim=0)
    # The solver raises on NaN; the training loop reports losses that are not finite.
    covariance = (centred.T @ centred / num_clips).nan_to_num()
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    total = eigenvalues.sum()
    # By rounding, a collapsed covariance is about eps^2 and not 0.
    collapsed = total <= torch.finfo(unit.dtype).eps ** 2 * size
    share = torch.where(collapsed, torch.zeros_like(eigenvalues), eigenvalues / total)
    rank = torch.special.entr(share).sum().exp()
    return {
        "embedding_std": variance.sqrt().mean() * math.sqrt(size),
        "embedding_effective_rank": torch.where(collapsed, torch.zeros_like(rank), rank),
    }


def chance_levels(
    *,
    num_videos: int,
    num_prototypes: int,
    num_alterations: int,
    num_long_steps: dict[str, int],
    divide_by_batch: bool = False,
) -> dict[str, float]:
    """Value of each contrastive loss in nats if all its candidates are equal.

    Args:
        num_videos: B, the global batch.
        num_prototypes: K.
        num_alterations: A, altered copies of each clip in L_aug.
        num_long_steps: Time steps of the long clip for each level, by the level's name.
        divide_by_batch: As in `graph_loss`.

    Returns:
        Values by the names `instance`, `prototype`, `augmentation`, `graph`, `distillation`,
        `retrieval_<level>`.
    """
    graph = math.log(num_videos)
    return {
        "instance": math.log(2 * num_videos - 1),
        "prototype": math.log(num_prototypes),
        "augmentation": math.log(2 * num_videos - 1 + 2 * num_alterations),
        "graph": graph / num_videos if divide_by_batch else graph,
        "distillation": math.log(num_videos),
        **{f"retrieval_{level}": math.log(t) for level, t in num_long_steps.items()},
    }


_SERIES: dict[str, tuple[str, dict[str, str]]] = {
    "embedding_std": ("strata_embedding_std", {}),
    "embedding_effective_rank": ("strata_embedding_effective_rank", {}),
    "prototypes_in_use": ("strata_prototypes_in_use", {"of": "scores"}),
    "assigned_prototypes_in_use": ("strata_prototypes_in_use", {"of": "assignments"}),
    "prototype_entropy_nats": ("strata_prototype_entropy_nats", {"of": "scores"}),
    "assigned_prototype_entropy_nats": ("strata_prototype_entropy_nats", {"of": "assignments"}),
    "graph_off_diagonal_mass": ("strata_graph_off_diagonal_ratio", {}),
    "graph_semantic_partners": ("strata_graph_partners", {"graph": "semantic"}),
    "graph_instance_partners": ("strata_graph_partners", {"graph": "instance"}),
}
"""The metric and labels of each measure; one unit a metric."""


def health_series(measure: str) -> tuple[str, dict[str, str]]:
    """The metric and the labels of a measure of the health.

    Raises:
        KeyError: It is not one of the measures of this file.
    """
    if measure.startswith("cosine_altered_"):
        alteration, level = measure.removeprefix("cosine_altered_").split("_")
        return "strata_altered_cosine", {"alteration": alteration, "level": level}
    return _SERIES[measure]
