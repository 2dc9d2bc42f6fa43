"""The engine on real DeepSpeed: derived configuration, skipped steps, restored state."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from strata.distributed import World
from strata.errors import ConfigError
from strata.train.engine import Engine
from strata.train.engine_config import EngineConfig, ParameterGroup, derive_deepspeed
from strata.train.engine_state import Snapshot
from strata.train.self_test import check_conv3d
from tests.support.rank_processes import run_ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def derive(device: torch.device = CPU, batch_size: int = 16, **settings: Any) -> dict[str, Any]:
    config = EngineConfig(**settings)
    return derive_deepspeed(config, batch_size=batch_size, world_size=2, device=device)


def test_adam_has_its_penalty_in_the_gradient_and_needs_no_compiler():
    optimizer = derive(weight_decay=0.5, learning_rate=0.1)["optimizer"]
    assert optimizer["type"] == "Adam"
    parameters = optimizer["params"]
    assert (parameters["lr"], parameters["weight_decay"]) == (0.1, 0.5)
    assert parameters["torch_adam"] is True
    assert parameters["adam_w_mode"] is False
    assert parameters["fused"]
    assert derive(GPU)["optimizer"]["params"]["fused"] is True


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        (CPU, "auto", None),
        (CPU, "fp32", None),
        (CPU, "bf16", "bfloat16"),
        (GPU, "auto", "bfloat16"),
        (GPU, "fp32", None),
        (GPU, "bf16", "bfloat16"),
        (GPU, "fp16", "float16"),
    ],
)
def test_precision_is_by_autocast(device: torch.device, precision: str, dtype: str | None):
    derived = derive(device, precision=precision)
    assert derived.get("torch_autocast", {}).get("dtype") == dtype
    assert "fp16" not in derived
    assert "bf16" not in derived


def test_batch_accumulation_clipping_and_zero():
    derived = derive(accumulation=4, grad_clip=2.0, zero=2)
    assert derived["train_batch_size"] == 16
    assert derived["train_micro_batch_size_per_gpu"] == 2
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["gradient_clipping"] == 2.0
    assert derived["zero_optimization"] == {"stage": 2}


def test_impossible_settings_are_rejected():
    with pytest.raises(ConfigError, match="zero 1 shards Adam's state; use 0 with SGD"):
        derive_deepspeed(EngineConfig(zero=1), batch_size=8, world_size=1, device=CPU, momentum=0.9)
    with pytest.raises(ConfigError, match="loss scale would never fall"):
        EngineConfig(precision="fp16", zero=1)
    with pytest.raises(ConfigError, match=r"engine\.accumulation is 0"):
        EngineConfig(accumulation=0)


def test_a_wrong_convolution_is_found(monkeypatch: pytest.MonkeyPatch):
    def wrong(*args: Any, **more: Any) -> torch.Tensor:
        y = right(*args, **more)
        return y if y.dtype == torch.float32 else y * 1.2

    right = torch.nn.functional.conv3d
    assert check_conv3d(CPU, torch.float16) < 0.02
    monkeypatch.setattr(torch.nn.functional, "conv3d", wrong)
    with pytest.raises(ConfigError, match=r"computes conv3d wrongly in torch\.float16 on cpu"):
        check_conv3d(CPU, torch.float16)


class Small(nn.Module):
    """A model with two groups, batch norm and a buffer that changes."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        self.second = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(4))

    def groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup("first", list(self.first.parameters())),
            ParameterGroup("second", list(self.second.parameters())),
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.detach().sum(0))
        return self.second(self.first(x)).float().square().mean()


def make(world: World, momentum: float | None = None, **settings: Any) -> tuple[Small, Engine]:
    model = Small()
    config = EngineConfig(device="cpu", learning_rate=0.1, weight_decay=1e-3, **settings)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            model,
            model.groups(),
            config,
            batch_size=8,
            world=world,
            device=CPU,
            run=Path(folder),
            momentum=momentum,
        )
        if world.is_first:
            assert json.loads((Path(folder) / "deepspeed.json").read_text())["optimizer"]
    return model, engine


def inputs(step: int, world: World) -> torch.Tensor:
    everything = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return everything[world.rank :: world.size].contiguous()


def advance(engine: Engine, step: int, world: World, factor: float = 1.0, parts: int = 1) -> None:
    for part in inputs(step, world).chunk(parts):
        loss = engine(part) * factor
        engine.step(loss, lr_factor=1.0, frozen={"second"} if step == 0 else ())


def content(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    return {**snapshot.model, **snapshot.training}


def skip_and_restore(world: World, zero: Literal[0, 1, 2], bad: float) -> list[Any]:
    _, engine = make(world, zero=zero)
    advance(engine, 0, world)
    advance(engine, 1, world)
    before = content(engine.state.snapshot())
    # On one rank only; an infinite factor makes the loss infinite, a huge one only the gradient.
    advance(engine, 2, world, factor=bad if world.rank == world.size - 1 else 1.0)
    skipped, left = bool(engine.skipped), content(engine.state.snapshot())
    advance(engine, 3, world)
    after = engine.state.snapshot()
    assert not bool(engine.skipped)
    assert engine.num_skipped() == 1
    # Another engine restores the state and continues like this one.
    advance(engine, 4, world)
    _, other = make(world, zero=zero)
    other.state.restore(after)
    advance(other, 4, world)
    return [
        skipped,
        before,
        left,
        content(engine.state.snapshot()),
        content(other.state.snapshot()),
    ]


def differing(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    assert mine.keys() == theirs.keys()
    return [k for k, v in mine.items() if not torch.equal(v, theirs[k])]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 2)])
def test_a_step_not_finite_moves_nothing_on_any_rank(zero: int, ranks: int, bad: float):
    # Batch norm's running statistics differ by rank, so each rank is compared with itself.
    for skipped, before, left, after, again in run_ranks(skip_and_restore, ranks, zero, bad):
        assert skipped
        assert "exp_avg.first.0.weight" in before
        assert differing(before, left) == []
        own = {"first.1.running_mean", "first.1.running_var", "seen"}
        assert set(differing(after, again)) <= (own if ranks > 1 else set())
        assert differing(left, after) != []


def sgd(world: World) -> list[dict[str, torch.Tensor]]:
    """Steps of the engine and of torch's SGD; the first is not finite and is skipped."""
    model, engine = make(world, momentum=0.9)
    plain = Small()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    advance(engine, 1, world, factor=float("nan"))
    assert bool(engine.skipped)
    for step in range(1, 4):
        advance(engine, step, world)
        optimizer.zero_grad()
        plain(inputs(step, world)).backward()
        optimizer.step()
    saved = engine.state.snapshot()
    assert set(saved.training) == {
        "random.cpu",
        *(f"momentum_buffer.{name}" for name, _ in model.named_parameters()),
    }
    _, other = make(world, momentum=0.9)
    other.state.restore(saved)
    for one in (engine, other):
        advance(one, 4, world)
    return [
        dict(saved.model),
        {name: value.clone() for name, value in plain.state_dict().items()},
        content(engine.state.snapshot()),
        content(other.state.snapshot()),
    ]


def test_sgd_with_momentum_is_torchs_and_resumes_from_its_state():
    ((mine, theirs, after, again),) = run_ranks(sgd, 1)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, msg=name)
    assert differing(after, again) == []


def accumulate(world: World) -> tuple[dict[str, torch.Tensor], list[str], dict[str, torch.Tensor]]:
    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logging.getLogger("strata").addHandler(handler)
    _, engine = make(world, accumulation=2)
    for step in range(3):
        advance(engine, step, world, parts=2)
    assert engine.num_skipped() == 0
    _, clipping = make(world, grad_clip=1e-2)
    advance(clipping, 1, world, factor=1e3)
    assert (clipping.grad_norm or 0) > 1
    return content(engine.state.snapshot()), logs, content(clipping.state.snapshot())


def test_accumulation_moves_once_a_batch_and_the_norm_is_clipped():
    ((state, logs, clipped),) = run_ranks(accumulate, 1)
    assert float(state["step.first.0.weight"]) == 3
    assert float(state["step.second.weight"]) == 2  # frozen in the first step
    (warning,) = [line for line in logs if "accumulation" in line]
    assert "those of its part, 4 of the batch's 8" in warning
    assert "does not enlarge the set of negatives" in warning
    # Adam's first moment after one step is a tenth of the clipped gradient and of the penalty's.
    moments = [v.flatten() for k, v in clipped.items() if k.startswith("exp_avg.")]
    assert float(torch.cat(moments).norm()) == pytest.approx(1e-3, rel=0.3)


def averaged(world: World) -> list[torch.Tensor]:
    """First moments after a step, with gradients averaged in each type."""
    found = []
    for kind in ("fp32", "bf16"):
        _, engine = make(world, average_in=kind)
        advance(engine, 1, world)
        moments = content(engine.state.snapshot()).items()
        found.append(torch.cat([v.flatten() for k, v in moments if k.startswith("exp_avg.")]))
    return found


def test_gradients_averaged_in_bf16_are_rounded_and_the_same_on_all_ranks():
    (exact, rounded), (_, other) = run_ranks(averaged, 2)
    assert torch.equal(rounded, other)
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 4e-3


def across_stages(world: World, start: int, end: int) -> dict[str, torch.Tensor]:
    _, engine = make(world, zero=start)
    for step in range(2):
        advance(engine, step, world)
    saved = engine.state.snapshot()
    _, other = make(world, zero=end)
    other.state.restore(saved)
    assert differing(content(saved), content(other.state.snapshot())) == []
    advance(engine, 2, world)
    advance(other, 2, world)
    mine, theirs = content(engine.state.snapshot()), content(other.state.snapshot())
    assert torch.allclose(mine["second.weight"], theirs["second.weight"], atol=1e-6)
    return theirs


@pytest.mark.parametrize(("start", "end"), [(0, 1), (2, 0)])
def test_state_goes_from_one_stage_of_zero_to_another(start: int, end: int):
    run_ranks(across_stages, 2, start, end)


def scale_losses(world: World) -> tuple[float, float, float, bool]:
    _, engine = make(world, precision="fp16")
    for step in range(1, 8):
        advance(engine, step, world)
    saved = engine.state.snapshot()
    _, other = make(world, precision="fp16")
    other.state.restore(saved)
    assert other.state.snapshot().loss_scale == saved.loss_scale
    # A finite loss with an infinite scaled gradient is handled by the scaler and no fault.
    advance(other, 8, world, factor=1e36)
    after = other.state.snapshot()
    assert torch.equal(saved.model["second.weight"], after.model["second.weight"])
    steps = float(saved.training["step.second.weight"])
    return steps, saved.loss_scale["scale"], after.loss_scale["scale"], bool(other.skipped)


def test_fp16_scales_losses_and_the_scale_is_state():
    ((steps, scale, after, skipped),) = run_ranks(scale_losses, 1)
    assert 0 < steps <= 7
    assert scale == 65536 / 2 ** (7 - steps)
    assert after == scale / 2
    assert not skipped
