"""The cache of features: by weights, data and clips; whole or not there."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.errors import ShardError
from strata.eval.protocols import features
from strata.eval.protocols.features import FeatureConfig, Features, extract_features
from strata.train.models.backbones import Backbone, BackboneConfig, build_backbone
from tests.support.shard_folders import make_shards

CLIPS = FeatureConfig(num_clips=1, size=16, clip_frames=4)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(width=8))


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[ShardReader]:
    root = tmp_path_factory.mktemp("sets")
    for seed in (1, 2):
        make_shards(root / str(seed), num_videos=2, num_classes=2, shard_size=2, seed=seed)
    return [ShardReader(root / str(seed)) for seed in (1, 2)]


def extract(backbone: Backbone, reader: ShardReader, cache: Path, **changed: Any) -> Features:
    call = {"config": CLIPS, "network": "a"} | changed
    return extract_features(
        backbone, reader, **call, world=World(), device=torch.device("cpu"), cache=cache
    )


def test_a_file_for_each_network_set_and_protocol(
    backbone: Backbone, readers: list[ShardReader], tmp_path: Path
):
    first, second = readers
    whole = extract(backbone, first, tmp_path)
    for reader, changed in (
        (first, {"network": "b"}),
        (second, {}),
        (first, {"config": dataclasses.replace(CLIPS, stride=2)}),
        (first, {"backwards": True}),
    ):
        before = len(list(tmp_path.iterdir()))
        other = extract(backbone, reader, tmp_path, **changed)
        assert len(list(tmp_path.iterdir())) == before + 1
        assert np.array_equal(other.levels["low"], whole.levels["low"]) == ("network" in changed)
    # How many videos at a time, and which level is used later, change nothing.
    for change in ({"videos_per_batch": 1}, {"level": "all"}):
        extract(backbone, first, tmp_path, config=dataclasses.replace(CLIPS, **change))
    assert len(list(tmp_path.iterdir())) == 5


def test_an_interrupted_write_leaves_nothing_that_is_taken(
    backbone: Backbone,
    readers: list[ShardReader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def stop_half_way(levels: dict[str, np.ndarray], path: str, **more: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(features, "save_file", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            extract(backbone, readers[0], tmp_path)
    assert not list(tmp_path.iterdir())
    fresh = extract(backbone, readers[0], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    kept = extract(backbone, readers[0], tmp_path)
    np.testing.assert_array_equal(kept.levels["high"], fresh.levels["high"])


@pytest.mark.parametrize("damage", ["flip", "cut", "other set", "other kind", "unknown kind"])
def test_features_that_were_altered_or_belong_elsewhere_are_refused(
    damage: str, backbone: Backbone, readers: list[ShardReader], tmp_path: Path
):
    extract(backbone, readers[0], tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            path.write_bytes(content[:-100])
        case "other set":
            features._write({k: v[:1] for k, v in features._cached(path, (2, 1)).items()}, path)
        case "unknown kind":
            levels = {k: torch.zeros(2, 1, 4, dtype=torch.bfloat16) for k in features.LEVELS}
            save_file(levels, path, metadata={"sha256": "0" * 64})
        case _:
            found = features._cached(path, (2, 1))
            features._write({k: v.astype(np.float64) for k, v in found.items()}, path)
    with pytest.raises(ShardError, match=r"cached features .* are damaged"):
        extract(backbone, readers[0], tmp_path)
