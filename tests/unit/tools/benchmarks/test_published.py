"""The yardstick computes what Strata computes, and the benchmark sets one against the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from strata.dataload.clips import ClipSpec
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.tools.benchmarks.published import main
from strata.tools.benchmarks.published_method import (
    FrameFiles,
    PublishedModel,
    graph_by_rows,
    pool_contrast,
    published_loss,
    write_frame_files,
)
from strata.train.losses.graph import distribution_graphs
from strata.train.losses.instance import pair_contrast
from strata.train.method.model import VideoModel
from strata.train.method.objective import Method
from strata.train.method.schedules import ScheduleConfig, phase_at
from strata.train.method.settings import MethodConfig, TermWeights
from strata.train.models.backbones import BackboneConfig


def test_pools_give_the_value_of_one_masked_product():
    clips, altered = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    for extra in (None, altered):
        ours = pair_contrast(clips, temperature=0.07, altered_RMC=extra)
        torch.testing.assert_close(pool_contrast(clips, extra), ours, rtol=1e-5, atol=1e-6)


def test_the_graph_by_rows_is_the_graph():
    # Similar clips and few labels, so that some entries are kept and some are not.
    clips = torch.randn(1, 2, 8) + 0.4 * torch.randn(12, 2, 8)
    labels = torch.arange(12) % 3
    target = distribution_graphs(clips, labels).target_RB
    assert (target > 0).sum() > 12
    torch.testing.assert_close(graph_by_rows(clips, labels), target, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_of_the_yardstick_has_the_loss_of_a_step_of_strata(stage: int):
    recipe = MethodConfig(
        weights=TermWeights(graph_high=1.0),
        num_prototypes=4,
        queue_length=4,
        shuffle=False,
        temporal_from_stage=1,
        graph_divides_by_batch=True,
    )
    phase = phase_at(ScheduleConfig(), 0 if stage == 1 else 60)
    totals = []
    for kind in (VideoModel, PublishedModel):
        torch.manual_seed(0)
        model = kind(BackboneConfig(width=8), recipe, 16)
        generator = torch.Generator().manual_seed(1)
        clips = torch.randint(0, 256, (4, 3, 16, 32, 32, 3), generator=generator).to(torch.uint8)
        orders = model.orders(np.arange(4), 0, 0, 16)
        out = model(clips[:, :2], clips[:, 2], *orders, phase)
        if kind is VideoModel:
            totals.append(
                Method(model, recipe, World()).losses(out, phase, with_health=False).total
            )
        else:
            totals.append(published_loss(model, out, recipe, use_queue=phase.queue))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-4, atol=1e-5)


def test_frame_files_give_three_views_that_repeat(shards: Path, tmp_path: Path):
    write_frame_files(ShardReader(shards / "train"), tmp_path, 2)
    files = FrameFiles(tmp_path, ClipSpec(clip_frames=16), 32, 5)
    assert len(files) == 5
    first = files[0]
    assert first.shape == (3, 16, 32, 32, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, files[0])
    assert not torch.equal(first, files[2])


def test_the_benchmark_compares_every_part(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.json"
    sizes = ["--batch", "4", "--size", "32", "--width", "8", "--workers", "1", "--videos", "4"]
    times = ["--seconds", "0.1", "--rounds", "1"]
    main(["--shards", str(shards / "train"), *sizes, *times, "--out", str(out)])
    (measured,) = json.loads(out.read_text())["rounds"]
    assert measured.keys() == {"published", "strata"}
    for rates in measured.values():
        assert rates.keys() == {"data", "step", "end to end"}
        assert min(rates.values()) > 0
    assert "end to end" in capsys.readouterr().out
