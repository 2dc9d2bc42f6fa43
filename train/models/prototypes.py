"""Prototypes: learned unit vectors with which clips are compared.

Shape suffixes: N clips, D embedding size, K prototypes.
"""

import torch
from torch import Tensor, nn

from strata.train.losses.precision import full_precision, unit_length

__all__ = ["Prototypes"]


@full_precision
def _scores(embeddings: Tensor, weight_KD: Tensor) -> Tensor:
    return embeddings @ unit_length(weight_KD).T


class Prototypes(nn.Module):
    """K prototypes: rows of a parameter that are normalised at each use, with gradient.

    The release writes unit rows back into the parameter before each step (method.md 3). The effect
    of this depends on the optimiser: ZeRO has its own copy of the parameter and overwrites the
    rows. With normalisation at each use, a score depends only on directions, under any engine, and
    checkpoints need no correction (the release's item 14). There are two small consequences: the
    gradient has no component along the row, which could not change a score; and the length of a row
    grows, because steps orthogonal to it add up, which reduces the angle of an Adam step (estimated
    for independent steps, lr 1e-3: by 1.6 over the UCF101 schedule, by 3 over that of
    Kinetics-400).

    Args:
        num_prototypes: K.
        embedding_size: D.
    """

    def __init__(self, num_prototypes: int = 1000, embedding_size: int = 128) -> None:
        super().__init__()
        # Gaussian rows have directions uniform on the sphere, unlike rows uniform in a cube.
        weight = torch.randn(num_prototypes, embedding_size)
        self.weight = nn.Parameter(unit_length(weight))

    def forward(self, embeddings_ND: Tensor, *, frozen: bool = False) -> Tensor:
        """Cosines with all prototypes, in at least float32 under any autocast.

        Args:
            embeddings_ND: `[..., D]`, unit length (`GlobalHead` gives it).
            frozen: Whether the prototypes get no gradient, as in the first epoch. The
                optimiser must skip them too: with L2 in the gradient, Adam moves a parameter of
                zero gradient by nearly lr in each element.

        Returns:
            `[..., K]`, in [-1, 1].
        """
        weight = self.weight.detach() if frozen else self.weight
        return _scores(embeddings_ND, weight)
