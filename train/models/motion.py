"""Motion excitation: weights channels by the change of features between time steps.

Shape suffixes: A orders in which the steps are read, N clips, C channels, Q = C / reduction
squeezed channels, T time steps, H rows, W columns.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from strata.errors import ConfigError
from strata.train.models.heads import pool_space

__all__ = ["MotionExcitation"]


class MotionExcitation(nn.Module):
    r"""The motion excitation branch of a level, and the average over space that follows it.

    For maps x of a clip, frames taken as images (method.md 2.2; Li et al., TEA, arXiv 2004.01398)::

        u    = BN(conv1x1(x))                                         C -> Q channels
        d[t] = depthwise3x3(u[t + 1]) - u[t],  d[T - 1] = 0
        w[t] = sigmoid(BN(conv1x1(mean_hw(d[t])))) - 0.5              Q -> C channels
        out[t] = mean_hw(x[t] + w[t] * x[t])

    Everything after u is needed only as averages over space, and is therefore computed on them:

    * mean_hw of a depth-wise convolution is a weighted sum of u, whose weights are the transposed
      convolution of ones;
    * mean_hw(x + w x) = (1 + w) mean_hw(x), w having no space;
    * a clip with its steps reordered has the same frames, hence the same u and the same batch
      statistics of u (its running variance differs in the factor n / (n - 1) alone). So all orders
      of a clip use the same averages, and no map is copied or convolved twice.

    The weights w depend on the order only through d: without it, the average over steps of a
    reversed clip is exactly that of the original. The branch does not change the main path.

    Args:
        width: C.
        reduction: C / Q; 16 in the source. Q is rounded down, and at least 1.
        excite: False sets w to 0, a control experiment for the source of the temporal signal.

    Raises:
        ConfigError: The reduction is not positive.
    """

    def __init__(self, width: int, *, reduction: int = 16, excite: bool = True) -> None:
        super().__init__()
        if reduction < 1:
            raise ConfigError(f"motion excitation: reduction is {reduction}; use 1 or more")
        squeezed = max(1, width // reduction)
        self.excite = excite
        self.squeeze = nn.Conv3d(width, squeezed, kernel_size=1, bias=False)
        self.squeeze_norm = nn.BatchNorm3d(squeezed)
        self.depthwise_weight = nn.Parameter(torch.empty(squeezed, 1, 3, 3))
        # The default initialisation of a depth-wise Conv2d's weight.
        nn.init.kaiming_uniform_(self.depthwise_weight, a=math.sqrt(5))
        self.expand = nn.Linear(squeezed, width, bias=False)
        self.expand_norm = nn.BatchNorm1d(width)

    def forward(self, maps_NCTHW: Tensor, orders_ANT: Tensor | None = None) -> Tensor:
        """Excite and average over space.

        Args:
            maps_NCTHW: `[N, C, T, H, W]`.
            orders_ANT: `[A, N, T]`, int64, see `alteration.time_orders`; None uses the steps once,
                in their order.

        Returns:
            `[A, N, T, C]`, float32 at least; A = 1 without orders. The batch statistics of w are
            over all A orders together.
        """
        steps_NTC = pool_space(maps_NCTHW)
        if not self.excite:
            return _reorder(steps_NTC, orders_ANT)
        squeezed = self.squeeze_norm(self.squeeze(maps_NCTHW))
        # Differences of steps are small relative to the steps: no half precision here.
        with torch.autocast(maps_NCTHW.device.type, enabled=False):
            ahead_NTQ, here_NTQ = self._averages(squeezed)
            ahead_ANTQ = _reorder(ahead_NTQ, orders_ANT)
            here_ANTQ = _reorder(here_NTQ, orders_ANT)
            change = ahead_ANTQ[:, :, 1:] - here_ANTQ[:, :, :-1]
            change_ANTQ = functional.pad(change, (0, 0, 0, 1))
            raw = self.expand(change_ANTQ)
            weight_ANTC = self.expand_norm(raw.flatten(0, 2)).view_as(raw).sigmoid() - 0.5
            return _reorder(steps_NTC, orders_ANT) * (1 + weight_ANTC)

    def _averages(self, squeezed_NQTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over space after the depth-wise convolution and before it, both `[N, T, Q]`."""
        dtype = torch.promote_types(squeezed_NQTHW.dtype, torch.float32)
        num_channels, (height, width) = squeezed_NQTHW.shape[1], squeezed_NQTHW.shape[3:]
        kernel = self.depthwise_weight.to(dtype)
        ones = kernel.new_ones(num_channels, height, width)
        taps = functional.conv_transpose2d(ones[None], kernel, padding=1, groups=num_channels)[0]
        weights_2QHW = torch.stack([taps, ones]) / (height * width)
        sums = torch.einsum("nqthw,sqhw->sntq", squeezed_NQTHW.to(dtype), weights_2QHW)
        return sums[0], sums[1]


def _reorder(steps_NTC: Tensor, orders_ANT: Tensor | None) -> Tensor:
    """The steps in each of the orders, `[A, N, T, C]`."""
    if orders_ANT is None:
        return steps_NTC[None]
    return torch.take_along_dim(steps_NTC[None], orders_ANT[..., None], dim=2)
