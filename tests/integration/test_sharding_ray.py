"""Sharding on a Ray cluster of two nodes, one of which is killed half way: the same bytes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from strata.format.manifest import read_manifest
from tests.integration.test_sharding import REPOSITORY, SMALL, contents, shard
from tests.support.source_videos import moving_scene, write_video

pytest.importorskip("ray.cluster_utils")


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


def test_a_node_that_is_killed_half_way_changes_nothing(tmp_path: Path, cluster: Any) -> None:
    videos = tmp_path / "videos"
    for k in range(16):
        write_video(videos / f"{k}.avi", moving_scene(300, 320, 240, seed=k))
    (videos / "bad.avi").write_bytes(b"no video")
    os.mkfifo(videos / "hangs.avi")  # Reading it never returns; the time limit ends its process.
    node = cluster.add_node(num_cpus=1)
    call = [sys.executable, REPOSITORY / "tools" / "shard.py", "folder", "--videos", videos]
    call += ["--out", tmp_path / "ray", *SMALL, "--samples-per-part", "1", "--max-rejects", "1"]
    call += ["--timeout_s", "5", "--worker_memory", "0.5", "--log", "json"]
    call += ["--executor", "ray", "--ray_address", cluster.address]
    with subprocess.Popen(list(map(str, call)), stderr=subprocess.PIPE, text=True) as process:
        folder = tmp_path / "ray" / "train"
        while len(list(folder.rglob("*.part.json"))) + 4 * len(list(folder.glob("*.tar"))) < 4:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    rejected = {e["source"]: e["reason"] for e in events if e["event"] == "rejected"}
    assert rejected == {"bad.avi": "unreadable", "hangs.avi": "timeout"}
    assert (events[-1]["event"], events[-1]["done"], events[-1]["total"]) == ("end", 18, 18)
    shard(videos, tmp_path / "local", "--timeout_s", "5", workers=2)
    assert contents(folder) == contents(tmp_path / "local" / "train")
    assert read_manifest(folder).num_samples == 16
