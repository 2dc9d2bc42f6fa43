"""L_aug and L_ret: the two losses that make low and mid levels sensitive to time.

Shape suffixes: B videos (of the global batch in L_aug, any in L_ret), R anchor videos, A
alterations, V = 2 short views, T time steps of a short clip, L those of the long clip, C embedding
size.
"""

import torch
from torch import Tensor
from torch.nn import functional

from strata.errors import ConfigError
from strata.train.losses.instance import pair_contrast
from strata.train.losses.precision import full_precision, unit_length

__all__ = ["augmentation_loss", "retrieval_loss"]


def augmentation_loss(
    clips_BVC: Tensor,
    altered_RAVC: Tensor,
    *,
    temperature: float = 0.07,
    anchors: slice | None = None,
) -> Tensor:
    """L_aug: L_ins with temporally altered clips of the same video as additional negatives.

    `instance.pair_contrast` has it as loops. Anchors and positives are originals only; altered
    clips of other videos are not used; gradient flows into both branches. If the alterations are
    invisible to the features, the loss cannot fall below log(1 + 2A): log 3 for reversal, log 5 for
    reversal and shuffle.

    Source: method.md 4.4, and TEXT 2 for the shuffle.

    Args:
        clips_BVC: `[B, 2, C]`, originals of the global batch.
        altered_RAVC: `[R, A, 2, C]`, the anchors' videos altered; A = 1 for reversal alone.
        temperature: tau.
        anchors: See `instance.pair_contrast`.

    Returns:
        Scalar, nats; chance level log(2B - 1 + 2A).

    Raises:
        ConfigError: Fewer than two videos.
    """
    return pair_contrast(
        clips_BVC,
        temperature=temperature,
        altered_RMC=altered_RAVC.flatten(1, 2),
        anchors=anchors,
    )


@full_precision
def retrieval_loss(short_BVTC: Tensor, long_BLC: Tensor, *, temperature: float = 0.07) -> Tensor:
    """L_ret: match each time step of the long clip with the overlapping short-clip step.

    As loops, with unit-length steps and S the short clips' steps, pooled so that there are L of
    them, joined along time::

        for i:
            A = [[<S[i, s], O[i, t]> / tau for t] for s]
            for t: total += CE(A[t, :], t) + CE(A[:, t], t)
        return total / (2 B L)

    A dense long clip (all 32 frames, TEXT 2) has L = 2T steps, and nothing is pooled. A strided one
    (every second frame, the release) has L = T, and neighbouring steps of the short clips are
    averaged. The shapes decide between the two. Negatives are other steps of the same
    video only, so a rank may give its own videos.

    Source: method.md 4.5; the dense form Part I.

    Args:
        short_BVTC: `[B, 2, T, C]`, embeddings of the short clips' steps, the first view earlier.
        long_BLC: `[B, L, C]`, L = 2T or a divisor of it that pools complete steps.
        temperature: tau.

    Returns:
        Scalar, nats; chance level log L.

    Raises:
        ConfigError: The steps of the short clips cannot be pooled to those of the long one.
    """
    num_views, num_steps = short_BVTC.shape[1:3]
    num_long = long_BLC.shape[1]
    pool, rest = divmod(num_views * num_steps, num_long)
    if rest or pool == 0 or num_steps % pool:
        raise ConfigError(
            f"L_ret: {num_views} short clips of {num_steps} steps cannot be lined up with a long "
            f"clip of {num_long}; let the long clip span both, densely or at twice the stride"
        )
    # [B, V, T/pool, pool, C]: averages of adjacent steps, never across the two clips.
    short = short_BVTC.unflatten(2, (num_steps // pool, pool)).mean(dim=3).flatten(1, 2)
    logits = unit_length(short) @ unit_length(long_BLC).transpose(1, 2) / temperature
    step = torch.arange(num_long, device=logits.device).expand(len(logits), -1)
    by_row = functional.cross_entropy(logits.transpose(1, 2), step)
    by_column = functional.cross_entropy(logits, step)
    return (by_row + by_column) / 2
