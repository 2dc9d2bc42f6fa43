"""L_pro: a clip predicts the prototype assignment of the other clip, computed by Sinkhorn.

Shape suffixes: B videos of the batch, S videos given to Sinkhorn (the queue's rows, the current
batch last), V = 2 views, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from strata.train.losses.precision import full_precision, require_pairs

__all__ = ["hard_labels", "prototype_loss", "sinkhorn"]


@full_precision
@torch.no_grad()
def sinkhorn(scores_SVK: Tensor, *, epsilon: float = 0.05, num_iterations: int = 3) -> Tensor:
    """Assign samples to prototypes so that all are used equally often, without gradient.

    As loops, for each view separately, with Q = exp(scores / epsilon)::

        for _ in range(num_iterations):
            for k: Q[:, k] /= sum(Q[:, k])     # every prototype has the same mass
            for s: Q[s, :] /= sum(Q[s, :])     # every sample has the same mass

    in the log domain, without under- or overflow for any epsilon. Factors common to a row or a
    column (the 1/K and 1/S of the usual form) cancel in the next step and are omitted.

    Source: method.md 4.2; Caron et al., SwAV, arXiv 2006.09882, section 3.1 and appendix A;
    Cuturi, arXiv 1306.0895.

    Args:
        scores_SVK: `[S, V, K]`, cosines with the prototypes; the global batch or the queue, so that
            all ranks compute the same.
        epsilon: Regularisation, above 0; a small value gives nearly one-hot assignments.
        num_iterations: Number of iterations, at least 1.

    Returns:
        `[S, V, K]`, each row sums to 1.

    Raises:
        ConfigError: Fewer than two samples, for which the assignment is always uniform.
    """
    require_pairs(scores_SVK.shape[0], "Sinkhorn")
    log_q = scores_SVK / epsilon
    for _ in range(num_iterations):
        log_q -= log_q.logsumexp(dim=0, keepdim=True)
        log_q -= log_q.logsumexp(dim=2, keepdim=True)
    return log_q.exp_()


@torch.no_grad()
def hard_labels(assignments_BVK: Tensor) -> Tensor:
    """Hard label of a video: argmax over prototypes of the views' summed assignments (4.2).

    Returns:
        `[B]`, int64.
    """
    return assignments_BVK.sum(dim=1).argmax(dim=1)


@full_precision
def prototype_loss(
    scores_BVK: Tensor, assignments_BVK: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """L_pro: cross-entropy of each view's prediction against the other view's assignment.

    As loops::

        for i, v in (1, 2), k:
            total -= q[i, 3 - v, k] * log_softmax(scores[i, v] / temperature)[k]
        return total / (2 B)

    Source: method.md 4.2; SwAV, arXiv 2006.09882, eq. 2. Deviation from the release: log_softmax
    instead of log(p + 1e-10), which drops the gradient of the worst predictions (its item 10).
    There is no term between samples, so a rank may pass only its own videos.

    Args:
        scores_BVK: `[B, 2, K]`, with gradient.
        assignments_BVK: `[B, 2, K]`, the rows of `sinkhorn` for the same videos; taken as
            constants.
        temperature: Temperature of the prediction, above 0; the release's 0.1, not tau.

    Returns:
        Scalar, nats; chance level log K.
    """
    log_p = functional.log_softmax(scores_BVK / temperature, dim=2)
    swapped = assignments_BVK.detach().flip(1)
    return -(swapped * log_p).sum(dim=2).mean()
