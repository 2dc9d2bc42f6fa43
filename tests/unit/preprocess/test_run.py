"""What the driver makes of its executor's outcomes: any order, deaths, a missing Ray."""

import dataclasses
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from strata.errors import ConfigError, ShardError
from strata.format.schema import NormalForm
from strata.preprocess import run
from strata.preprocess.datasets.folder import SourceSet, find_folder
from strata.preprocess.executors import (
    OUT_OF_MEMORY,
    Outcome,
    RayExecutor,
    WorkerDied,
    outcome_of,
)
from strata.preprocess.join import join_parts
from strata.preprocess.part import make_part
from strata.preprocess.settings import ShardSettings
from tests.support.source_videos import moving_scene, write_video

SETTINGS = ShardSettings(
    form=NormalForm(width=64, height=48, min_frames=1), samples_per_shard=4, samples_per_part=2
)


class LastFirst:
    """Runs tasks in this process, the last one first; processes of some die a few times."""

    slots = 100

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        num_deaths: int,
        dies: Callable[..., Any] = join_parts,
        code: int | None = -9,
    ) -> None:
        self.num_deaths, self.dies, self.code = num_deaths, dies, code
        monkeypatch.setattr(run, "wait", self.wait)
        monkeypatch.setattr(run, "_executor", lambda settings: self)
        self.queue: list[tuple[Future[Outcome], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(
        self, call: Callable[..., Any], arguments: tuple[Any, ...], *, alone: bool
    ) -> Future[Outcome]:
        self.queue.append((Future(), call, arguments))
        return self.queue[-1][0]

    def wait(self, *words: Any, **options: Any) -> SimpleNamespace:
        """Takes the place of `concurrent.futures.wait`."""
        future, call, arguments = self.queue.pop()
        if call is self.dies and self.num_deaths:
            self.num_deaths -= 1
            future.set_result(WorkerDied(self.code))
        else:
            future.set_result(outcome_of(call, arguments))
        return SimpleNamespace(done={future})

    def outcome(self, future: Future[Outcome]) -> Outcome:
        return future.result()

    def __enter__(self) -> "LastFirst":
        return self

    def __exit__(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def source_set(tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    folder = tmp_path_factory.mktemp("videos")
    for k in range(7):
        write_video(folder / f"{k}.avi", moving_scene(6, 64, 48, seed=k))
    return find_folder([folder])[0]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_any_order_gives_the_same_bytes(
    source_set: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.shard_set(source_set, tmp_path / "processes", SETTINGS)
    LastFirst(monkeypatch, 2)
    run.shard_set(source_set, tmp_path / "last-first", SETTINGS)
    assert files(tmp_path / "last-first") == files(tmp_path / "processes")


def test_processes_that_die_again_and_again_end_the_run(
    source_set: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LastFirst(monkeypatch, 3)
    with pytest.raises(ShardError, match=r"processes ended 3 times \(-9\) at shard 1; look for"):
        run.shard_set(source_set, tmp_path, SETTINGS)
    monkeypatch.undo()
    assert run.shard_set(source_set, tmp_path, SETTINGS).num_samples == 7


@pytest.mark.parametrize(
    ("code", "kind", "detail"),
    [
        (OUT_OF_MEMORY, "memory", "it needs more than --worker_memory 1.5 GB"),
        (-14, "timeout", "no packet, frame or segment in 300 s"),
        (-11, "crash", "the codec ended its process (-11)"),
    ],
)
def test_the_video_that_ends_its_process_alone_is_rejected(
    source_set: SourceSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: str,
    detail: str,
) -> None:
    LastFirst(monkeypatch, 2, dies=make_part, code=code)
    settings = dataclasses.replace(SETTINGS, samples_per_part=1, worker_memory=1.5)
    rows = run.shard_set(source_set, tmp_path, settings).rows
    (rejected,) = [row for row in rows if row.status == "rejected"]
    assert (rejected.reason, rejected.detail, len(rows)) == (kind, detail, 7)


def test_a_lost_node_rejects_nothing(
    source_set: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LastFirst(monkeypatch, 2, dies=make_part, code=None)
    assert run.shard_set(source_set, tmp_path, SETTINGS).num_samples == 7


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'strata-video\[ray\]'"):
        RayExecutor("auto")
