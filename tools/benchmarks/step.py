"""A training step by itself, without DeepSpeed: its speed, its gradient, and what it must move.

The encoder is arranged by the settings of `EngineConfig`, as training does.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strata.dataload.config import DataConfig
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.train.config import TrainConfig
from strata.train.convolutions import sound_convolutions
from strata.train.engine_config import EngineConfig
from strata.train.fast_encoder import arrange_encoder
from strata.train.method.model import VideoModel
from strata.train.method.objective import Method
from strata.train.method.schedules import ScheduleConfig, phase_at
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig, build_backbone

__all__ = [
    "VARIANTS",
    "Step",
    "Variant",
    "bytes_moved",
    "measure_precisions",
    "random_step",
]

_FP16_SCALE = 1024.0
"""Of the loss in fp16, so that gradients do not vanish; taken out before they are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """How a step is computed; the default is the published network, neither folded nor compiled."""

    model: str = "r3d18"
    in_channels: int = 4
    batch_share: float = 1.0
    """Share of the batch that was asked for."""
    engine: EngineConfig = dataclasses.field(default_factory=lambda: _settings())


def _settings(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"fold_stem": "off", "compile": "off", **settings})


def _engine(**settings: Any) -> Variant:
    return Variant(engine=_settings(**settings))


VARIANTS: dict[str, Variant] = {
    "plain": Variant(),
    "as trained": Variant(in_channels=3, engine=EngineConfig()),
    "three channels": Variant(in_channels=3),
    "channels first": _engine(channels_last=False),
    "fp32": _engine(precision="fp32"),
    "bf16": _engine(precision="bf16"),
    "bf16, folded frames": _engine(precision="bf16", fold_stem="frames"),
    "half the batch": Variant(batch_share=0.5),
    "folded pixels": _engine(fold_stem="pixels"),
    "folded frames": _engine(fold_stem="frames"),
    "folded frames, 88 channels": _engine(fold_stem="frames8"),
    "compiled": _engine(compile="on"),
    "compiled, folded pixels": _engine(compile="on", fold_stem="pixels"),
    "compiled, folded frames": _engine(compile="on", fold_stem="frames"),
    "compiled, folded frames, 88 channels": _engine(compile="on", fold_stem="frames8"),
    "s3d": Variant(model="s3d"),
    "s3d, compiled": dataclasses.replace(_engine(compile="on"), model="s3d"),
}
"""What the part `step` measures, by the names that `--variants` accepts."""


class Step:
    """A training step on one batch.

    Args:
        config: The run's settings.
        stage: Of the method.
        short: `[b, V, T, S, S, 3]`, uint8, on the device.
        long: `[b, L, S, S, 3]`, uint8, or None.
        samples: `[b]`, indices.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: int,
        short: Tensor,
        long: Tensor | None,
        samples: np.ndarray,
    ) -> None:
        self._device, self._clips = short.device, (short, long)
        clip_frames = config.data.clips.clip_frames
        torch.manual_seed(0)
        self._model = VideoModel(config.model, config.method, clip_frames)
        self._model = self._model.to(self._device).train()
        num_frames = sum(clips[..., 0, 0, 0].numel() for clips in self._clips if clips is not None)
        arrange_encoder(
            self._model,
            config.engine,
            self._device,
            num_frames=num_frames,
            size=config.data.size,
        )
        self._method = Method(self._model, config.method, World())
        schedule = ScheduleConfig()
        epoch = schedule.frozen_prototype_epochs if stage == 1 else schedule.second_stage_epoch
        self._phase = phase_at(schedule, epoch)
        self._dtype = config.engine.autocast_on(self._device)
        self._scale = _FP16_SCALE if self._dtype == torch.float16 else 1.0
        orders = self._model.orders(samples, 0, 0, clip_frames)
        self._orders = [order.to(self._device) for order in orders]
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), weight_decay=1e-5, fused=self._device.type == "cuda"
        )

    def backward(self) -> None:
        """Forward pass, losses and backward pass."""
        self._optimizer.zero_grad()
        autocast = torch.autocast(
            self._device.type, self._dtype or torch.bfloat16, enabled=self._dtype is not None
        )
        with sound_convolutions(self._device), autocast:
            out = self._model(*self._clips, *self._orders, self._phase)
        total = self._method.losses(out, self._phase, with_health=False).total
        (total * self._scale).backward()

    def gradients(self) -> dict[str, Tensor]:
        """Of the encoder, and of all else, flat, in float64 on the host."""
        parts: dict[str, list[Tensor]] = {"encoder": [], "rest": []}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                part = "encoder" if name.startswith("backbone.") else "rest"
                parts[part].append((parameter.grad.double() / self._scale).flatten().cpu())
        return {part: torch.cat(found) for part, found in parts.items()}

    def run(self) -> None:
        """The complete step."""
        self.backward()
        self._optimizer.step()


def random_step(config: TrainConfig, stage: int, device: torch.device) -> Step:
    """A step on random clips."""
    clips, batch, size = config.data.clips, config.data.batch_size, config.data.size

    def random(*shape: int) -> Tensor:
        return torch.randint(0, 256, (batch, *shape, size, size, 3), dtype=torch.uint8).to(device)

    long = random(clips.long_frames) if stage == 2 else None
    return Step(config, stage, random(2, clips.clip_frames), long, np.arange(batch))


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write, if each reads and writes everything once."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return result


def bytes_moved(config: TrainConfig, *, stage: int, dtype: torch.dtype | None) -> int:
    """Bytes that the encoder's operators move in a step, one after the other; nothing is computed.

    A compiled encoder moves less, as it joins operators.
    """
    clips, size, total = config.data.clips, config.data.size, 0
    passes = [(2 * config.data.batch_size, clips.clip_frames)]
    if stage == 2:
        passes.append((config.data.batch_size, clips.long_frames))
    with torch.device("meta"):
        backbone = build_backbone(config.model).to(dtype or torch.float32).train()
        for number, frames in passes:
            shape = (number, config.model.in_channels, frames, size, size)
            seen = torch.empty(shape, dtype=dtype or torch.float32)
            with _Traffic() as traffic:
                torch.stack([level.sum() for level in backbone(seen)]).sum().backward()
            total += traffic.total
    return total


def measure_precisions(
    reader: ShardReader,
    device: torch.device,
    *,
    batch: int,
    size: int,
    width: int,
    stages: Sequence[int],
    rate: Callable[[Callable[[], Any], int], float],
) -> Iterator[dict[str, Any]]:
    """Measure each precision that the device has, fp32 first, on augmented clips of the shards.

    Args:
        reader: The data set; holds at least a batch of videos.
        device: Where to compute.
        batch: Videos of a step.
        size: Pixels of a view.
        width: Channels of the stem.
        stages: Of the method.
        rate: Measures how many items a second a function does.

    Yields:
        `precision`, `stage`, `batch`, `samples_per_s`; and, against fp32's gradient, `cosine` and
        `norm_ratio` of the encoder's and `rest_cosine` of all other parameters'.
    """
    config = TrainConfig(
        run=Path("unset"),
        data=DataConfig(shards=reader.location, batch_size=batch, size=size),
        model=BackboneConfig(width=width, in_channels=4),
        method=MethodConfig(queue_length=max(1024, batch)),
    )
    plan = open_plan(reader, config.data, 0)
    with TrainLoader(
        reader, config.data, plan, world=World(), device=device, epochs=(0, 1)
    ) as loader:
        first = next(iter(loader))
    precisions = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    for stage in stages:
        exact: dict[str, Tensor] = {}
        for precision in precisions:
            engine = EngineConfig(precision=precision, compile="off")  # type: ignore[arg-type]
            settings = dataclasses.replace(config, engine=engine)
            step = Step(settings, stage, first.short, first.long, first.samples)
            step.backward()
            found = step.gradients()
            exact = exact or found
            cosines = {
                part: float(torch.cosine_similarity(found[part], exact[part], dim=0))
                for part in found
            }
            yield {
                "precision": precision,
                "stage": stage,
                "batch": batch,
                "samples_per_s": rate(step.run, batch),
                "cosine": cosines["encoder"],
                "norm_ratio": float(found["encoder"].norm() / exact["encoder"].norm()),
                "rest_cosine": cosines["rest"],
            }
