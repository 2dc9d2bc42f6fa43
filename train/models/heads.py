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
    """Average over rows and columns, time kept; summed and returned in float32 at least.

    Returns:
        `[N, T, C]`.
    """
    dtype = torch.promote_types(maps_NCTHW.dtype, torch.float32)
    return maps_NCTHW.mean(dim=(3, 4), dtype=dtype).transpose(1, 2)


class StepHead(nn.Module):
    """Two linear layers with a ReLU between, no norm, on each time step (method.md 3).

    Args:
        width: C; also the hidden width.
        embedding_size: D.
        average_steps: Whether the embeddings are averaged over time: for L_ins, L_aug and the
            graph yes, for L_ret no. Parameters are the same.
    """

    def __init__(self, width: int, embedding_size: int = 128, *, average_steps: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.project = nn.Linear(width, embedding_size)
        self.average_steps = average_steps

    def forward(self, steps_NTC: Tensor) -> Tensor:
        """Embed steps.

        Args:
            steps_NTC: `[..., T, C]`; leading dimensions are free.

        Returns:
            `[..., D]` if steps are averaged, else `[..., T, D]`. Not normalised: the losses do it.
        """
        hidden = functional.relu(self.hidden(steps_NTC))
        if self.average_steps:
            # The mean goes through the second layer, which is linear: T times less work.
            hidden = hidden.mean(dim=-2)
        return self.project(hidden)


class GlobalHead(nn.Module):
    """Linear, batch norm, ReLU, linear, unit length: what is compared with prototypes.

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
        """Embed clips.

        Args:
            steps_NTC: `[N, T, C]`, averaged over time first.

        Returns:
            `[N, D]`, float32 at least, unit length.
        """
        hidden = functional.relu(self.norm(self.hidden(steps_NTC.mean(dim=1))))
        return full_precision(unit_length)(self.project(hidden))
