"""Every way to start the same run ends with the same weights."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.commands import ROOT, TINY, free_port
from tests.support.forked import ForkServer

# The "--" after it: torchrun's parser, up to Python 3.11, takes --run for one of its own.
TORCHRUN = ("-m", "torch.distributed.run")
DEEPSPEED = ("-m", "deepspeed.launcher.runner")


class Runs:
    """Starts a run of two steps, of stage 2, by one or more commands at the same time."""

    def __init__(self, server: ForkServer, config: Path, shards: Path, folder: Path) -> None:
        self._server, self.folder = server, folder
        self._words = ("--config", config, "--data.shards", shards / "train")
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("node-a slots=1\nnode-b slots=1\n")

    def start(
        self, name: str, launchers: Sequence[Sequence[str | Path]], extra: Sequence[str] = ()
    ) -> str:
        """Run the launchers' commands to their end; what they wrote to stderr."""
        words = ("train/main.py", *self._words, "--run", self.folder / name, *extra)
        processes = [
            subprocess.Popen(
                [sys.executable, *map(str, [*launcher, *words])],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for launcher in launchers
        ]
        said = ""
        try:
            for process in processes:
                said += process.communicate(timeout=120)[1]
        finally:
            for process in processes:
                process.kill()
        assert [p.returncode for p in processes] == [0] * len(processes), said[-3000:]
        return said

    def fork(self, name: str, environments: Sequence[dict[str, str]]) -> None:
        """Run the ranks of a launcher that sets these variables and does no more."""
        words = (*self._words, "--run", self.folder / name)
        ranks = [self._server.fork("train/main.py", *words, env=own) for own in environments]
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * len(ranks), ranks[0].text()[-3000:]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        (path,) = (self.folder / name / "checkpoints").glob("step-000000002/model.safetensors")
        return load_file(path)

    def same(self, name: str, reference: str) -> None:
        mine, theirs = self.weights(name), self.weights(reference)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key


@pytest.fixture(scope="module")
def runs(server: ForkServer, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("launch")
    config = folder / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(
            TINY
            | {"stop_after_steps": 2, "schedule": {"epochs": 1, "second_stage_epoch": 0}}
            | {"checkpoint": {"every_steps": 1000}}
        )
    )
    return Runs(server, config, shards, folder)


@pytest.fixture(scope="module")
def two_ranks(runs: Runs) -> str:
    """The run that the ways to start two nodes are held against: one node, two ranks."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    runs.fork("one-node", [where | {"RANK": n, "LOCAL_RANK": n} for n in "01"])
    return "one-node"


def test_one_rank_by_every_launcher(runs: Runs):
    """By `deepspeed` too: it starts both steps of tests/integration/test_demo.py."""
    launchers = {
        "python": (),
        "torchrun": (*TORCHRUN, "--standalone", "--nproc_per_node", "1", "--"),
    }
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(runs.start, name, [how]) for name, how in launchers.items()]:
            done.result()
    runs.same("torchrun", "python")


def test_two_nodes_by_torchrun(runs: Runs, two_ranks: str):
    # Both "nodes" are this machine, so their local ranks 0 want one metrics port.
    where = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    nodes = [(*TORCHRUN, "--nnodes", "2", "--node_rank", str(n), *where, "--") for n in range(2)]
    said = runs.start("torchrun-nodes", nodes, extra=("--monitor.port", str(free_port())))
    runs.same("torchrun-nodes", two_ranks)
    assert said.count("metrics are not served") == 1
    assert "The work continues" in said


def test_two_nodes_by_deepspeed_without_ssh(runs: Runs, two_ranks: str):
    where = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    nodes = [
        (*DEEPSPEED, "--hostfile", runs.hostfile, "--no_ssh", "--node_rank", str(n), *where)
        for n in range(2)
    ]
    runs.start("deepspeed-nodes", nodes)
    runs.same("deepspeed-nodes", two_ranks)


def test_two_nodes_by_srun(runs: Runs, two_ranks: str):
    """What srun sets; Slurm itself is not on this machine."""
    step = {
        "SLURM_JOB_ID": str(free_port()),  # The master's port follows from it.
        "SLURM_STEP_ID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    }
    nodes = [step | {"SLURM_PROCID": str(n), "SLURM_NODEID": str(n)} for n in range(2)]
    runs.fork("srun", nodes)
    runs.same("srun", two_ranks)
