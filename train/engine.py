"""The only importer of deepspeed: derive its JSON, initialise, backward, step, copy the state."""

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
from strata.train.models.synced_norm import synchronise_norms
from strata.train.self_test import check_conv3d

__all__ = [
    "Engine",
    "EngineConfig",
    "ParameterGroup",
    "Snapshot",
    "choose_device",
    "derive_deepspeed",
]

logger = get_logger(__name__)

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
_STEP = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOMENTUM = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU of this local rank where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16 and fp16 (with loss scaling) by torch autocast; auto: bf16 on a GPU, else fp32."""
    zero: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO: 0 is fastest at these sizes; 1 shards Adam's state, 2 gradients too."""
    accumulation: int = 1
    """Parts in which a batch is computed, to save memory; the set of negatives shrinks with it."""
    learning_rate: float = 1e-3
    """Initial learning rate. TEXT: 1e-3."""
    weight_decay: float = 1e-5
    """L2 penalty added to the gradient, not decoupled. TEXT: 1e-5."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip, as published."""
    max_skipped_steps: int = 0
    """Steps of a run that may be left out because a loss or the gradient is not finite."""
    dump_bad_batch: bool = False
    """Whether the batch of such a step is written below the run, in `bad-batches`."""
    sync_batch_norm: bool = False
    """Whether batch norm has the statistics of all ranks, docs/method.md."""
    compile: bool = False
    """Whether the backbone goes through torch.compile."""
    channels_last: bool = True
    """Whether convolutions' weights lie in memory as the clips do; not under ZeRO."""
    cudnn_benchmark: bool = True
    """Whether cuDNN tries its algorithms on the first steps."""
    world_timeout_s: float = 600.0
    """Seconds until a world that does not form, or a stalled collective, ends the run."""

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
            # Its scaler under ZeRO is moved once a parameter group, and not at all by an overflow.
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
    """Parameters that are updated or left alone together."""

    name: str
    parameters: Sequence[nn.Parameter]
    lr_factor: float = 1.0
    """Learning rate of the group over that of the others."""


def choose_device(config: EngineConfig, world: World) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: A GPU is asked for that this machine does not have.
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


def derive_deepspeed(
    config: EngineConfig,
    *,
    batch_size: int,
    world_size: int,
    device: torch.device,
    momentum: float | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration; users never write it.

    Args:
        config: The typed settings.
        batch_size: Samples in a global batch.
        world_size: Ranks.
        device: Where this rank computes.
        momentum: Of SGD, which then takes the place of Adam.

    Returns:
        What `deepspeed.initialize` takes.

    Raises:
        ConfigError: A setting is not to be had on this device.
    """
    on_gpu = device.type == "cuda"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    optimizer: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
        # torch's own Adam needs no compiler at run time; DeepSpeed's "Adam" would be AdamW.
        "torch_adam": True,
        "adam_w_mode": False,
        # It alone can leave a step out by a flag that stays on the device.
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
        "steps_per_print": 1_000_000_000,
    }
    if precision != "fp32":
        # Native bf16 casts parameters but not batch normalisation's buffers, and fails.
        derived["torch_autocast"] = {"enabled": True, "dtype": _AUTOCAST[precision]}
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
    """A model, its optimizer and its peers.

    Args:
        model: Called through `__call__`; its parameters must all be in `groups`, but for those
            that need no gradient.
        groups: What can be frozen apart.
        config: The typed settings.
        batch_size: Samples in a global batch.
        world: This rank and its peers; the process group is formed.
        device: Where to compute.
        run: Folder in which DeepSpeed's derived settings are left for reading.
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
        # Importing deepspeed probes compilers and devices for seconds; only a run pays for it.
        import deepspeed
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        # Only for inference, yet compiled for a minute, with a compiler that may not be there.
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
        name = derived.get("torch_autocast", {}).get("dtype")
        dtype = None if name is None else getattr(torch, name)
        if dtype is not None:
            check_conv3d(device, dtype)
            if device.type == "cpu":
                logger.info("%s on a CPU: gradients of conv3d's weights in float32", name)
        self._convolutions = sound_convolutions(device, dtype)
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
        # Any: DeepSpeed's declared types name every optimizer that it could have made.
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
        """Whether the last step was left out, on the device; the same on all ranks."""
        if momentum is not None:
            # As after a first step of gradient 0, so that a first step can be left out too.
            for group in self.engine.optimizer.param_groups:
                for parameter in group["params"]:
                    self.engine.optimizer.state[parameter][_MOMENTUM] = torch.zeros_like(parameter)
        self._kinds = (_STEP, *_MOMENTS) if momentum is None else (_MOMENTUM,)
        self._guard_adam()

    def _guard_adam(self) -> None:
        """Let Adam leave a step out where `skipped` says so.

        Without ZeRO the fused kernels read the flag on the device, as they do for fp16's scaler, so
        that the host need not wait. With ZeRO the host reads it, as ZeRO does with the gradient's
        norm in each step anyway.
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
        """Let `watch()` enclose the averaging of gradients over ranks, to time it."""
        average = self.engine.allreduce_gradients

        def watched(*args: Any, **kwargs: Any) -> None:
            with watch():
                average(*args, **kwargs)

        self.engine.allreduce_gradients = watched

    def watch_update(self, watch: Callable[[], AbstractContextManager[None]]) -> None:
        """Let `watch()` enclose the optimizer's update, to time it."""
        adam = self.engine.optimizer.optimizer if self._zero else self.engine.optimizer
        update = adam.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch():
                return update(*args, **kwargs)

        adam.step = watched

    def __call__(self, *args: Any) -> Any:
        """The model's forward pass, under autocast where the precision asks for it."""
        if self._bad_loss is None:
            # Batch norm and the queue move in the forward pass, before anyone knows of a fault.
            _copy(self._buffers, self._kept)
        with self._convolutions:
            return self.engine(*args)

    def step(self, loss: Tensor, *, lr_factor: float, frozen: Collection[str] = ()) -> None:
        """Backward pass, averaging of gradients over ranks, and the optimizer's update.

        A frozen group is left exactly as it is: no update, no weight decay, and its Adam state
        starts when it is first used. DeepSpeed alone would give unused parameters a gradient of
        zero, to which the L2 penalty is added and which Adam then scales up to full steps: heads
        that wait for the second stage would be gone when it comes.

        Where the loss or the gradient is not finite on any rank, the step is left out on all:
        weights, Adam's state and buffers are as before it, and `skipped` is true. An overflow under
        fp16's loss scaling is no such fault; the scaler then leaves the update out.

        With `accumulation` it is called once a part, and acts with the last.

        Args:
            loss: Scalar.
            lr_factor: Learning rate over its initial value.
            frozen: Names of groups to leave alone.
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
            # Averaged over ranks by now, so all ranks find the same.
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
        """Steps left out since this object was made. Waits for the device."""
        return int(self._num_skipped)

    def _forget_frozen(self, frozen: Collection[str]) -> None:
        """Drop the count of steps that Adam took on zero gradients of sharded frozen groups."""
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

        All ranks call it, since ZeRO's shares are gathered; the names and shapes are the same for
        each stage and any number of ranks.

        Args:
            keep: Whether this rank wants the copy; the others get an empty one.
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
        """Take back what `snapshot` copied, bit by bit. All ranks call it.

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
        """Where Adam keeps its count of steps."""
        return parameter.device if self.device.type == "cuda" else torch.device("cpu")

    def _adam(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Adam's state of every parameter that was ever updated, by name."""
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
        """Of each of ZeRO's groups: parameters, the vector they are views of, this rank's part."""
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
            # The weights are views of the flat vector: loading them has filled it.
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
    """All of them in few kernels."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _to_host(value: Tensor) -> Tensor:
    """A copy of its own in the host's memory, contiguous."""
    return value.detach().to("cpu", copy=True).contiguous()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that an engine's future depends on, on the host."""

    model: Mapping[str, Tensor]
    """Weights and buffers by name."""
    training: Mapping[str, Tensor]
    """Adam's `step.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`; `random.cpu`, `random.cuda`."""
    loss_scale: Mapping[str, float]
    """State of fp16's loss scaling; empty without."""
