"""Prototypes: unit vectors to which clips are compared.

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
    """K directions: rows of a parameter, normalised, with gradient, wherever they are used.

    The release writes unit rows back into the parameter before each step (method.md 3). That means
    something else under each optimiser: ZeRO keeps its own copy of the parameter and overwrites
    what was written. Normalised in use, a score depends on directions alone, on any engine, and
    checkpoints need no repair (the release's item 14). Two consequences, both small: the gradient
    lacks the part along the row, which could not change a score; and a row's length grows, since
    steps across it are never taken back, which shortens the angle of an Adam step (estimated for
    steps without memory, lr 1e-3: by 1.6 over the UCF101 schedule, by 3 over that of Kinetics-400).

    Args:
        num_prototypes: K.
        embedding_size: D.
    """

    def __init__(self, num_prototypes: int = 1000, embedding_size: int = 128) -> None:
        super().__init__()
        # Gaussian rows: directions uniform on the sphere, which a uniform cube is not.
        weight = torch.randn(num_prototypes, embedding_size)
        self.weight = nn.Parameter(unit_length(weight))

    def forward(self, embeddings_ND: Tensor, *, frozen: bool = False) -> Tensor:
        """Cosines with all prototypes, in float32 at least whatever the autocast.

        Args:
            embeddings_ND: `[..., D]`, unit length (`GlobalHead` gives it).
            frozen: Whether to keep the gradient from the prototypes, as in the first epoch. The
                optimiser must skip them too: with L2 in the gradient, Adam moves a parameter of
                zero gradient by nearly lr in each element.

        Returns:
            `[..., K]`, in [-1, 1].
        """
        weight = self.weight.detach() if frozen else self.weight
        return _scores(embeddings_ND, weight)

    @torch.no_grad()
    def unit_rows(self) -> Tensor:
        """The prototypes themselves, `[K, D]`, unit length, without gradient."""
        return unit_length(self.weight)
