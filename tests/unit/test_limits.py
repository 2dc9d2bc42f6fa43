"""CPUs that a process may keep busy, by affinity and by the quotas of its control groups."""

import os
from pathlib import Path

import pytest
import torch

from strata.dataload import graphs
from strata.dataload.config import DataConfig
from strata.dataload.reader import ShardReader
from strata.limits import usable_cpus
from strata.preprocess.settings import ShardSettings
from tests.unit.dataload.test_frame_cache import write

GROUP = "0::/job/step\n"
V1 = "4:cpuset:/a\n3:cpu,cpuacct:/job\n2:memory:/job\n"
V2_MAX, V1_ROOT = "sys/fs/cgroup/{}cpu.max", "sys/fs/cgroup/{}/cpu.cfs_{}_us"


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"proc/self/cgroup": GROUP}, 8),
        ({"proc/self/cgroup": GROUP, V2_MAX.format("job/step/"): "max 100000\n"}, 8),
        ({"proc/self/cgroup": GROUP, V2_MAX.format("job/step/"): "200000 100000\n"}, 2),
        ({"proc/self/cgroup": GROUP, V2_MAX.format("job/"): "150000 100000\n"}, 2),
        ({"proc/self/cgroup": GROUP, V2_MAX.format("job/"): "25000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": GROUP,
                V2_MAX.format("job/"): "300000 100000\n",
                V2_MAX.format("job/step/"): "600000 100000\n",
            },
            3,
        ),
        # In a container the path is the host's, and the mount is the group's own folder.
        ({"proc/self/cgroup": "0::/docker/abc\n", V2_MAX.format(""): "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/../..\n", V2_MAX.format(""): "400000 100000\n"}, 4),
        ({"proc/self/cgroup": GROUP, V2_MAX.format(""): "9900000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": V1,
                V1_ROOT.format("cpu/job", "quota"): "50000\n",
                V1_ROOT.format("cpu/job", "period"): "10000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                V1_ROOT.format("cpu,cpuacct", "quota"): "300000\n",
                V1_ROOT.format("cpu,cpuacct", "period"): "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                V1_ROOT.format("cpu", "quota"): "-1\n",
                V1_ROOT.format("cpu", "period"): "100000\n",
            },
            8,
        ),
    ],
    ids=[
        "no groups",
        "no file",
        "no limit",
        "two",
        "one and a half, of the group above",
        "a quarter",
        "the least of both",
        "in a container",
        "in a container of a container",
        "more than the CPUs",
        "version 1",
        "version 1, by both names, in a container",
        "version 1, no limit",
    ],
)
def test_number_of_cpus(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    tmp_path.joinpath("proc/self").mkdir(parents=True)
    assert usable_cpus(write(tmp_path, files)) == cpus


def test_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    quota = {"proc/self/cgroup": GROUP, V2_MAX.format("job/"): "400000 100000\n"}
    assert usable_cpus(write(tmp_path, quota)) == 1


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strata.preprocess.settings.usable_cpus", lambda: 3)
    assert ShardSettings().num_workers == 3
    assert ShardSettings(workers=5).num_workers == 5


def test_loader_threads_by_default(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "usable_cpus", lambda: 6)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = DataConfig(shards=shards / "train")
    reader = ShardReader(shards / "train")
    for ranks, threads in (("1", 6), ("4", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert graphs.GraphMaker(reader, config, torch.device("cpu")).threads == threads
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
