"""Error of the gradient in each precision, beside its speed: a part of `tools/bench.py device`.

Every precision computes the same step: the same untrained weights, and the same clips of the
shards, augmented as the `paper` recipe does. The gradient before the first update is compared with
that of fp32; then the step's speed is measured.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strata.dataload.config import DataConfig
from strata.dataload.loader import Batch, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.train.config import TrainConfig
from strata.train.convolutions import sound_convolutions
from strata.train.method.model import VideoModel
from strata.train.method.objective import Method
from strata.train.method.schedules import ScheduleConfig, phase_at
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig

__all__ = ["measure_precisions"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_FP16_SCALE = 1024.0
"""Of the loss in fp16, so that gradients do not vanish; taken out before they are compared."""


class _Step:
    """A training step at one precision, on one batch, without DeepSpeed."""

    def __init__(
        self, config: TrainConfig, batch: Batch, precision: str, stage: int, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        clip_frames = config.data.clips.clip_frames
        self._model = VideoModel(config.model, config.method, clip_frames).to(device).train()
        self._model.backbone.channels_last()
        self._method = Method(self._model, config.method, World())
        schedule = ScheduleConfig()
        epoch = schedule.frozen_prototype_epochs if stage == 1 else schedule.second_stage_epoch
        self._phase = phase_at(schedule, epoch)
        self._batch, self._device, self._dtype = batch, device, _DTYPES[precision]
        self._scale = _FP16_SCALE if precision == "fp16" else 1.0
        self._orders = [
            order.to(device) for order in self._model.orders(batch.samples, 0, 0, clip_frames)
        ]
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), weight_decay=1e-5, fused=on_gpu
        )

    def backward(self) -> None:
        self._optimizer.zero_grad()
        autocast = torch.autocast(
            self._device.type, self._dtype or torch.bfloat16, enabled=self._dtype is not None
        )
        with sound_convolutions(self._device, self._dtype), autocast:
            out = self._model(self._batch.short, self._batch.long, *self._orders, self._phase)
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
        self.backward()
        self._optimizer.step()


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
    """Measure each precision that the device has, fp32 first.

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
    loader = TrainLoader(reader, config.data, plan, world=World(), device=device, epochs=(0, 1))
    with loader:
        first = next(iter(loader))
    precisions = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    for stage in stages:
        exact: dict[str, Tensor] = {}
        for precision in precisions:
            step = _Step(config, first, precision, stage, device)
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
