"""A running training has nothing in the temporary folder that an exit by signal would leave."""

import tempfile
from pathlib import Path

import pytest
import torch

from strata.dataload.config import DataConfig
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World


def test_the_graph_leaves_no_generated_source(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reader = ShardReader(shards / "train")
    config = DataConfig(shards=shards / "train", batch_size=4, size=32, threads=1)
    loader = TrainLoader(
        reader,
        config,
        open_plan(reader, config, 0),
        world=World(),
        device=torch.device("cpu"),
        epochs=(0, 1),
    )
    with loader:
        next(iter(loader))
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
