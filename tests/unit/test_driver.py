"""A driver that is too old, or no DALI, is one clear message; `make setup` chooses builds."""

import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
import torch

from strata import driver
from strata.dataload.config import DataConfig
from strata.dataload.graphs import pipeline_class
from strata.distributed import World
from strata.errors import ConfigError
from strata.format.schema import NormalForm
from strata.tools import choose_build
from strata.train.engine_config import EngineConfig, choose_device
from tests.support.loader_batches import batches
from tests.support.shard_folders import HEIGHT, WIDTH, make_shards


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


def test_without_dali_strips_are_loaded_and_the_rest_says_what_to_install(
    shards: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "strata.dataload.pipeline", raising=False)
    config = DataConfig(shards=shards / "train", batch_size=4, size=32, threads=1)
    assert len(batches(config, count=1)) == 1
    advice = r"install strata-video\[cuda13\], \[cuda12\], or \[cpu\]"
    with pytest.raises(ConfigError, match=advice):
        pipeline_class("gpu")


def test_without_dali_the_command_ends_with_one_line(tmp_path: Path):
    form = NormalForm(width=WIDTH, height=HEIGHT, payload="mp4", codec="mjpeg", quantizer=3)
    make_shards(tmp_path / "set", num_videos=4, num_classes=2, shard_size=4, seed=3, form=form)
    main = Path(__file__).parents[2] / "train" / "main.py"
    words = [str(main), "--data.shards", str(tmp_path / "set"), "--run", str(tmp_path / "run")]
    words += ["--data.batch_size=4", "--model.width=8", "--engine.device=cpu"]
    code = (
        "import runpy, sys; sys.modules['nvidia.dali'] = None; "
        f"sys.argv = {words}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error (rank 0): NVIDIA DALI cannot be imported")
    assert "install strata-video[cuda13], [cuda12], or [cpu]" in last
