"""The committed recipes agree with the table in method.md, Part I."""

from pathlib import Path

import pytest

from strata.config import parse_config, plain
from strata.errors import ConfigError
from strata.train.config import TrainConfig
from strata.train.method.schedules import phase_at
from strata.train.method.settings import MethodConfig

FOLDER = Path(__file__).parents[3] / "configs" / "pretrain"
PAPER = ("ucf101_r3d18", "ucf101_s3d", "k400_r3d18", "k400_s3d")
RELEASE = ("ucf101_r3d18_release", "k400_r3d18_release")
COCLR_VIEWS = "ucf101_r3d18_coclr_views"
DISTILLED = "ucf101_r3d18_distilled"
BEST = tuple(f"{name}_best" for name in PAPER)


def parse(name: str, *overrides: str) -> TrainConfig:
    argv = ["--config", str(FOLDER / f"{name}.yaml"), "--data.shards", "shards", "--run", "runs/a"]
    argv += ["--method.teacher", "runs/best"] if name == DISTILLED else []
    return parse_config(TrainConfig, [*argv, *overrides], prog="test", description="")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path):
    parse(path.stem)


def test_every_recipe_is_known_here():
    known = {*PAPER, *RELEASE, *BEST, COCLR_VIEWS, DISTILLED, "demo"}
    assert {p.stem for p in FOLDER.glob("*.yaml")} == known


@pytest.mark.parametrize("name", [*PAPER, *RELEASE])
def test_rows_that_are_the_same_in_both_recipes(name: str):
    config = parse(name)
    kinetics = name.startswith("k400")
    assert config.model.name == name.split("_")[1]
    assert config.model.width == 64
    assert (config.data.batch_size, config.data.size) == (256, 112)
    assert config.data.clips.clip_frames == 16
    assert config.data.clips.max_stride == 3
    views = config.data.views
    assert views.crop_area == (0.5, 1.0)
    assert (views.flip, views.brightness, views.contrast) == (0.5, 0.5, 0.5)
    assert (views.saturation, views.hue, views.jitter) == (0.5, 0.25, 1.0)
    method = config.method
    assert (method.num_prototypes, method.queue_length) == (1000, 1024)
    assert (method.temperature, method.graph_threshold) == (0.07, 0.05)
    assert (method.prototype_temperature, method.sinkhorn_epsilon) == (0.1, 0.05)
    assert method.embedding_size == 128
    weights = method.weights
    assert (weights.instance, weights.prototype, weights.retrieval_high) == (1, 0.5, 1)
    assert weights.augmentation_high == 0
    assert (weights.graph_mid, weights.augmentation_mid, weights.retrieval_mid) == (0.5,) * 3
    assert (weights.graph_low, weights.augmentation_low, weights.retrieval_low) == (0.3,) * 3
    engine = config.engine
    assert (engine.learning_rate, engine.weight_decay, engine.grad_clip) == (1e-3, 1e-5, 0)
    schedule = config.schedule
    assert schedule.epochs == (100 if kinetics else 300)
    assert schedule.lr_drop_epochs == ((70,) if kinetics else (200,))
    split = 20 if kinetics else 50
    assert [phase_at(schedule, e).stage for e in (split - 1, split)] == [1, 2]
    assert [phase_at(schedule, e).queue for e in (9, 10)] == [False, True]
    assert [phase_at(schedule, e).prototypes_frozen for e in (0, 1)] == [True, False]
    drop = schedule.lr_drop_epochs[0]
    assert [phase_at(schedule, e).lr_factor for e in (drop - 1, drop)] == [1, 0.1]


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_recipe_is_the_default(name: str):
    config = parse(name)
    assert config.method == MethodConfig()
    assert config.data.clips.long_stride == 1
    assert config.data.clips.long_frames == 32
    assert (config.data.views.blur, config.data.views.blur_sigma) == (0.5, (0.1, 2.0))
    assert (config.data.views.gray, config.data.views.per_frame) == (0, False)
    assert config.method.weights.graph_high == 0
    assert (config.method.shuffle, config.method.temporal_from_stage) == (True, 2)
    assert config.method.gather_with_grad
    assert not config.method.graph_divides_by_batch


@pytest.mark.parametrize("name", RELEASE)
def test_the_release_differs_in_its_rows_alone(name: str):
    config, paper = parse(name), parse(name.removesuffix("_release"))
    assert _differences(plain(paper), plain(config)) == {
        "data.clips.long_stride": 2,
        "data.views.blur": 0.0,
        "data.views.gray": 0.5,
        "data.views.per_frame": True,
        "method.weights.graph_high": 1.0,
        "method.shuffle": False,
        "method.temporal_from_stage": 1,
        "method.gather_with_grad": False,
        "method.graph_divides_by_batch": True,
        "engine.precision": "fp32",
        "engine.sync_batch_norm": True,
    }
    assert config.data.clips.long_frames == 16
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert "Differs from the release in:" in text


def test_the_distilled_recipe_has_another_term_and_one_stage():
    assert _differences(plain(parse("ucf101_r3d18")), plain(parse(DISTILLED))) == {
        "method.teacher": "runs/best",
        "method.weights.instance": 0.0,
        "method.weights.distillation": 1.0,
        "schedule.second_stage_epoch": 300,
    }


def test_a_teacher_and_its_weight_come_together():
    path = str(FOLDER / f"{DISTILLED}.yaml")
    with pytest.raises(ConfigError, match=r"teacher is None and .* is 1; give both"):
        parse_config(
            TrainConfig,
            ["--config", path, "--data.shards", "shards", "--run", "runs/a"],
            prog="test",
            description="",
        )
    with pytest.raises(ConfigError, match="distillation is 0; give both, or neither"):
        parse("ucf101_r3d18", "--method.teacher", "runs/best")


def test_the_views_of_coclr_are_all_that_its_recipe_changes():
    assert _differences(plain(parse("ucf101_r3d18")), plain(parse(COCLR_VIEWS))) == {
        "data.views.crop_area": [0.2, 1.0],
        "data.views.jitter": 0.8,
        "data.views.brightness": 0.4,
        "data.views.contrast": 0.4,
        "data.views.saturation": 0.4,
        "data.views.hue": 0.1,
        "data.views.gray": 0.2,
    }


@pytest.mark.parametrize("name", BEST)
def test_the_best_differs_from_the_paper_recipe_in_its_input_alone(name: str):
    config, paper = parse(name), parse(name.removesuffix("_best"))
    assert paper.model.input == "rgb"
    assert _differences(plain(paper), plain(config)) == {"model.input": "difference"}


def _differences(one: dict, other: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in other.items():
        if isinstance(value, dict):
            found |= _differences(one[key], value, f"{prefix}{key}.")
        elif one[key] != value:
            found[prefix + key] = value
    return found


def test_the_ablation_of_table_3_is_two_settings_of_the_command():
    without_aug = [f"--method.weights.augmentation_{v}=0" for v in ("low", "mid")]
    without_ret = [f"--method.weights.retrieval_{v}=0" for v in ("low", "mid", "high")]
    neither = parse("ucf101_r3d18", *without_aug, *without_ret).method
    assert neither.active(2) == {"instance", "prototype", "graph_low", "graph_mid"}
    assert not neither.wants_long(2)
    aug = parse("ucf101_r3d18", *without_ret).method
    assert aug.active(2) - neither.active(2) == {"augmentation_low", "augmentation_mid"}
    ret = parse("ucf101_r3d18", *without_aug).method
    assert {n.partition("_")[0] for n in ret.active(2) - neither.active(2)} == {"retrieval"}
