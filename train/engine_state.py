"""The complete state of an engine, copied to the host and restored from there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strata.errors import CheckpointError
from strata.train.engine_optimizer import STEP, EngineOptimizer

__all__ = ["EngineState", "Snapshot"]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The complete state of an engine, on the host."""

    model: Mapping[str, Tensor]
    """Weights and buffers by name."""
    training: Mapping[str, Tensor]
    """The optimizer's state, for Adam `step.<name>`, `exp_avg.<name>` and `exp_avg_sq.<name>`;
    `random.cpu`, `random.cuda`."""
    loss_scale: Mapping[str, float]
    """State of fp16's loss scaling; empty for other precisions."""


class EngineState:
    """Copies the state of an engine to the host, and restores it.

    Names and shapes are the same for all stages of ZeRO and any number of ranks.

    Args:
        model: The module, with its weights and buffers.
        optimizer: The engine's optimizer.
        scaler: fp16's loss scaler, or None.
        device: Where the engine computes.
    """

    def __init__(
        self, model: nn.Module, optimizer: EngineOptimizer, scaler: Any, device: torch.device
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._scaler, self._device = scaler, device

    def snapshot(self, *, keep: bool = True) -> Snapshot:
        """Copy weights, buffers, optimizer, loss scale and random state to the host's memory.

        All ranks call it, since ZeRO's parts are gathered.

        Args:
            keep: Whether this rank needs the copy; without it the result is empty.
        """
        training: dict[str, Tensor] = {}
        for name, state in self._optimizer.named():
            if keep:
                training |= {f"{kind}.{name}": _to_host(value) for kind, value in state.items()}
        if not keep:
            return Snapshot(model={}, training={}, loss_scale={})
        training["random.cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            training["random.cuda"] = torch.cuda.get_rng_state(self._device)
        model = {name: _to_host(value) for name, value in self._model.state_dict().items()}
        scale = {} if self._scaler is None else dict(self._scaler.state_dict())
        return Snapshot(model=model, training=training, loss_scale=scale)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore exactly what `snapshot` copied. All ranks call it.

        Raises:
            CheckpointError: The state does not fit this model.
        """
        training = dict(snapshot.training)
        with torch.no_grad():
            self._model.load_state_dict(snapshot.model, strict=True)
        for name in ("random.cpu", "random.cuda"):
            state = training.pop(name, None)
            if state is not None and state.dtype != torch.uint8:
                raise CheckpointError(f"{name} is of type {state.dtype}, not a random state")
            if name == "random.cpu" and state is not None:
                torch.set_rng_state(state)
            elif state is not None and self._device.type == "cuda":
                torch.cuda.set_rng_state(state, self._device)
        self._optimizer.restore(self._by_parameter(training))
        if self._scaler is not None and snapshot.loss_scale:
            self._scaler.load_state_dict(snapshot.loss_scale)

    def _by_parameter(self, training: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The optimizer's tensors by parameter and kind, checked.

        Raises:
            CheckpointError: A tensor has no place in this model, or one is missing.
        """
        named, kinds = dict(self._model.named_parameters()), self._optimizer.kinds
        saved: dict[str, dict[str, Tensor]] = {}
        for key, value in training.items():
            kind, _, name = key.partition(".")
            fits = name in named and kind in kinds
            shape = torch.Size([]) if kind == STEP else named[name].shape if fits else None
            if not fits or value.shape != shape or not value.is_floating_point():
                raise CheckpointError(f"the optimizer's {key} has no place in this model")
            saved.setdefault(name, {})[kind] = value
        for name, state in saved.items():
            if state.keys() != set(kinds):
                raise CheckpointError(f"the optimizer's state of {name} is not complete")
        return saved


def _to_host(value: Tensor) -> Tensor:
    """A contiguous copy in the host's memory that shares nothing."""
    return value.detach().to("cpu", copy=True).contiguous()
