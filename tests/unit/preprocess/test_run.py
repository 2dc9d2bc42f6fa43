"""What the driver makes of its executor's outcomes: any order, deaths, a missing Ray."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strata.errors import ConfigError, ShardError
from strata.format.schema import NormalForm
from strata.preprocess import run
from strata.preprocess.datasets.folder import SourceSet, find_folder
from strata.preprocess.executors import Died, Outcome, RayExecutor, outcome_of
from strata.preprocess.join import join_parts
from strata.preprocess.settings import ShardSettings
from tests.support.source_videos import moving_scene, write_video

SETTINGS = ShardSettings(
    form=NormalForm(width=64, height=48, min_frames=1), samples_per_shard=4, samples_per_part=2
)


class LastFirst:
    """Runs tasks in this process, the last one first; processes of joins die for some times."""

    slots = 100

    def __init__(self, num_deaths: int) -> None:
        self.num_deaths = num_deaths
        self.queue: list[tuple[int, Callable[[Any], Any], Any]] = []

    def submit(self, key: int, call: Callable[[Any], Any], argument: Any) -> None:
        self.queue.append((key, call, argument))

    def results(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        key, call, argument = self.queue.pop()
        if call is join_parts and self.num_deaths:
            self.num_deaths -= 1
            return [(key, Died(-9))]
        return [(key, outcome_of(call, argument))]

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
    monkeypatch.setattr(run, "_executor", lambda settings: LastFirst(2))
    run.shard_set(source_set, tmp_path / "last-first", SETTINGS)
    assert files(tmp_path / "last-first") == files(tmp_path / "processes")


def test_processes_that_die_again_and_again_end_the_run(
    source_set: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_executor", lambda settings: LastFirst(3))
    with pytest.raises(ShardError, match=r"processes ended 3 times \(-9\) at shard 1; look for"):
        run.shard_set(source_set, tmp_path, SETTINGS)
    monkeypatch.undo()
    assert run.shard_set(source_set, tmp_path, SETTINGS).num_samples == 7


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'strata-video\[ray\]'"):
        RayExecutor("auto")
