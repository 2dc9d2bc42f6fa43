"""The only importer of deepspeed: derive its JSON, initialise, backward, step, save, load."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from strata.distributed import World
from strata.errors import CheckpointError, ConfigError

__all__ = ["Engine", "EngineConfig", "ParameterGroup", "choose_device", "derive_deepspeed"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU of this local rank where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32, or bf16 by torch autocast; auto takes bf16 on a GPU and fp32 on a CPU."""
    zero: Literal[0, 1] = 0
    """DeepSpeed's ZeRO stage. 0 is fastest for models of this size; 1 shards Adam's state."""
    learning_rate: float = 1e-3
    """Initial learning rate. TEXT: 1e-3."""
    weight_decay: float = 1e-5
    """L2 penalty added to the gradient, not decoupled. TEXT: 1e-5."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip, as published."""
    world_timeout_s: float = 600.0
    """Seconds until a world that does not form, or a stalled collective, ends the run."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        if self.learning_rate <= 0:
            raise ConfigError(f"engine.learning_rate is {self.learning_rate}; use more than 0")
        for name in ("weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"engine.{name} is {getattr(self, name)}; use 0 or more")
        if self.world_timeout_s <= 0:
            raise ConfigError("engine.world_timeout_s must be above 0")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated or left alone together."""

    name: str
    parameters: Sequence[nn.Parameter]


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
    config: EngineConfig, *, batch_size: int, world_size: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration; users never write it.

    Args:
        config: The typed settings.
        batch_size: Samples in a global batch.
        world_size: Ranks.
        device: Where this rank computes.

    Returns:
        What `deepspeed.initialize` takes.

    Raises:
        ConfigError: The precision is not to be had on this device.
    """
    on_gpu = device.type == "cuda"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    if precision == "bf16" and not on_gpu:
        # Seen with torch 2.14.1: NaN in weight gradients of conv3d, from memory never written.
        raise ConfigError(
            "engine.precision bf16 needs a GPU: torch's bf16 conv3d on CPUs gives wrong gradients; "
            "use --engine.precision fp32"
        )
    optimizer: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
        # torch's own Adam needs no compiler at run time; DeepSpeed's "Adam" would be AdamW.
        "torch_adam": True,
        "adam_w_mode": False,
    }
    if on_gpu:
        optimizer["fused"] = True
    derived: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": optimizer},
        "zero_optimization": {"stage": config.zero},
        "gradient_clipping": config.grad_clip,
        "steps_per_print": 1_000_000_000,
    }
    if precision == "bf16":
        # Native bf16 casts parameters but not batch normalisation's buffers, and fails.
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return derived


class Engine:
    """A model, its optimizer and its peers.

    Args:
        model: Called through `__call__`; its parameters must all be in `groups`.
        groups: What can be frozen apart.
        config: The typed settings.
        batch_size: Samples in a global batch.
        world: This rank and its peers; the process group is formed.
        device: Where to compute.
        run: Folder in which DeepSpeed's derived settings are left for reading.
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
    ) -> None:
        # Importing deepspeed probes compilers and devices for seconds; only a run pays for it.
        import deepspeed
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        # Only for inference, yet compiled for a minute, with a compiler that may not be there.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        derived = derive_deepspeed(
            config, batch_size=batch_size, world_size=world.size, device=device
        )
        if world.is_first:
            (run / "deepspeed.json").write_text(json.dumps(derived, indent=2), encoding="utf-8")
        self._config = config
        self._zero = config.zero
        self.device = device
        # Any: DeepSpeed's declared types name every optimizer that it could have made.
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=model.to(device),
            model_parameters=[{"name": g.name, "params": list(g.parameters)} for g in groups],  # pyright: ignore[reportArgumentType]
            config=derived,
            dist_init_required=False,
        )

    def __call__(self, *args: Any) -> Any:
        """The model's forward pass, under autocast where the precision asks for it."""
        return self.engine(*args)

    def step(self, loss: Tensor, *, lr_factor: float, frozen: Collection[str] = ()) -> None:
        """Backward pass, averaging of gradients over ranks, and the optimizer's update.

        A frozen group is left exactly as it is: no update, no weight decay, and its Adam state
        starts when it is first used. DeepSpeed alone would give unused parameters a gradient of
        zero, to which the L2 penalty is added and which Adam then scales up to full steps: heads
        that wait for the second stage would be gone when it comes.

        Args:
            loss: Scalar.
            lr_factor: Learning rate over its initial value.
            frozen: Names of groups to leave alone.
        """
        self.engine.backward(loss)
        optimizer = self.engine.optimizer
        for group in optimizer.param_groups:
            still = group["name"] in frozen
            group["lr"] = 0.0 if still else self._config.learning_rate * lr_factor
            group["weight_decay"] = 0.0 if still else self._config.weight_decay
            if still and self._zero == 0:
                for parameter in group["params"]:
                    parameter.grad = None
        self.engine.step()
        if self._zero > 0 and frozen:
            self._forget_frozen(frozen)

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
        """Norm of the last gradient where DeepSpeed computed it (with clipping or ZeRO)."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path, tag: str) -> None:
        """Write weights, buffers and optimizer state below `folder/tag`. All ranks call it."""
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Restore what `save` wrote. All ranks call it.

        Raises:
            CheckpointError: The state does not fit this model or world.
        """
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=True)
        except (RuntimeError, KeyError, ValueError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {folder / tag} does not fit this model: {str(error).splitlines()[0]}; "
                "resume with the run's own config.yaml"
            ) from error
        if path is None:
            raise CheckpointError(f"checkpoint {folder / tag} holds no engine state; use another")
