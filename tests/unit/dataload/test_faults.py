"""Faulty samples are reported, limited, and replaced independently of ranks and resume."""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from strata.dataload.config import DataConfig
from strata.dataload.faults import Fault, FaultLog, SampleFaultError, replace_faulty
from strata.dataload.loader import Batch, EvaluationLoader, TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import PretrainingRecipe, open_plan
from strata.distributed import World
from strata.errors import ConfigError, ShardError

CPU = torch.device("cpu")
SEED = 5


def change(folder: Path, sample: int, at: bytes, offset: int, new: bytes) -> None:
    """Overwrite bytes after the first occurrence of `at` in a sample's strip."""
    shard, members = ShardReader(folder).members(sample)
    start, size = members["000.jpg"]
    path = folder / f"shard-{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    place = content.index(at, start, start + size) + offset
    content[place : place + len(new)] = new
    path.write_bytes(bytes(content))


def damage(folder: Path, samples: Sequence[int]) -> None:
    """Blank the tables in the header of a sample's strip: all frames are lost, no size changes."""
    for sample in samples:
        change(folder, sample, b"\xff\xd8", 2, bytes(298))


def break_code(folder: Path, sample: int) -> None:
    """Give a Huffman table an invalid number, which only the decoder detects."""
    change(folder, sample, b"\xff\xc4", 4, b"\x2f")


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def stream(
    folder: Path, max_faults: int, *, rank: int = 0, ranks: int = 1, start_step: int = 0
) -> Iterator[Batch]:
    config = DataConfig(shards=folder, batch_size=4, size=32, threads=1, max_faults=max_faults)
    reader = ShardReader(folder)
    loader = TrainLoader(
        reader,
        config,
        open_plan(reader, config, SEED),
        world=World(rank=rank, size=ranks),
        device=CPU,
        epochs=(0, 2),
        start_step=start_step,
        recipe=PretrainingRecipe(config.clips, lambda _: False),
    )
    with loader:
        yield from loader


@pytest.mark.parametrize("how", ["header", "decoder"])
def test_a_damaged_sample_ends_the_run_by_name(folder: Path, how: str):
    if how == "header":
        damage(folder, [3])
    else:
        break_code(folder, 3)
    ShardReader(folder, check="size")
    with pytest.raises(SampleFaultError, match=r"1 sample failed to decode: video-0003 in shard-0"):
        list(stream(folder, 0))
    with pytest.raises(ShardError, match=r"shard-000000\.tar is not what the manifest says"):
        ShardReader(folder, check="hash")


def test_within_the_budget_a_sample_gives_its_place_to_another(folder: Path, shards: Path):
    full = list(stream(shards / "train", 0))
    damage(folder, [3])
    break_code(folder, 17)
    got = list(stream(folder, 2))
    assert [b.samples.tolist() for b in got] != [b.samples.tolist() for b in full]
    order = {0: np.concatenate([b.samples for b in full[:6]])}
    order[1] = np.concatenate([b.samples for b in full[6:]])
    for before, after in zip(full, got, strict=True):
        assert after.short.shape == before.short.shape
        for row, (old, new) in enumerate(zip(before.samples, after.samples, strict=True)):
            if old not in (3, 17):
                assert new == old
                assert torch.equal(after.short[row], before.short[row])
            else:
                place = (before.step + 1) * 4 + row
                expected = order[before.epoch][place % 24]
                assert new == expected
                # The same video as one batch later, but with different views.
                assert float(after.short[row].float().std()) > 5
    found = [f for b in got for f in b.faults]
    assert sorted(f.sample for f in found) == [3, 17]
    assert {(f.key, f.shard) for f in found} == {
        ("video-0003", "shard-000000.tar"),
        ("video-0017", "shard-000001.tar"),
    }
    assert all(f.reason for f in found)


def test_replacements_do_not_depend_on_ranks_or_resume(folder: Path):
    damage(folder, [3, 4, 17])
    full = list(stream(folder, 3))
    parts = [list(stream(folder, 3, rank=r, ranks=2)) for r in range(2)]
    for step, batch in enumerate(full):
        assert torch.equal(batch.short, torch.cat([p[step].short for p in parts]))
    rest = list(stream(folder, 3, start_step=4))
    for batch, again in zip(full[4:], rest, strict=True):
        assert torch.equal(batch.short, again.short)
        np.testing.assert_array_equal(batch.samples, again.samples)


def test_one_fault_too_many_ends_the_run(folder: Path):
    damage(folder, [3, 4, 17])
    with pytest.raises(SampleFaultError, match=r"failed to decode, data\.max_faults allows 2: "):
        list(stream(folder, 2))


def test_evaluation_replaces_nothing(folder: Path):
    damage(folder, [3])
    reader = ShardReader(folder)
    loader = EvaluationLoader(
        reader,
        DataConfig(shards=folder, size=32, threads=1, max_faults=10),
        world=World(),
        device=CPU,
        videos_per_batch=4,
        num_clips=2,
        stride=1,
    )
    with loader, pytest.raises(SampleFaultError, match="1 sample failed to decode: video-0003"):
        list(loader)


def test_a_replacement_is_never_a_faulty_sample():
    order = np.random.default_rng(0).permutation(24)
    for known in itertools.chain(
        itertools.combinations(range(24), 1), itertools.combinations(range(24), 2)
    ):
        for start in range(0, 24, 4):
            got = replace_faulty(order[start : start + 4], order, start, 4, set(known))
            assert not set(got.tolist()) & set(known)
            assert len(set(got.tolist())) == 4


def test_a_place_without_a_replacement_is_an_error():
    order = np.arange(8)
    with pytest.raises(ShardError, match="no sample is left to replace sample 1"):
        replace_faulty(order[:4], order, 0, 4, {1, 5})


def test_faults_are_logged_once():
    log = FaultLog(1)
    fault = Fault(sample=1, key="k", shard="s.tar", reason="broken")
    log.add([fault])
    log.add([fault])
    assert log.take_new() == (fault,)
    assert log.take_new() == ()


def test_a_negative_budget_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data\.max_faults is -1"):
        DataConfig(shards=tmp_path, max_faults=-1)
