"""What each named protocol sets, held against a table, and how a report says what differs."""

from typing import Any

import numpy as np
import pytest

from strata.config import dotted, parse_config, plain
from strata.dataload.augment import centre_crop, ten_crops
from strata.errors import ConfigError
from strata.eval.evaluations.runners import RUNNERS
from strata.eval.main import main
from strata.eval.protocols.named import PROTOCOLS, ProtocolName, protocol_defaults, protocol_words

# CoCLR: README.md at its last commit and eval/main_classifier.py, github.com/TengdaHan/CoCLR.
CLIPS = {
    "coclr": {"num_clips": 10, "stride": 1, "crop": 0.875},
    "supplement": {"num_clips": 10, "stride": 1, "crop": 1.0},
    "ours": {"num_clips": 10, "stride": 1, "crop": 1.0},
}
CENTRE = {"coclr": "each", "supplement": "none", "ours": "none"}
LINEAR = {
    "coclr": ("sgd", 0.1, 1e-3, 64, 100, [60, 80], 0.0, True, 10),
    "supplement": ("sgd", 0.1, 1e-3, 64, 100, [60, 80], 0.0, True, 1),
    "ours": ("adam", 1e-3, 1e-3, 32, 100, [60, 80], 0.0, True, 1),
}
FINETUNE = {
    "coclr": ("adam", 1e-3, 1e-3, 64, 500, [400, 450], 0.9, False, 10),
    "supplement": ("adam", 1e-3, 1e-3, 64, 500, [400, 450], 0.9, False, 1),
    "ours": ("adam", 1e-3, 1e-3, 32, 100, [60, 80], 0.9, False, 1),
}
COLUMNS = (
    *("optimizer", "learning_rate", "weight_decay", "batch_size", "epochs", "lr_drop_epochs"),
    *("dropout", "normalised", "test_crops"),
)
VIEWS = {
    "crop_area": [0.2, 1.0],
    "crop_aspect": [0.75, 4 / 3],
    "flip": 0.5,
    "jitter": 0.3,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "blur": 0.0,
    "gray": 0.0,
    "per_frame": False,
}
NAMES: tuple[ProtocolName, ...] = ("coclr", "supplement", "ours")


@pytest.mark.parametrize("name", NAMES)
def test_each_protocol_has_the_settings_of_the_table(name: ProtocolName):
    assert set(PROTOCOLS) == set(NAMES)
    protocol = PROTOCOLS[name]
    for key, value in CLIPS[name].items():
        assert getattr(protocol.features, key) == value
    assert protocol.retrieval.centre == CENTRE[name]
    for training, train, table in (
        (protocol.linear, "head", LINEAR),
        (protocol.finetune, "all", FINETUNE),
    ):
        found = plain(training)
        assert found["train"] == train
        assert dict(zip(COLUMNS, table[name], strict=True)) == {k: found[k] for k in COLUMNS}
        assert found["stride"] == CLIPS[name]["stride"]
        assert found["lr_drop_factor"] == 0.1
        assert found["backbone_lr_factor"] == 0.1
        assert {k: found["views"][k] for k in VIEWS} == VIEWS


def parse(evaluation: str, name: ProtocolName, *more: str) -> Any:
    settings, _ = RUNNERS[evaluation]
    argv = ["--checkpoint", "run", "--protocol", name, *more]
    defaults = protocol_defaults(settings, evaluation, name)
    return parse_config(settings, argv, prog="t", description="", defaults=defaults)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("evaluation", ["retrieval", "linear", "finetune"])
def test_the_command_line_resolves_to_the_protocol(evaluation: str, name: ProtocolName):
    config = parse(evaluation, name)
    want = dotted({k: plain(v) for k, v in PROTOCOLS[name].parts(evaluation).items()})
    found = dotted(plain(config))
    assert {k: v for k, v in want.items() if k in found} == {
        k: found[k] for k in want if k in found
    }
    assert len([k for k in want if k in found]) > 5
    assert protocol_words(plain(config), evaluation) == f"protocol {name}"


def test_given_settings_are_kept_and_reported():
    config = parse("finetune", "coclr", "--training.epochs", "3", "--features.stride", "2")
    assert (config.training.epochs, config.training.batch_size) == (3, 64)
    assert protocol_words(plain(config), "finetune") == (
        "protocol coclr but for features.stride 2 instead of 1, training.epochs 3 instead of 500"
    )
    # What no protocol decides is no difference.
    config = parse("finetune", "coclr", "--training.seed", "3", "--features.videos_per_batch", "2")
    assert protocol_words(plain(config), "finetune") == "protocol coclr"


@pytest.mark.parametrize(
    "words",
    [
        ("linear", "--variant", "cached", "--train", "a", "--test", "b"),
        ("compare", "--train", "a", "--test", "b"),
    ],
    ids=["cached", "compare"],
)
def test_a_cached_probe_is_not_called_coclr(words: tuple[str, ...]):
    with pytest.raises(ConfigError, match="--protocol coclr trains its probe on augmented clips"):
        main([words[0], "--checkpoint", "run", "--protocol", "coclr", *words[1:]])


def test_ten_crops_are_the_centre_and_the_corners_and_their_mirror_images():
    # Of frames as they are stored, 224 of 256 pixels are 112 of 128.
    crops = ten_crops(3, height=128, width=176, share=0.875)
    boxes = [tuple(crop.box[2].tolist()) for crop in crops]
    assert boxes[:5] == [
        (8, 32, 120, 144),
        (0, 0, 112, 112),
        (0, 64, 112, 176),
        (16, 0, 128, 112),
        (16, 64, 128, 176),
    ]
    assert boxes[5:] == boxes[:5]
    assert [bool(crop.flip.all()) for crop in crops] == [False] * 5 + [True] * 5
    assert [bool(crop.flip.any()) for crop in crops] == [False] * 5 + [True] * 5
    whole = centre_crop(1, height=128, width=176)
    np.testing.assert_array_equal(whole.box, [[0, 24, 128, 152]])
