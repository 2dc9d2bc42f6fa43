import copy
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import strata.train.method.objective
from strata.distributed import World
from strata.errors import ConfigError
from strata.train.convolutions import sound_convolutions
from strata.train.engine import Engine
from strata.train.engine_config import EngineConfig
from strata.train.losses.prototypical import sinkhorn
from strata.train.method.model import Embeddings, VideoModel
from strata.train.method.objective import LossTerms, Method
from strata.train.method.schedules import Phase, ScheduleConfig, phase_at
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.models.backbones import BackboneConfig
from strata.train.models.inputs import normalise as normalise_clips
from tests.support.rank_processes import run_ranks
from tests.support.synthetic_clips import smooth_videos

FIRST = Phase(stage=1, lr_factor=1.0, queue=False, prototypes_frozen=False)
SECOND = Phase(stage=2, lr_factor=1.0, queue=True, prototypes_frozen=False)
PAPER = TermWeights()
HIGH = {"instance", "prototype"}
TEMPORAL = {
    "augmentation_low",
    "augmentation_mid",
    "retrieval_low",
    "retrieval_mid",
    "retrieval_high",
}
GRAPH = {"graph_low", "graph_mid"}


def recipe(**changes: Any) -> MethodConfig:
    small: dict[str, Any] = {"num_prototypes": 6, "queue_length": 24, "embedding_size": 8}
    return MethodConfig(**{**small, **changes})


def release(**changes: Any) -> MethodConfig:
    return recipe(
        weights=TermWeights(graph_high=1.0),
        shuffle=False,
        temporal_from_stage=1,
        gather_with_grad=False,
        graph_divides_by_batch=True,
        **changes,
    )


def build(config: MethodConfig, *, width: int = 8, seed: int = 0) -> VideoModel:
    torch.manual_seed(seed)
    return VideoModel(BackboneConfig(width=width), config, clip_frames=16)


def batch(num_videos: int = 4, *, long_stride: int = 1, seed: int = 0, size: int = 16) -> Any:
    window = smooth_videos(num_videos, seed=seed, size=size)
    return window.unflatten(1, (2, 16)), window[:, ::long_stride]


def embed(
    model: VideoModel, phase: Phase, num_videos: int = 4, *, long_stride: int = 1, seed: int = 0
) -> Embeddings:
    short, long = batch(num_videos, long_stride=long_stride, seed=seed)
    orders = model.orders(np.arange(num_videos), 0, 0, 16)
    wanted = model.config.wants_long(phase.stage)
    return model(short, long if wanted else None, *orders, phase)


def losses(model: VideoModel, phase: Phase, **choices: Any) -> LossTerms:
    out = embed(model, phase, **choices)
    return Method(model, model.config, World()).losses(out, phase, with_health=False)


def moved(model: VideoModel) -> set[str]:
    """Groups of which any parameter got a gradient that is not zero."""
    return {
        g.name
        for g in model.groups()
        if any(p.grad is not None and bool(p.grad.any()) for p in g.parameters)
    }


# Stages


@pytest.mark.parametrize(
    ("config", "stage", "terms"),
    [
        (recipe(), 1, HIGH),
        (recipe(), 2, HIGH | TEMPORAL | GRAPH),
        (release(), 1, HIGH | TEMPORAL),
        (release(), 2, HIGH | TEMPORAL | GRAPH | {"graph_high"}),
    ],
    ids=["paper-1", "paper-2", "release-1", "release-2"],
)
def test_a_stage_computes_its_terms_and_moves_their_groups_alone(config, stage, terms: set[str]):
    model = build(config)
    phase = Phase(stage=stage, lr_factor=1.0, queue=False, prototypes_frozen=False)
    result = losses(model, phase)
    assert set(result.terms) == terms
    expected = sum(getattr(config.weights, name) * value for name, value in result.terms.items())
    torch.testing.assert_close(result.total.detach(), expected)
    result.total.backward()
    every = {g.name for g in model.groups()}
    assert moved(model) == every - model.frozen_groups(phase)
    if terms == HIGH:
        assert model.frozen_groups(phase) == {"temporal", "graph", "motion_low", "motion_mid"}
        # Not run at all: batch statistics of motion excitation are the initial ones.
        norms = [m for m in model.motion.modules() if isinstance(m, torch.nn.BatchNorm3d)]
        assert {int(n.num_batches_tracked or 0) for n in norms} == {0}


def test_l_aug_at_the_high_level_is_one_more_term_and_changes_no_other():
    backbone = BackboneConfig(width=8, last_temporal_stride=1)
    models = [
        VideoModel(backbone, recipe(weights=TermWeights(augmentation_high=weight)), clip_frames=16)
        for weight in (0.0, 0.4)
    ]
    without, model = models
    model.load_state_dict(without.state_dict(), strict=False)
    plain, more = (losses(m, SECOND) for m in models)
    assert set(more.terms) - set(plain.terms) == {"augmentation_high"}
    for name, value in plain.terms.items():
        torch.testing.assert_close(more.terms[name], value, msg=name)
    added = 0.4 * more.terms["augmentation_high"]
    torch.testing.assert_close(more.total.detach(), plain.total.detach() + added)
    more.total.backward()
    assert moved(model) - moved(without) >= {"motion_high"}
    # Without motion excitation the average over steps is blind to their order: log 5 at least.
    model.motion["high"].excite = False  # pyright: ignore[reportArgumentType]
    assert losses(model, SECOND).terms["augmentation_high"] >= math.log(5) - 1e-5
    # A high level of two steps can be reversed alone.
    high = TermWeights(augmentation_high=0.4)
    with pytest.raises(ConfigError, match="leaves 2 time steps at the high level, too few to shuf"):
        build(recipe(weights=high))
    reversed_alone = losses(build(recipe(weights=high, shuffle=False)), SECOND)
    assert reversed_alone.terms["augmentation_high"].isfinite()


def test_the_weights_are_those_of_the_recipe_table():
    assert vars(PAPER) == {
        "instance": 1.0,
        "prototype": 0.5,
        "graph_low": 0.3,
        "graph_mid": 0.5,
        "graph_high": 0.0,
        "augmentation_low": 0.3,
        "augmentation_mid": 0.5,
        "augmentation_high": 0.0,
        "retrieval_low": 0.3,
        "retrieval_mid": 0.5,
        "retrieval_high": 1.0,
        "distillation": 0.0,
    }


def weights(**zero: float) -> TermWeights:
    return dataclasses.replace(PAPER, **zero)


NO_AUG = {"augmentation_low": 0.0, "augmentation_mid": 0.0}
NO_RET = {"retrieval_low": 0.0, "retrieval_mid": 0.0, "retrieval_high": 0.0}


@pytest.mark.parametrize("temporal_from_stage", [1, 2])
@pytest.mark.parametrize(
    ("zero", "left"),
    [
        (NO_AUG | NO_RET, HIGH | GRAPH),
        (NO_RET, HIGH | GRAPH | set(NO_AUG)),
        (NO_AUG, HIGH | GRAPH | set(NO_RET)),
        ({"graph_low": 0.0, "graph_mid": 0.0}, HIGH | TEMPORAL),
        ({"instance": 0.0}, {"prototype"} | GRAPH | TEMPORAL),
        ({"prototype": 0.0}, {"instance"} | GRAPH | TEMPORAL),
    ],
    ids=["neither", "aug", "ret", "no-graph", "no-instance", "no-prototype"],
)
def test_ablations_of_table_3_and_others_are_weights(zero, left: set[str], temporal_from_stage):
    """Groups without gradient are frozen in all ablations, or Adam with L2 would move them."""
    config = recipe(weights=weights(**zero), temporal_from_stage=temporal_from_stage)
    model = build(config)
    for phase in (FIRST, SECOND):
        model.zero_grad(set_to_none=True)
        result = losses(model, phase)
        assert set(result.terms) == (left if phase.stage == 2 else left & config.active(1))
        result.total.backward()
        assert moved(model) == {g.name for g in model.groups()} - model.frozen_groups(phase)


def test_the_long_sequence_is_asked_for_where_l_ret_runs():
    assert [recipe().wants_long(stage) for stage in (1, 2)] == [False, True]
    assert [release().wants_long(stage) for stage in (1, 2)] == [True, True]
    assert not recipe(weights=weights(**NO_RET)).wants_long(2)


# Each row of the recipe table is one setting


def total(config: MethodConfig, phase: Phase = SECOND, **choices: Any) -> dict[str, float]:
    model = build(config)
    for seed in (1, 2):
        losses(model, FIRST, seed=seed)
    terms = losses(model, phase, **choices)
    return {k: float(v) for k, v in terms.terms.items()}


@pytest.mark.parametrize(
    ("change", "terms"),
    [
        ({"temperature": 0.2}, HIGH - {"prototype"} | GRAPH | TEMPORAL),
        ({"prototype_temperature": 0.2}, {"prototype"}),
        ({"sinkhorn_epsilon": 0.5}, {"prototype"}),
        ({"graph_threshold": 0.9}, GRAPH),
        ({"shuffle": False}, {"augmentation_low", "augmentation_mid"}),
        ({"graph_divides_by_batch": True}, GRAPH),
        ({"queue_length": 4}, {"prototype"}),
        ({"gather_with_grad": False}, set()),
        ({"temporal_from_stage": 1}, set()),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_row_is_one_setting_and_changes_its_terms_alone(change, terms: set[str]):
    # With two prototypes some of four videos are partners in the graph.
    before, after = total(recipe(num_prototypes=2)), total(recipe(num_prototypes=2, **change))
    # Without the shuffle, motion excitation sees other copies, so its batch statistics differ too.
    also = GRAPH | TEMPORAL - {"retrieval_high"} if "shuffle" in change else set()
    # Assignments decide labels, and labels the graph.
    also |= GRAPH if terms == {"prototype"} else set()
    different = {k for k in before if not math.isclose(before[k], after[k], rel_tol=1e-5)}
    assert terms <= different <= terms | also


def test_the_release_divides_the_graph_by_the_batch_once_more():
    once, twice = total(recipe()), total(recipe(graph_divides_by_batch=True))
    for name in GRAPH:
        assert twice[name] == pytest.approx(once[name] / 4, rel=1e-5)


def test_no_gradient_reaches_the_high_level_through_e():
    """The graph terms teach the levels that follow E; the embeddings E is made of stay alone."""
    model = build(recipe(num_prototypes=2))
    out = embed(model, SECOND)
    made_of = out.instance.requires_grad_()
    graph = Method(model, model.config, World()).losses(out, SECOND, with_health=True)
    assert graph.health["graph_off_diagonal_mass"] > 0.01
    # The total's derivative by z and the scores is that of L_ins and L_pro alone.
    instance, scores = torch.autograd.grad(graph.total, (made_of, out.scores), retain_graph=True)
    without = recipe(num_prototypes=2, weights=weights(graph_low=0.0, graph_mid=0.0))
    other = build(without)
    alone = Method(other, without, World()).losses(out, SECOND, with_health=False)
    expected = torch.autograd.grad(alone.total, (made_of, out.scores), retain_graph=True)
    torch.testing.assert_close((instance, scores), expected)


def test_motion_excitation_is_a_side_branch():
    """The next stage reads the raw maps: nothing of the high level depends on the excitation."""
    model = build(recipe())
    before = embed(model, SECOND)
    with torch.no_grad():
        for name, parameter in model.motion.named_parameters():
            if name.endswith("expand.weight"):
                parameter.normal_(std=10)
    after = embed(model, SECOND)
    assert torch.equal(after.instance, before.instance)
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(after.steps["high"], before.steps["high"])
    assert not torch.allclose(after.clips["mid"], before.clips["mid"])
    assert not torch.allclose(after.steps["low"], before.steps["low"])


# The strided long sequence of the release


def test_three_views_of_equal_length_share_one_pass_and_its_statistics():
    model = build(release())
    sizes: list[int] = []
    model.backbone.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    fed: list[Tensor] = []
    model.global_head.register_forward_hook(lambda _m, args, _o: fed.append(args[0]))
    orders: list[Tensor] = []
    model.motion["low"].register_forward_hook(lambda _m, args, _o: orders.append(args[1]))
    out = embed(model, SECOND, long_stride=2)
    assert sizes == [12]
    assert fed[0].shape[0] == 12
    # Originals and reversed copies of all three views.
    assert orders[0].shape == (2, 12, 8)
    assert out.scores.shape == (4, 2, 6)
    assert out.altered["low"].shape == (4, 1, 2, 8)
    assert {k: v.shape[1] for k, v in out.long_steps.items()} == {"low": 8, "mid": 4, "high": 2}

    # The dense one has its own pass, and twice the steps.
    sizes.clear()
    out = embed(model, SECOND)
    assert sizes == [8, 4]
    assert {k: v.shape[1] for k, v in out.long_steps.items()} == {"low": 16, "mid": 8, "high": 4}


def test_views_keep_their_places_in_the_shared_pass():
    # In evaluation mode clips are independent, so the batching has no effect.
    model = build(release()).double().eval()
    short, long = batch(long_stride=2)
    orders = model.orders(np.arange(4), 0, 0, 16)
    out = model(short, long, *orders, SECOND)
    for video in range(4):
        rows = slice(video, video + 1)
        orders = model.orders(np.arange(4)[rows], 0, 0, 16)
        one = model(short[rows], long[rows], *orders, SECOND)
        torch.testing.assert_close(out.instance[rows], one.instance)
        torch.testing.assert_close(out.altered["mid"][rows], one.altered["mid"])
    apart = model.backbone(normalise_clips(long, 3).double())
    steps = model.retrieval_heads["mid"](model.motion["mid"](apart.mid)[0])
    torch.testing.assert_close(out.long_steps["mid"], steps)


def test_every_altered_order_is_a_change_of_order_and_drawn_by_view():
    low, mid, _ = build(recipe()).orders(np.arange(64), 0, 0, 16)
    assert low.shape == (3, 3 * 64, 8)
    assert mid.shape == (3, 3 * 64, 4)
    for orders in (low, mid):
        identity, reverse, shuffled = orders
        assert (identity == torch.arange(identity.shape[1])).all()
        assert torch.equal(reverse, identity.flip(1))
        assert torch.equal(shuffled.sort(dim=1).values, identity)
        assert not (shuffled == identity).all(dim=1).any()
        assert not (shuffled == reverse).all(dim=1).any()
    views = low[2].unflatten(0, (64, 3))
    assert not torch.equal(views[:, 0], views[:, 1])
    assert not torch.equal(build(recipe()).orders(np.arange(64), 1, 0, 16)[0], low)


# The queue


@pytest.mark.parametrize(("queue", "rows"), [(False, [4] * 8), (True, [4, 8, 12, 16, 20, 24, 24])])
def test_the_assignment_sees_the_batch_or_the_queue(monkeypatch, queue, rows: list[int]):
    seen: list[Tensor] = []

    def recorded(scores: Tensor, **settings: Any) -> Tensor:
        seen.append(scores.clone())
        return sinkhorn(scores, **settings)

    monkeypatch.setattr(strata.train.method.objective, "sinkhorn", recorded)
    model = build(recipe())
    phase = dataclasses.replace(FIRST, queue=queue)
    for step in range(len(rows)):
        out = embed(model, phase, seed=step)
        Method(model, model.config, World()).losses(out, phase, with_health=False)
        # The current batch is in it, at the end.
        assert torch.equal(seen[-1][-4:], out.scores.detach())
    assert [len(s) for s in seen] == rows


def test_scores_are_kept_from_the_first_step_so_that_the_queue_is_full_when_it_starts():
    model = build(recipe())
    for step in range(8):
        losses(model, FIRST, seed=step)
    assert len(model.queue) == 24


# Boundaries between phases, with the real engine

SCHEDULE = ScheduleConfig(
    epochs=6, frozen_prototype_epochs=1, queue_epoch=2, second_stage_epoch=3, lr_drop_epochs=()
)
RATE = 1e-3


def _engine(zero: Literal[0, 1], folder: Path) -> tuple[VideoModel, Engine]:
    model = build(recipe())
    config = EngineConfig(
        device="cpu",
        zero=zero,
        learning_rate=RATE,
        weight_decay=1e-2,  # pyright: ignore[reportArgumentType]
    )
    engine = Engine(
        model,
        model.groups(),
        config,
        batch_size=4,
        world=World(),
        device=torch.device("cpu"),
        run=folder,
    )
    return model, engine


def _step(model: VideoModel, engine: Engine, epoch: int, *, freeze: bool = True) -> None:
    """Do one step of an epoch."""
    phase = phase_at(SCHEDULE, epoch)
    short, long = batch(seed=epoch)
    long = long if model.config.wants_long(phase.stage) else None
    out = engine(short, long, *model.orders(np.arange(4), epoch, 0, 16), phase)
    terms = Method(model, model.config, World()).losses(out, phase, with_health=False)
    frozen = model.frozen_groups(phase) if freeze else set()
    engine.step(terms.total, lr_factor=phase.lr_factor, frozen=frozen)


def cross_boundaries(_: World, zero: Literal[0, 1]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, engine = _engine(zero, folder)
        states, saved = [copy.deepcopy(model.state_dict())], []
        for epoch in range(SCHEDULE.epochs):
            _step(model, engine, epoch)
            states.append(copy.deepcopy(model.state_dict()))
            saved.append(engine.state.snapshot())
        resumed = {}
        # Continued across: prototypes freed, queue used, second stage begun.
        for epoch in (0, 1, 2):
            other, engine = _engine(zero, folder)
            engine.state.restore(saved[epoch])
            for later in range(epoch + 1, SCHEDULE.epochs):
                _step(other, engine, later)
            resumed[epoch] = copy.deepcopy(other.state_dict())
        careless, engine = _engine(zero, folder)
        _step(careless, engine, 0, freeze=False)
        return {"states": states, "resumed": resumed, "careless": careless.state_dict()}


@pytest.fixture(scope="module", params=[0, 1], ids=["zero0", "zero1"])
def crossed(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_ranks(cross_boundaries, 1, request.param)[0]


_FIRST_EPOCH = {
    "backbone": 0,
    "instance_head": 0,
    "global_head": 0,
    "prototypes": 1,
    "augmentation_heads": 3,
    "retrieval_heads": 3,
    "graph_heads": 3,
    "motion": 3,
}
_PARAMETERS = {k for k, _ in build(recipe()).named_parameters()}


def test_frozen_groups_stay_bit_identical_until_their_epoch_and_then_move(crossed):
    states = crossed["states"]
    assert {k.partition(".")[0] for k in _PARAMETERS} == set(_FIRST_EPOCH)
    for epoch in range(SCHEDULE.epochs):
        for name in _PARAMETERS:
            still = torch.equal(states[epoch + 1][name], states[epoch][name])
            assert still == (epoch < _FIRST_EPOCH[name.partition(".")[0]]), (epoch, name)


def test_adam_starts_fresh_when_a_group_is_freed(crossed):
    """The first step of Adam is the learning rate, by the gradient's sign, in every element.

    After steps on zero gradients its second moment would be corrected as if it were old, and the
    step would be another.
    """
    states = crossed["states"]
    for name in ("prototypes.weight", "graph_heads.mid.project.weight", "motion.low.expand.weight"):
        epoch = _FIRST_EPOCH[name.partition(".")[0]]
        change = (states[epoch + 1][name] - states[epoch][name]).abs()
        assert change.median().item() == pytest.approx(RATE, rel=1e-2)
        assert change.max().item() <= RATE * 1.001


def test_without_freezing_the_waiting_heads_would_be_moved_by_their_decay(crossed):
    before, after = crossed["states"][0], crossed["careless"]
    change = (
        after["graph_heads.mid.project.weight"] - before["graph_heads.mid.project.weight"]
    ).abs()
    assert change.median() > RATE / 2


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_run_crosses_the_boundaries_like_an_uninterrupted_one(crossed, epoch: int):
    final, resumed = crossed["states"][-1], crossed["resumed"][epoch]
    assert all(torch.equal(final[k], resumed[k]) for k in final)


# Precision

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _under_autocast(
    config: MethodConfig, window: Tensor, *, autocast: bool
) -> tuple[VideoModel, LossTerms]:
    model = build(config).to(_DEVICE)
    orders = [o.to(_DEVICE) for o in model.orders(np.arange(len(window)), 0, 0, 16)]
    window = window.to(_DEVICE)
    sound = sound_convolutions(torch.device(_DEVICE))
    with sound, torch.autocast(_DEVICE, torch.bfloat16, enabled=autocast):
        out = model(window.unflatten(1, (2, 16)), window, *orders, SECOND)
    result = Method(model, config, World()).losses(out, SECOND, with_health=True)
    result.total.backward()
    return model, result


def test_bf16_autocast_is_close_to_fp32():
    """Measured: terms within 2 %, cosine of gradients 0.94 (backbone) and above 0.98 (others).

    Of an untrained network with 16 clips in its batch norms, whose embeddings are close together:
    1 / tau enlarges the rounding of what is left.
    """
    window = smooth_videos(8, size=32)
    config = recipe(weights=TermWeights(graph_high=1.0))
    exact_model, exact = _under_autocast(config, window, autocast=False)
    model, rounded = _under_autocast(config, window, autocast=True)
    assert {v.dtype for v in rounded.terms.values()} == {torch.float32}
    for name, value in exact.terms.items():
        # Labels and eta decide E, and rounding can move a video across either.
        bound = 0.1 if name.startswith("graph") else 0.04
        assert float(rounded.terms[name]) == pytest.approx(float(value), rel=bound), name
    for group, exact_group in zip(model.groups(), exact_model.groups(), strict=True):
        found, expected = (
            torch.cat([p.grad.flatten() for p in g.parameters if p.grad is not None])
            for g in (group, exact_group)
        )
        cosine = float(torch.cosine_similarity(found, expected, dim=0))
        ratio = float(found.norm() / expected.norm())
        assert cosine > (0.9 if group.name == "backbone" else 0.95), group.name
        assert 0.9 < ratio < 1.1, group.name


_ADVERSARIAL = {
    "identical": torch.full((1, 32, 16, 16, 3), 90, dtype=torch.uint8).expand(4, -1, -1, -1, -1),
    "black": torch.zeros(2, 32, 16, 16, 3, dtype=torch.uint8),
    "one-video": smooth_videos(1).expand(3, -1, -1, -1, -1),
    "still": smooth_videos(2)[:, :1].expand(-1, 32, -1, -1, -1),
    "two": smooth_videos(2),
    "noise": torch.randint(0, 2, (2, 32, 16, 16, 3), dtype=torch.uint8) * 255,
}


@pytest.mark.parametrize(
    ("autocast", "extreme"),
    [(False, {}), (True, {"temperature": 0.01, "sinkhorn_epsilon": 0.01})],
    ids=["fp32", "bf16-tau-0.01"],
)
@pytest.mark.parametrize("name", _ADVERSARIAL)
def test_no_batch_makes_a_term_or_a_gradient_not_finite(name: str, autocast: bool, extreme):
    config = recipe(weights=TermWeights(graph_high=1.0), **extreme)
    model, result = _under_autocast(config, _ADVERSARIAL[name], autocast=autocast)
    for term, value in {**result.terms, **result.health}.items():
        assert value.isfinite(), term
    for parameter, values in model.named_parameters():
        assert values.grad is not None
        assert values.grad.isfinite().all(), parameter


def test_features_that_are_zero_stay_finite():
    model = build(recipe(num_prototypes=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "heads" in name or "head" in name:
                parameter.zero_()
    result = losses(model, SECOND)
    result.total.backward()
    chance = Method(model, model.config, World()).chance(4, 16, 32)
    assert {k: float(v) for k, v in result.terms.items()} == pytest.approx(chance, abs=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="leaves 2 time steps at the mid level, too few to shuf"):
        VideoModel(BackboneConfig(width=8), recipe(), clip_frames=8)
    with pytest.raises(ConfigError, match="needs instance, prototype or distillation above"):
        TermWeights(instance=0.0, prototype=0.0)
    with pytest.raises(ConfigError, match="graph_low is -1; use 0 or more"):
        TermWeights(graph_low=-1)
    with pytest.raises(ConfigError, match="graph_threshold is 2; use 0 to 1"):
        recipe(graph_threshold=2)
