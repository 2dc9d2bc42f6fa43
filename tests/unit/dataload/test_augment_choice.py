"""Where a run augments: measured with a clock that the test moves."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from strata.dataload import augment_choice
from strata.dataload.augment_choice import AugmentChoice, choose_augment
from strata.dataload.config import DataConfig
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.train import main as train_main
from strata.train.config import TrainConfig

GPU = torch.device("cuda", 0)


class FakeLoader:
    """Takes a time by the device that augments, and far longer for what it makes ahead."""

    seconds: dict[str, float]
    now = 0.0
    ahead = 3

    def __init__(self, reader: Any, config: DataConfig, *_: Any, **__: Any) -> None:
        self.way = config.augment

    def __enter__(self) -> "FakeLoader":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[None]:
        for number in range(100):
            FakeLoader.now += 50.0 if number < self.ahead else self.seconds[self.way]
            yield


@pytest.fixture
def measured(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(augment_choice, "TrainLoader", FakeLoader)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    reader = ShardReader(shards / "train")

    def choose(device: torch.device = GPU, **settings: Any) -> AugmentChoice | None:
        config = DataConfig(shards=reader.location, batch_size=4, **settings)
        plan = open_plan(reader, config, 0)
        clock = {"clock": lambda: FakeLoader.now}
        return choose_augment(reader, config, plan, world=World(), device=device, **clock)

    return choose


@pytest.mark.parametrize(
    ("cpu_s", "gpu_s", "augment"), [(2.0, 1.0, "gpu"), (1.0, 2.0, "cpu"), (2.0, 2.0, "cpu")]
)
def test_the_faster_device_augments(
    measured, cpu_s: float, gpu_s: float, augment: Literal["cpu", "gpu"]
):
    FakeLoader.seconds = {"cpu": cpu_s, "gpu": gpu_s}
    choice = measured()
    assert choice == AugmentChoice(augment, {"gpu": 4 / gpu_s, "cpu": 4 / cpu_s})
    assert choice.text().startswith(f"on the {augment.upper()}, as measured: ")


def test_without_a_choice_nothing_is_measured(measured):
    FakeLoader.seconds = {}
    assert measured(device=torch.device("cpu")) is None
    for settings in ({"augment": "gpu"}, {"augment": "cpu"}, {"decode": "gpu"}, {"cache": "host"}):
        assert measured(**settings) is None


def test_a_run_measures_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    choice = AugmentChoice("cpu", {"gpu": 1.0, "cpu": 2.0})
    monkeypatch.setattr(train_main, "choose_augment", lambda *_, **__: choice)
    config = TrainConfig(
        run=tmp_path, data=DataConfig(shards=shards / "train", batch_size=4), resume="auto"
    )
    reader = ShardReader(config.data.shards)

    def settled(config: TrainConfig, device: torch.device = GPU) -> tuple[str, Any]:
        found, by = train_main.settle_augment(config, reader, world=World(), device=device)
        return found.data.augment, by

    assert settled(config) == ("cpu", choice)
    assert settled(config, torch.device("cpu")) == ("auto", None)
    asked = dataclasses.replace(config, data=dataclasses.replace(config.data, augment="gpu"))
    assert settled(asked) == ("gpu", None)
    saved = SimpleNamespace(config={"data": {"augment": "gpu"}})
    monkeypatch.setattr(train_main, "find_checkpoint", lambda _: tmp_path)
    monkeypatch.setattr(train_main, "read_state", lambda _: saved)
    assert settled(config) == ("gpu", None)
    saved.config["data"]["augment"] = "auto"
    assert settled(config) == ("cpu", choice)
    assert settled(dataclasses.replace(config, resume="never")) == ("cpu", choice)
