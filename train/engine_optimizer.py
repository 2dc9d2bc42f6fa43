"""The optimizer inside the engine: how an update is skipped, and its state by parameter."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MOMENTS", "MOMENTUM", "STEP", "EngineOptimizer", "PlainOptimizer", "copy_all"]

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"


class EngineOptimizer(ABC):
    """The optimizer's state and its update under ZeRO.

    Args:
        engine: DeepSpeed's engine.
        model: The module inside it.
        kinds: Names of the tensors that the optimizer keeps for each parameter.
    """

    def __init__(self, engine: Any, model: nn.Module, kinds: tuple[str, ...]) -> None:
        self._engine, self._model, self.kinds = engine, model, kinds
        self._device = next(model.parameters()).device

    @property
    @abstractmethod
    def updater(self) -> Any:
        """The torch optimizer that updates the weights."""

    @abstractmethod
    def skip_if(self, skipped: Callable[[], Tensor]) -> None:
        """Make an update do nothing if `skipped()` is true; bool, on the device."""

    @abstractmethod
    def drop_gradients(self, group: Mapping[str, Any]) -> None:
        """Remove the gradients of a frozen group, so that it is not updated."""

    @abstractmethod
    def forget(self, frozen: Collection[str]) -> None:
        """Undo what an update did to the state of frozen groups."""

    def bad_gradient(self) -> Tensor | None:
        """Whether the averaged gradient is not finite, before the update; None if not known yet."""
        return None

    def overflowed(self) -> Tensor | None:
        """Whether the update found a gradient that is not finite; None if known before."""
        return None

    @abstractmethod
    def take_back(self, skipped: Tensor, kept: list[Tensor], buffers: list[Tensor]) -> None:
        """Copy `kept` to `buffers` if `skipped` is true."""

    @property
    @abstractmethod
    def grad_norm(self) -> float | None:
        """Norm of the last gradient before clipping. Waits for the device."""

    @abstractmethod
    def named(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The state of every parameter that has been updated, by name. All ranks iterate."""

    @abstractmethod
    def restore(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace the state by what `named` gave."""

    def watch_update(self, watch: Callable[[], AbstractContextManager[None]]) -> None:
        """Run the update inside `watch()`, to time it."""
        updater = self.updater
        update = updater.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch():
                return update(*args, **kwargs)

        updater.step = watched


class PlainOptimizer(EngineOptimizer):
    """The optimizer without ZeRO: every rank has the complete state, and the host never waits."""

    def __init__(self, engine: Any, model: nn.Module, kinds: tuple[str, ...]) -> None:
        super().__init__(engine, model, kinds)
        self._norm = torch.zeros((), device=self._device)
        if kinds == (MOMENTUM,):
            # The state after a first step of gradient 0, so that a first step can be skipped too.
            for group in self.updater.param_groups:
                for parameter in group["params"]:
                    self.updater.state[parameter][MOMENTUM] = torch.zeros_like(parameter)

    @property
    def updater(self) -> Any:
        """DeepSpeed's optimizer, a torch optimizer."""
        return self._engine.optimizer

    def skip_if(self, skipped: Callable[[], Tensor]) -> None:
        """The fused kernels read the flag on the device, as they do for fp16's loss scaler."""
        updater = self.updater
        original = updater.step

        def step(closure: Any = None) -> Any:
            mine = skipped().float()
            scalers = getattr(updater, "found_inf", None)
            updater.found_inf = mine if scalers is None else torch.maximum(scalers, mine)
            try:
                return original(closure)
            finally:
                if scalers is None:
                    del updater.found_inf
                else:
                    updater.found_inf = scalers

        updater.step = step

    def drop_gradients(self, group: Mapping[str, Any]) -> None:
        """Without a gradient the optimizer does not touch a parameter."""
        for parameter in group["params"]:
            parameter.grad = None

    def forget(self, frozen: Collection[str]) -> None:
        """Nothing: parameters without gradients have no update."""

    def bad_gradient(self) -> Tensor | None:
        """The gradient is already averaged over ranks, so all ranks get the same result."""
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(grads)
        # An overflow under loss scaling is the scaler's to handle.
        return None if self._scaler is not None else ~torch.isfinite(self._norm)

    def take_back(self, skipped: Tensor, kept: list[Tensor], buffers: list[Tensor]) -> None:
        """Choose on the device, without waiting for the flag."""
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))

    @property
    def _scaler(self) -> Any:
        return self._engine.torch_autocast_z0_gradscaler

    @property
    def grad_norm(self) -> float | None:
        """The norm without the loss scale."""
        scaler = self._scaler
        return float(self._norm) / (1.0 if scaler is None else scaler.get_scale())

    def named(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The optimizer's own tensors."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        for parameter, state in self.updater.state.items():
            yield names[id(parameter)], {kind: state[kind] for kind in self.kinds}

    def restore(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put copies into the optimizer, in the memory format of the parameters."""
        named = dict(self._model.named_parameters())
        self.updater.state.clear()
        for name, state in saved.items():
            parameter = named[name]
            self.updater.state[parameter] = {
                kind: value.to(step_device(parameter))
                if kind == STEP
                else torch.empty_like(parameter).copy_(value)
                for kind, value in state.items()
            }


def step_device(parameter: Tensor) -> torch.device:
    """The device of Adam's step count of a parameter."""
    return parameter.device if parameter.device.type == "cuda" else torch.device("cpu")


def copy_all(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy all tensors with few kernels."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
