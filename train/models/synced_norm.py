"""Batch norm with the statistics of all ranks.

On GPUs this is torch's `SyncBatchNorm`. It does not support CPU tensors, for which `HostSyncedNorm`
is used, so that a recipe with synchronised batch norm trains on any machine.

Shape suffixes: N clips, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strata.distributed import gather_with_grad

__all__ = ["HostSyncedNorm", "synchronise_norms"]


class HostSyncedNorm(_BatchNorm):
    """Batch norm over the batches of all ranks, each of the same size; two gathers of C numbers.

    In training, R ranks of n values a channel give the outputs, the running statistics and, once
    gradients are averaged over ranks, the gradients of one rank of R n values. In evaluation it is
    ordinary batch norm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions after channels, as `nn.SyncBatchNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[N, C, ...]`."""
        if not self.training:
            return super().forward(input)
        over = [0, *range(2, input.dim())]
        shape = [1, -1, *(1 for _ in over[1:])]
        with torch.autocast(input.device.type, enabled=False):
            values = input.to(torch.promote_types(input.dtype, torch.float32))
            (means,) = gather_with_grad(values.mean(dim=over)[None])
            mean_C = means.mean(dim=0)
            centred = values - mean_C.view(shape)
            (variances,) = gather_with_grad(centred.square().mean(dim=over)[None])
            variance_C = variances.mean(dim=0)
            count = values.numel() // values.shape[1] * means.shape[0]
            self._track(mean_C.detach(), variance_C.detach() * (count / (count - 1)))
            scale = self.weight * torch.rsqrt(variance_C + self.eps)
            result = centred * scale.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), self.momentum)


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Replace every batch norm in a module by one with the statistics of all ranks, in place.

    Parameters and buffers stay the same tensors, under the same names.

    Args:
        model: The module, which must not be a batch norm itself.
        device: The device on which it will compute.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, _BatchNorm):
                synced = HostSyncedNorm(norm.num_features, norm.eps, norm.momentum)
                synced.__dict__["_parameters"] = norm._parameters
                synced.__dict__["_buffers"] = norm._buffers
                synced.train(norm.training)
                setattr(parent, name, synced)
