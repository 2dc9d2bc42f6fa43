"""The training engine on DeepSpeed: configuration, backward pass, update and state."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strata.distributed import World, any_rank, gather
from strata.errors import CheckpointError, ConfigError
from strata.logs import get_logger, warn_once
from strata.train.convolutions import sound_convolutions
from strata.train.models.stem import FOLDS
from strata.train.models.synced_norm import synchronise_norms
from strata.train.self_test import check_conv3d

__all__ = [
    "Engine",
    "EngineConfig",
    "ParameterGroup",
    "Snapshot",
    "autocast_dtype",
    "choose_device",
    "derive_deepspeed",
]

logger = get_logger(__name__)

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_STEP = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOMENTUM = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of device, precision, optimizer and parallelism."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto is the GPU of this local rank if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16 and fp16 (with loss scaling) by torch autocast; auto: bf16 on a GPU, else fp32."""
    zero: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO: 0 is fastest at these sizes; 1 shards Adam's state, 2 gradients too."""
    accumulation: int = 1
    """Micro-batches per batch, to save memory; a video has fewer negatives with more of them."""
    learning_rate: float = 1e-3
    """Initial learning rate. TEXT: 1e-3."""
    weight_decay: float = 1e-5
    """L2 penalty added to the gradient, not decoupled. TEXT: 1e-5."""
    grad_clip: float = 0.0
    """Norm to which the gradient is clipped; 0 does not clip, as published."""
    max_skipped_steps: int = 0
    """Steps of a run that may be skipped because a loss or the gradient is not finite."""
    dump_bad_batch: bool = False
    """Whether the batch of such a step is written to the run's folder, to `bad-batches`."""
    sync_batch_norm: bool = False
    """Whether batch norm uses the statistics of all ranks, see docs/method.md."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the encoder is compiled, which takes minutes once a machine; auto: R3D-18 on GPUs."""
    fold_stem: Literal["auto", *FOLDS] = "auto"
    """How R3D-18's first convolution is computed, with the same result; auto: frames on GPUs, and
    in bf16 on CPUs with AMX for wide encoders."""
    average_in: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients travel between ranks without ZeRO; bf16 halves their bytes."""
    channels_last: bool = True
    """Whether weights of convolutions have channels last, as the clips do; not under ZeRO."""
    cudnn_benchmark: bool = True
    """Whether cuDNN benchmarks its algorithms in the first steps."""
    world_timeout_s: float = 600.0
    """Seconds to wait for the process group to form, and for every collective."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.learning_rate <= 0:
            raise ConfigError(f"engine.learning_rate is {self.learning_rate}; use more than 0")
        if self.accumulation < 1:
            raise ConfigError(f"engine.accumulation is {self.accumulation}; use 1 or more")
        if self.precision == "fp16" and self.zero:
            # Under ZeRO its scaler is updated once per parameter group, and never by an overflow.
            raise ConfigError(
                f"engine.precision fp16 with engine.zero {self.zero}: DeepSpeed's loss scale would "
                "never fall; use bf16, or engine.zero 0"
            )
        for name in ("weight_decay", "grad_clip", "max_skipped_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"engine.{name} is {getattr(self, name)}; use 0 or more")
        if self.world_timeout_s <= 0:
            raise ConfigError("engine.world_timeout_s must be above 0")


@dataclass(frozen=True)
class ParameterGroup:
    """A named group of parameters that are updated or frozen together."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr_factor: float = 1.0
    """Learning rate of the group relative to that of the others."""


def choose_device(config: EngineConfig, world: World) -> torch.device:
    """Choose the device of this rank.

    Raises:
        ConfigError: The requested GPU does not exist.
    """
    available = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and available == 0):
        return torch.device("cpu")
    if world.local_rank >= available:
        raise ConfigError(
            f"local rank {world.local_rank} needs a GPU of its own, the machine has {available}; "
            "start fewer ranks with --num_gpus, or use --engine.device cpu"
        )
    return torch.device("cuda", world.local_rank)


def autocast_dtype(config: EngineConfig, device: torch.device) -> torch.dtype | None:
    """The 16-bit type of autocast on a device; None if everything is computed in float32."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return None if precision == "fp32" else _AUTOCAST[precision]


def derive_deepspeed(
    config: EngineConfig,
    *,
    batch_size: int,
    world_size: int,
    device: torch.device,
    momentum: float | None = None,
) -> dict[str, Any]:
    """Derive DeepSpeed's configuration from the typed settings; users never write it.

    Args:
        config: The typed settings.
        batch_size: Samples in a global batch.
        world_size: Number of ranks.
        device: The device of this rank.
        momentum: Of SGD, which then takes the place of Adam.

    Returns:
        The configuration for `deepspeed.initialize`.

    Raises:
        ConfigError: The device does not support a setting.
    """
    optimizer: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
        # torch's Adam needs no compiler at run time; DeepSpeed's "Adam" would be AdamW.
        "torch_adam": True,
        "adam_w_mode": False,
        # Only fused Adam can skip a step by a flag that stays on the device.
        "fused": True,
    }
    derived: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // (world_size * config.accumulation),
        "gradient_accumulation_steps": config.accumulation,
        "optimizer": {"type": "Adam", "params": optimizer}
        if momentum is None
        else {"type": "SGD", "params": _sgd(config, momentum)},
        "zero_optimization": {"stage": config.zero},
        "gradient_clipping": config.grad_clip,
        "communication_data_type": config.average_in,
        "steps_per_print": 1_000_000_000,
    }
    dtype = autocast_dtype(config, device)
    if dtype is not None:
        # DeepSpeed's bf16 casts parameters but not batch norm's buffers, and fails.
        name = str(dtype).removeprefix("torch.")
        derived["torch_autocast"] = {"enabled": True, "dtype": name}
    return derived


def _sgd(config: EngineConfig, momentum: float) -> dict[str, Any]:
    if config.zero:
        raise ConfigError(f"engine.zero {config.zero} shards Adam's state; use 0 with SGD")
    return {
        "lr": config.learning_rate,
        "momentum": momentum,
        "weight_decay": config.weight_decay,
        "fused": True,
    }


class Engine:
    """Runs the forward pass, backward pass and update of a model, and copies its state.

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
        # Importing deepspeed takes seconds, so it is imported only when a run needs it.
        import deepspeed
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        # Only for inference, but compiling it takes a minute and needs a compiler.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        derived = derive_deepspeed(
            config,
            batch_size=batch_size,
            world_size=world.size,
            device=device,
            momentum=momentum,
        )
        if world.is_first:
            (run / "deepspeed.json").write_text(json.dumps(derived, indent=2), encoding="utf-8")
        dtype = autocast_dtype(config, device)
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
        self._config = config
        self._lr_factors = {g.name: g.lr_factor for g in groups}
        self._zero = config.zero
        self._world = world
        self._model = model
        self.device = device
        # Any: DeepSpeed declares the union of all its optimizers.
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=model.to(device),
            model_parameters=[{"name": g.name, "params": list(g.parameters)} for g in groups],  # pyright: ignore[reportArgumentType]
            config=derived,
            dist_init_required=False,
        )
        self._buffers = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._bad_loss: Tensor | None = None
        self._norm = torch.zeros((), device=device)
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step was skipped, on the device; the same on all ranks."""
        if momentum is not None:
            # The state after a first step of gradient 0, so that a first step can be skipped too.
            for group in self.engine.optimizer.param_groups:
                for parameter in group["params"]:
                    self.engine.optimizer.state[parameter][_MOMENTUM] = torch.zeros_like(parameter)
        self._kinds = (_STEP, *_MOMENTS) if momentum is None else (_MOMENTUM,)
        self._guard_adam()

    def _guard_adam(self) -> None:
        """Make Adam skip a step if `skipped` is true.

        Without ZeRO the fused kernels read the flag on the device, as they do for fp16's scaler, so
        that the host need not wait. With ZeRO the host reads it, as ZeRO does with the gradient's
        norm in every step.
        """
        adam = self.engine.optimizer.optimizer if self._zero else self.engine.optimizer
        original = adam.step

        def step(closure: Any = None) -> Any:
            if self._zero:
                return None if bool(self.skipped) else original(closure)
            mine = self.skipped.float()
            scalers = getattr(adam, "found_inf", None)
            adam.found_inf = mine if scalers is None else torch.maximum(scalers, mine)
            try:
                return original(closure)
            finally:
                if scalers is None:
                    del adam.found_inf
                else:
                    adam.found_inf = scalers

        adam.step = step

    def watch_averaging(self, watch: Callable[[], AbstractContextManager[None]]) -> None:
        """Run the averaging of gradients over ranks inside `watch()`, to time it."""
        average = self.engine.allreduce_gradients

        def watched(*args: Any, **kwargs: Any) -> None:
            with watch():
                average(*args, **kwargs)

        self.engine.allreduce_gradients = watched

    def watch_update(self, watch: Callable[[], AbstractContextManager[None]]) -> None:
        """Run the optimizer's update inside `watch()`, to time it."""
        adam = self.engine.optimizer.optimizer if self._zero else self.engine.optimizer
        update = adam.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch():
                return update(*args, **kwargs)

        adam.step = watched

    def __call__(self, *args: Any) -> Any:
        """Run the model's forward pass, under autocast if the precision is 16 bits."""
        if self._bad_loss is None:
            # The forward pass changes batch norm and the queue before a fault is known.
            _copy(self._buffers, self._kept)
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
        optimizer = self.engine.optimizer
        for group in optimizer.param_groups:
            still = group["name"] in frozen
            own = lr_factor * self._lr_factors[group["name"]]
            group["lr"] = 0.0 if still else self._config.learning_rate * own
            group["weight_decay"] = 0.0 if still else self._config.weight_decay
            if still and self._zero == 0:
                for parameter in group["params"]:
                    parameter.grad = None
        self.skipped = any_rank(self._bad_loss)
        self._bad_loss = None
        if not self._zero:
            # The gradient is already averaged over ranks, so all ranks get the same result.
            grads = [p.grad for p in self._model.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(grads)
            if self.engine.torch_autocast_z0_gradscaler is None:
                self.skipped = self.skipped | ~torch.isfinite(self._norm)
        self.engine.step()
        if self._zero:
            overflow = torch.tensor(bool(optimizer.overflow), device=self.device)
            self.skipped = self.skipped | overflow
        self._num_skipped += self.skipped
        self._take_back_buffers()
        if self._zero and frozen:
            self._forget_frozen(frozen)

    def _take_back_buffers(self) -> None:
        if not self._zero:
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(torch.where(self.skipped, kept, buffer))
        elif bool(self.skipped):
            _copy(self._kept, self._buffers)

    def num_skipped(self) -> int:
        """Steps skipped since this object was created. Waits for the device."""
        return int(self._num_skipped)

    def _forget_frozen(self, frozen: Collection[str]) -> None:
        """Reset Adam's step count of sharded frozen groups, which had zero gradients."""
        inner = self.engine.optimizer.optimizer
        for group in inner.param_groups:
            if group["name"] in frozen:
                for parameter in group["params"]:
                    state = inner.state.get(parameter)
                    if state:
                        state["step"].zero_()

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last gradient before clipping. Waits for the device."""
        if not self._zero:
            scaler = self.engine.torch_autocast_z0_gradscaler
            return float(self._norm) / (1.0 if scaler is None else scaler.get_scale())
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def snapshot(self, *, keep: bool = True) -> "Snapshot":
        """Copy weights, buffers, Adam's state, loss scale and random state to the host's memory.

        All ranks call it, since ZeRO's shards are gathered; the names and shapes are the same for
        all stages and any number of ranks.

        Args:
            keep: Whether this rank needs the copy; without it the result is empty.
        """
        training: dict[str, Tensor] = {}
        for name, moments in self._adam():
            if keep:
                training |= {f"{kind}.{name}": _to_host(value) for kind, value in moments.items()}
        if not keep:
            return Snapshot(model={}, training={}, loss_scale={})
        training["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            training["random.cuda"] = torch.cuda.get_rng_state(self.device)
        model = {name: _to_host(value) for name, value in self._model.state_dict().items()}
        scaler = self.engine.torch_autocast_z0_gradscaler
        return Snapshot(
            model=model,
            training=training,
            loss_scale={} if scaler is None else dict(scaler.state_dict()),
        )

    def restore(self, snapshot: "Snapshot") -> None:
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
            elif state is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state, self.device)
        named = dict(self._model.named_parameters())
        saved: dict[str, dict[str, Tensor]] = {}
        for key, value in training.items():
            kind, _, name = key.partition(".")
            fits = name in named and kind in self._kinds
            shape = torch.Size([]) if kind == _STEP else named[name].shape if fits else None
            if not fits or value.shape != shape or not value.is_floating_point():
                raise CheckpointError(f"the optimizer's {key} has no place in this model")
            saved.setdefault(name, {})[kind] = value
        for name, moments in saved.items():
            if moments.keys() != set(self._kinds):
                raise CheckpointError(f"the optimizer's state of {name} is not complete")
        if self._zero:
            self._restore_sharded(saved)
        else:
            inner = self.engine.optimizer
            inner.state.clear()
            for name, moments in saved.items():
                parameter = named[name]
                inner.state[parameter] = {
                    k: value.to(self._step_device(parameter))
                    if k == _STEP
                    else torch.empty_like(parameter).copy_(value)
                    for k, value in moments.items()
                }
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler is not None and snapshot.loss_scale:
            scaler.load_state_dict(snapshot.loss_scale)

    def _step_device(self, parameter: Tensor) -> torch.device:
        """The device of Adam's step count."""
        return parameter.device if self.device.type == "cuda" else torch.device("cpu")

    def _adam(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Adam's state by name, of every parameter that has been updated."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        if not self._zero:
            for parameter, state in self.engine.optimizer.state.items():
                yield names[id(parameter)], {k: state[k] for k in self._kinds}
            return
        for parameters, flat, part, inner in self._shares():
            state = inner.state.get(part, {})
            if not state or float(state[_STEP]) == 0:
                continue
            full = {k: gather(state[k]) for k in _MOMENTS}
            for parameter in parameters:
                at = parameter.storage_offset() - flat.storage_offset()
                yield (
                    names[id(parameter)],
                    {
                        _STEP: state[_STEP],
                        **{
                            k: v[at : at + parameter.numel()].view(parameter.shape)
                            for k, v in full.items()
                        },
                    },
                )

    def _shares(self) -> Iterator[tuple[list[nn.Parameter], Tensor, nn.Parameter, Any]]:
        """For each ZeRO group: parameters, the vector they are views of, and this rank's part."""
        zero = self.engine.optimizer
        for group, flat, part in zip(
            zero.bit16_groups,
            zero.bit16_groups_flat,
            zero.single_partition_of_fp32_groups,
            strict=True,
        ):
            yield group, flat, part, zero.optimizer

    def _restore_sharded(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        names = {id(p): name for name, p in self._model.named_parameters()}
        for parameters, flat, part, inner in self._shares():
            start = self._world.rank * part.numel()
            # The weights are views of the flat vector, so loading them filled it.
            part.data.copy_(flat[start : start + part.numel()])
            inner.state.pop(part, None)
            known = [p for p in parameters if names[id(p)] in saved]
            if not known:
                continue
            full = {k: torch.zeros_like(flat) for k in _MOMENTS}
            for parameter in known:
                at = parameter.storage_offset() - flat.storage_offset()
                for k, vector in full.items():
                    vector[at : at + parameter.numel()] = saved[names[id(parameter)]][k].flatten()
            inner.state[part] = {
                _STEP: saved[names[id(known[0])]][_STEP].to(self._step_device(part)),
                **{k: v[start : start + part.numel()].clone() for k, v in full.items()},
            }


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy all tensors with few kernels."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _to_host(value: Tensor) -> Tensor:
    """A contiguous copy in the host's memory that shares nothing."""
    return value.detach().to("cpu", copy=True).contiguous()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The complete state of an engine, on the host."""

    model: Mapping[str, Tensor]
    """Weights and buffers by name."""
    training: Mapping[str, Tensor]
    """Adam's `step.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`; `random.cpu`, `random.cuda`."""
    loss_scale: Mapping[str, float]
    """State of fp16's loss scaling; empty for other precisions."""
