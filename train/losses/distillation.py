"""L_dis: a clip's embedding finds the features that a frozen teacher gives its video.

Shape suffixes: B videos of the global batch, R anchor videos (R = B unless a slice is given),
V = 2 views, C channels of the teacher's features.
"""

import torch
from torch import Tensor
from torch.nn import functional

from strata.train.losses.precision import full_precision, require_pairs, unit_length

__all__ = ["distillation_loss"]


@full_precision
def distillation_loss(
    student_RVC: Tensor,
    teacher_BVC: Tensor,
    *,
    temperature: float = 0.07,
    anchors: slice | None = None,
) -> Tensor:
    r"""L_dis: InfoNCE between a student's embeddings and a frozen teacher's features.

    As loops, with s(a, b) = <a, b> / tau of vectors at unit length::

        for i in anchors, v in (1, 2), u in (1, 2):
            total += log(sum(exp(s(z[i, v], t[j, u])) for all j)) - s(z[i, v], t[i, u])
        return total / (4 R)

    Source: Tian et al., CRD, ICLR 2020 (arXiv 1910.10699), here with the batch as the negatives and
    without their memory bank. That an RGB network can learn what one on motion knows: Crasto et
    al., MARS, CVPR 2019.

    Args:
        student_RVC: `[R, 2, C]`, embeddings of the anchors; normalised here.
        teacher_BVC: `[B, 2, C]`, features of the global batch; normalised here.
        temperature: tau, above 0.
        anchors: Which videos are anchors, a slice of the global batch with both ends; all of them
            if None. The mean over ranks of the losses of their slices is that of the global batch.

    Returns:
        Scalar, nats; chance level log B.

    Raises:
        ConfigError: Fewer than two videos.
    """
    num_videos, num_views, _ = teacher_BVC.shape
    require_pairs(num_videos, "L_dis")
    first, last, _ = (anchors or slice(None)).indices(num_videos)
    student, teacher = unit_length(student_RVC), unit_length(teacher_BVC)
    # [R, V, V, B]: of each anchor's view, over the videos of each of the teacher's views.
    logits = torch.einsum("rvc,buc->rvub", student, teacher) / temperature
    own = torch.arange(first, last, device=logits.device).repeat_interleave(num_views**2)
    return functional.cross_entropy(logits.flatten(0, 2), own)
