"""Projection heads: two linear layers on each time step, and one on the clip with batch norm.

Shape suffixes: N clips, C channels of the level, T time steps, H rows, W columns, D embedding size.
The release's heads are 1x1 convolutions over time; on `[N, T, C]` a linear layer is the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from strata.train.losses.precision import full_precision, unit_length

__all__ = ["GlobalHead", "StepHead", "pool_space"]


def pool_space(maps_NCTHW: Tensor) -> Tensor:
    """Average over rows and columns in at least float32; time is kept.

    Returns:
        `[N, T, C]`.
    """
    dtype = torch.promote_types(maps_NCTHW.dtype, torch.float32)
    return maps_NCTHW.mean(dim=(3, 4), dtype=dtype).transpose(1, 2)


class StepHead(nn.Module):
    """Projection head of each time step: linear, ReLU, linear, no norm (method.md 3).

    Args:
        width: C; also the hidden width.
        embedding_size: D.
        average_steps: Whether the embeddings are averaged over time: true for L_ins, L_aug and the
            graph, false for L_ret. The parameters are the same.
    """

    def __init__(self, width: int, embedding_size: int = 128, *, average_steps: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.project = nn.Linear(width, embedding_size)
        self.average_steps = average_steps

    def forward(self, steps_NTC: Tensor) -> Tensor:
        """Compute the embeddings of time steps.

        Args:
            steps_NTC: `[..., T, C]`; leading dimensions are free.

        Returns:
            `[..., D]` if steps are averaged, else `[..., T, D]`. Not normalised: the losses do it.
        """
        hidden = functional.relu(self.hidden(steps_NTC))
        if self.average_steps:
            # The second layer is linear, so the mean is taken before it: T times less work.
            hidden = hidden.mean(dim=-2)
        return self.project(hidden)


class GlobalHead(nn.Module):
    """Projection head of a clip for prototypes: linear, batch norm, ReLU, linear, unit length.

    Source: method.md 3, the tenth head.

    Args:
        width: C of the high level; also the hidden width.
        embedding_size: D.
    """

    def __init__(self, width: int, embedding_size: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.project = nn.Linear(width, embedding_size)

    def forward(self, steps_NTC: Tensor) -> Tensor:
        """Compute the embeddings of clips.

        Args:
            steps_NTC: `[N, T, C]`, averaged over time first.

        Returns:
            `[N, D]`, float32 at least, unit length.
        """
        hidden = functional.relu(self.norm(self.hidden(steps_NTC.mean(dim=1))))
        return full_precision(unit_length)(self.project(hidden))
