"""The training engine on DeepSpeed: forward pass, backward pass and update."""

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strata.distributed import World, any_rank
from strata.logs import get_logger, warn_once
from strata.train.convolutions import sound_convolutions
from strata.train.engine_config import EngineConfig, ParameterGroup, derive_deepspeed
from strata.train.engine_optimizer import MOMENTS, MOMENTUM, STEP, PlainOptimizer, copy_all
from strata.train.engine_state import EngineState
from strata.train.engine_zero import ZeroOptimizer
from strata.train.models.synced_norm import synchronise_norms
from strata.train.self_test import check_conv3d

__all__ = ["Engine"]

logger = get_logger(__name__)


class Engine:
    """Runs the forward pass, the backward pass and the update of a model; skips a bad update.

    Args:
        model: Called through `__call__`; all of its parameters that need gradients must be in
            `groups`.
        groups: The groups of parameters that can be frozen separately.
        config: The typed settings.
        batch_size: Samples in a global batch.
        world: This rank and the world size; the process group is formed.
        device: The device to compute on.
        run: Folder to which DeepSpeed's derived settings are written for reference.
        momentum: Of SGD, which then takes the place of Adam.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        config: EngineConfig,
        *,
        batch_size: int,
        world: World,
        device: torch.device,
        run: Path,
        momentum: float | None = None,
    ) -> None:
        derived = derive_deepspeed(
            config,
            batch_size=batch_size,
            world_size=world.size,
            device=device,
            momentum=momentum,
        )
        if world.is_first:
            (run / "deepspeed.json").write_text(json.dumps(derived, indent=2), encoding="utf-8")
        dtype = config.autocast_on(device)
        if dtype is not None:
            check_conv3d(device, dtype)
            if device.type == "cpu":
                logger.info("%s on a CPU: conv3d has another weight gradient", dtype)
        self._convolutions = sound_convolutions(device)
        if config.accumulation > 1:
            warn_once(
                logger,
                f"engine.accumulation {config.accumulation}: a video is contrasted with those of "
                f"its part, {batch_size // config.accumulation} of the batch's {batch_size}: "
                "this saves memory and does not enlarge the set of negatives",
            )
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = config.cudnn_benchmark
        if config.sync_batch_norm and world.size > 1:
            synchronise_norms(model, device)
        self._config, self.device = config, device
        self._lr_factors = {g.name: g.lr_factor for g in groups}
        self.engine = _initialize(model.to(device), groups, derived)
        kinds = (STEP, *MOMENTS) if momentum is None else (MOMENTUM,)
        self._optimizer = (
            ZeroOptimizer(self.engine, model, world)
            if config.zero
            else PlainOptimizer(self.engine, model, kinds)
        )
        scaler = self.engine.torch_autocast_z0_gradscaler
        self.state = EngineState(model, self._optimizer, scaler, device)
        """Copies the engine's state, and restores it."""
        self._buffers = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._bad_loss: Tensor | None = None
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step was skipped, on the device; the same on all ranks."""
        self._optimizer.skip_if(lambda: self.skipped)

    def watch_averaging(self, watch: Callable[[], AbstractContextManager[None]]) -> None:
        """Run the averaging of gradients over ranks inside `watch()`, to time it."""
        average = self.engine.allreduce_gradients

        def watched(*args: Any, **kwargs: Any) -> None:
            with watch():
                average(*args, **kwargs)

        self.engine.allreduce_gradients = watched

    def watch_update(self, watch: Callable[[], AbstractContextManager[None]]) -> None:
        """Run the optimizer's update inside `watch()`, to time it."""
        self._optimizer.watch_update(watch)

    def __call__(self, *args: Any) -> Any:
        """Run the model's forward pass, under autocast if the precision is 16 bits."""
        if self._bad_loss is None:
            # The forward pass changes batch norm and the queue before a fault is known.
            copy_all(self._buffers, self._kept)
        with self._convolutions:
            return self.engine(*args)

    def step(self, loss: Tensor, *, lr_factor: float, frozen: Collection[str] = ()) -> None:
        """Run the backward pass, average gradients over ranks, and update the weights.

        A frozen group does not change: no update, no weight decay, and its Adam state starts at its
        first use. DeepSpeed would give unused parameters a gradient of zero, to which the L2
        penalty is added and which Adam scales up to full steps: the heads of the second stage would
        decay to zero before it starts.

        If the loss or the gradient is not finite on any rank, the step is skipped on all: weights,
        Adam's state and buffers are as before it, and `skipped` is true. An overflow under fp16's
        loss scaling is not such a fault; the scaler then skips the update.

        With `accumulation` it is called once per micro-batch, and the last call updates.

        Args:
            loss: Scalar.
            lr_factor: Learning rate relative to its initial value.
            frozen: Names of the groups to freeze.
        """
        bad = ~torch.isfinite(loss.detach())
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return
        for group in self.engine.optimizer.param_groups:
            still = group["name"] in frozen
            own = lr_factor * self._lr_factors[group["name"]]
            group["lr"] = 0.0 if still else self._config.learning_rate * own
            group["weight_decay"] = 0.0 if still else self._config.weight_decay
            if still:
                self._optimizer.drop_gradients(group)
        self.skipped, self._bad_loss = any_rank(self._bad_loss), None
        self._skip_too(self._optimizer.bad_gradient())
        self.engine.step()
        self._skip_too(self._optimizer.overflowed())
        self._num_skipped += self.skipped
        self._optimizer.take_back(self.skipped, self._kept, self._buffers)
        if frozen:
            self._optimizer.forget(frozen)

    def _skip_too(self, bad: Tensor | None) -> None:
        if bad is not None:
            self.skipped = self.skipped | bad

    def num_skipped(self) -> int:
        """Steps skipped since this object was created. Waits for the device."""
        return int(self._num_skipped)

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last gradient before clipping. Waits for the device."""
        return self._optimizer.grad_norm


def _initialize(
    model: nn.Module, groups: Sequence[ParameterGroup], derived: dict[str, Any]
) -> Any:  # DeepSpeed declares the union of all its engines and optimizers.
    """Make DeepSpeed's engine."""
    # Importing deepspeed takes seconds, so it is imported only when a run needs it.
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # Only for inference, but compiling it takes a minute and needs a compiler.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"name": g.name, "params": list(g.parameters)} for g in groups],  # pyright: ignore[reportArgumentType]
        config=derived,
        dist_init_required=False,
    )
    return engine
