"""The optimizer under DeepSpeed's ZeRO, which gives each rank a part of Adam's state."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from strata.distributed import World, gather
from strata.train.engine_optimizer import MOMENTS, STEP, EngineOptimizer, copy_all, step_device

__all__ = ["ZeroOptimizer"]


class ZeroOptimizer(EngineOptimizer):
    """The optimizer under ZeRO 1 and 2: flat vectors, of which each rank updates its part.

    Args:
        engine: DeepSpeed's engine.
        model: The module inside it.
        world: This rank and the world size.
    """

    def __init__(self, engine: Any, model: nn.Module, world: World) -> None:
        super().__init__(engine, model, (STEP, *MOMENTS))
        self._world = world

    @property
    def updater(self) -> Any:
        """Adam, inside ZeRO's optimizer."""
        return self._engine.optimizer.optimizer

    def skip_if(self, skipped: Callable[[], Tensor]) -> None:
        """The host reads the flag, as ZeRO does with the gradient's norm in every step."""
        updater = self.updater
        original = updater.step

        def step(closure: Any = None) -> Any:
            return None if bool(skipped()) else original(closure)

        updater.step = step

    def drop_gradients(self, group: Mapping[str, Any]) -> None:
        """Nothing: ZeRO needs all gradients; rate and penalty of a frozen group are 0."""

    def forget(self, frozen: Collection[str]) -> None:
        """Reset Adam's step count of frozen groups, which had gradients of zero."""
        for group in self.updater.param_groups:
            if group["name"] in frozen:
                for parameter in group["params"]:
                    state = self.updater.state.get(parameter)
                    if state:
                        state[STEP].zero_()

    def overflowed(self) -> Tensor | None:
        """ZeRO's own check of the gradient."""
        return torch.tensor(bool(self._engine.optimizer.overflow), device=self._device)

    def take_back(self, skipped: Tensor, kept: list[Tensor], buffers: list[Tensor]) -> None:
        """The host reads the flag."""
        if bool(skipped):
            copy_all(kept, buffers)

    @property
    def grad_norm(self) -> float | None:
        """The norm that ZeRO computed."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _parts(self) -> Iterator[tuple[list[nn.Parameter], Tensor, nn.Parameter]]:
        """For each group: parameters, the vector they are views of, and this rank's part of it."""
        zero = self._engine.optimizer
        return zip(
            zero.bit16_groups,
            zero.bit16_groups_flat,
            zero.single_partition_of_fp32_groups,
            strict=True,
        )

    def named(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The state gathered from all ranks, cut into the parameters' tensors."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        for parameters, flat, part in self._parts():
            state = self.updater.state.get(part, {})
            if not state or float(state[STEP]) == 0:
                continue
            full = {k: gather(state[k]) for k in MOMENTS}
            for parameter in parameters:
                at = parameter.storage_offset() - flat.storage_offset()
                moments = {
                    k: v[at : at + parameter.numel()].view(parameter.shape) for k, v in full.items()
                }
                yield names[id(parameter)], {STEP: state[STEP], **moments}

    def restore(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Join the tensors to vectors and keep this rank's part; also of the loaded weights."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        for parameters, flat, part in self._parts():
            start = self._world.rank * part.numel()
            # The weights are views of the flat vector, so loading them filled it.
            part.data.copy_(flat[start : start + part.numel()])
            self.updater.state.pop(part, None)
            known = [p for p in parameters if names[id(p)] in saved]
            if not known:
                continue
            full = {k: torch.zeros_like(flat) for k in MOMENTS}
            for parameter in known:
                at = parameter.storage_offset() - flat.storage_offset()
                for k, vector in full.items():
                    vector[at : at + parameter.numel()] = saved[names[id(parameter)]][k].flatten()
            self.updater.state[part] = {
                STEP: saved[names[id(known[0])]][STEP].to(step_device(part)),
                **{k: v[start : start + part.numel()].clone() for k, v in full.items()},
            }
