"""A driver that is too old is one clear message, and `make setup` chooses builds that fit."""

import subprocess
import sys

import pynvml
import pytest
import torch

from strata import driver
from strata.distributed import World
from strata.errors import ConfigError
from strata.tools import choose_build
from strata.train.engine_config import EngineConfig, choose_device


def with_driver(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def init() -> None:
        if version is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    driver.driver_version.cache_clear()
    monkeypatch.setattr(pynvml, "nvmlInit", init)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: version)


@pytest.fixture(autouse=True)
def _forget():
    yield
    driver.driver_version.cache_clear()


def test_a_driver_that_is_too_old_is_named_with_what_it_can_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with_driver(monkeypatch, "535.183.01")
    with pytest.raises(ConfigError, match=r"is 535.*580 or later.*install strata-video\[cuda12"):
        choose_device(EngineConfig(), World())
    assert choose_device(EngineConfig(device="cpu"), World()).type == "cpu"
    with_driver(monkeypatch, "470.1")
    with pytest.raises(ConfigError, match="update the driver, or use a CPU"):
        driver.check_driver("12.6")
    for version, cuda in (("580.65", "13.0"), ("525.60", "12.6"), ("470.1", None), (None, "13.0")):
        with_driver(monkeypatch, version)
        driver.check_driver(cuda)


@pytest.mark.parametrize(
    ("version", "reachable", "expected"),
    [
        (None, True, ("cpu", "https://download.pytorch.org/whl/cpu")),
        (None, False, ("cuda13", "-")),
        (470, True, ("cpu", "https://download.pytorch.org/whl/cpu")),
        (535, True, ("cuda12", "https://download.pytorch.org/whl/cu126")),
        (580, False, ("cuda13", "-")),
    ],
)
def test_the_builds_follow_from_the_driver(
    version: int | None, reachable: bool, expected: tuple[str, str]
):
    assert choose_build.main(lambda: version, lambda _: reachable) == expected


def test_both_tables_of_drivers_agree():
    theirs = {int(name.removeprefix("cuda")): v for name, v in choose_build.OLDEST_DRIVER.items()}
    assert theirs == driver.OLDEST_DRIVER


def test_without_dali_one_line_says_what_to_install():
    code = "import sys; sys.modules['nvidia.dali'] = None; import strata; strata.clips"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "install strata-video[cuda13], [cuda12], or [cpu]" in last
