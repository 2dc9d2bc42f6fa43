"""Settings of the training engine, and DeepSpeed's configuration that is derived from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from strata.distributed import World
from strata.driver import check_driver
from strata.errors import ConfigError
from strata.ranges import check_range

__all__ = ["EngineConfig", "ParameterGroup", "choose_device", "derive_deepspeed"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    fold_stem: Literal["auto", "off", "pixels", "frames", "frames8"] = "auto"
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
        check = partial(check_range, self, prefix="engine.")
        check("learning_rate", "world_timeout_s", above=0)
        check("accumulation", at_least=1)
        check("weight_decay", "grad_clip", "max_skipped_steps", at_least=0)
        if self.precision == "fp16" and self.zero:
            # Under ZeRO its scaler is updated once per parameter group, and never by an overflow.
            raise ConfigError(
                f"engine.precision fp16 with engine.zero {self.zero}: DeepSpeed's loss scale would "
                "never fall; use bf16, or engine.zero 0"
            )

    def precision_on(self, device: torch.device) -> str:
        """The precision of steps on a device: `fp32`, `bf16` or `fp16`."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if device.type == "cuda" else "fp32"

    def autocast_on(self, device: torch.device) -> torch.dtype | None:
        """The 16-bit type of autocast on a device; None in float32."""
        return _AUTOCAST.get(self.precision_on(device))


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
        ConfigError: The requested GPU does not exist, or its driver is too old.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    check_driver(torch.version.cuda)
    available = torch.cuda.device_count()
    if config.device == "auto" and available == 0:
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
    dtype = config.autocast_on(device)
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
