"""Runs on a CPU whose GPU series come from a simulated NVML, for pictures of the dashboards.

python -m tests.support.simulated_gpu DIR draws docs/images/dashboard-*.png from two runs that it
starts, with shards and all else in DIR. The collector, the exporter and Prometheus are the real
ones; only the answers of NVML and of torch's allocator are made up. The pictures say so.
"""

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
import yaml

from tests.support.commands import ROOT, TINY, free_port
from tests.support.fake_nvml import FakeNvml

REMARK = "Two small runs on CPUs; their GPU series are of a simulated NVML."
_MINUTES = 3.0


class _Busy(FakeNvml):
    """A GPU under load: its readings vary with time."""

    def _wave(self, middle: float, width: float, period_s: float) -> float:
        return middle + width * math.sin(time.monotonic() * 2 * math.pi / period_s)

    def nvmlGpmMetricsGet(self, query: Any) -> int:
        self.gpm_values = {
            pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL: self._wave(93, 4, 37),
            pynvml.NVML_GPM_METRIC_SM_UTIL: self._wave(78, 9, 41),
            pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: self._wave(41, 5, 31),
            pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: self._wave(34, 6, 29),
            pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: self._wave(62, 7, 43),
            pynvml.NVML_GPM_METRIC_NVDEC_0_UTIL: 0.0,
            pynvml.NVML_GPM_METRIC_NVJPG_0_UTIL: self._wave(55, 20, 23),
            pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: self._wave(120, 30, 19),
            pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: self._wave(900, 200, 19),
            pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC: self._wave(4000, 900, 17),
            pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC: self._wave(4000, 900, 17),
        }
        return super().nvmlGpmMetricsGet(query)

    def nvmlDeviceGetRemappedRows(self, _: Any, *found: Any) -> int:
        for reference in found:
            self._put(reference, 0)
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetMemoryInfo(self, _: Any, memory: Any) -> int:
        memory._obj.used, memory._obj.total = int(self._wave(58, 1, 53) * 2**30), 80 * 2**30
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetPowerUsage(self, _: Any, milliwatts: Any) -> int:
        return self._put(milliwatts, int(self._wave(610_000, 50_000, 41)))

    def nvmlDeviceGetTotalEnergyConsumption(self, _: Any, millijoules: Any) -> int:
        return self._put(millijoules, int(610_000 * time.monotonic()))

    def nvmlDeviceGetTemperature(self, _: Any, sensor: Any, value: Any) -> int:
        return self._put(value, int(self._wave(66, 3, 97)))


def install() -> None:
    """Give a CPU run a GPU in its metrics; called in a run's process before it starts."""
    from strata.telemetry.gpu import GpuCollector
    from strata.telemetry.readings import Reading, ReadingCollector
    from strata.train.monitor import run_monitor

    _Busy(pytest.MonkeyPatch(), gpm=True)
    original = run_monitor.RunMonitor.__init__

    def allocator() -> Iterator[Reading]:
        for kind, peak in (("active", 51 * 2**30), ("reserved", 57 * 2**30)):
            yield Reading("strata_torch_memory_peak_bytes", peak, {"kind": kind})
        yield Reading("strata_torch_allocator_retries_total", 0, {})
        yield Reading("strata_torch_out_of_memory_total", 0, {})

    def with_gpu(self: Any, *args: Any, metrics: Any, **more: Any) -> None:
        original(self, *args, metrics=metrics, **more)
        metrics.add_collector(GpuCollector("GPU-abc"))
        metrics.add_collector(ReadingCollector(allocator))
        metrics.set("strata_mfu_ratio", 0.31)

    setattr(run_monitor.RunMonitor, "__init__", with_gpu)  # noqa: B010


def main(folder: Path) -> None:
    """Start the runs and a Prometheus in a folder, wait, and draw."""
    from tests.support.forked import ForkServer
    from tests.support.prometheus import Prometheus, stop
    from tests.support.shard_folders import make_shards

    folder.mkdir(parents=True)
    for name, videos in (("train", 24), ("test", 12)):
        make_shards(folder / name, num_videos=videos, num_classes=4, shard_size=12, seed=1)
    settings = folder / "tiny.yaml"
    schedule = TINY["schedule"] | {"second_stage_epoch": 30, "lr_drop_epochs": [60]}
    changed = {"schedule": schedule, "monitor": TINY["monitor"] | {"verdict_s": 5}}
    settings.write_text(yaml.safe_dump(TINY | changed))
    prometheus, server = Prometheus(folder), ForkServer()
    try:
        for run, seed in (("first", "0"), ("second", "1")):
            server.start(
                *("--config", settings, "--data.shards", folder / "train", "--seed", seed),
                *("--run", folder / run, "--monitor.root", folder, "--monitor.node", "node-1"),
                *("--monitor.port", str(free_port()), "--monitor.file_sd", folder / "targets"),
                *("--schedule.epochs", "400", "--checkpoint.every_steps", "60"),
                *("--probe.every_epochs", "10", "--probe.num_clips", "1"),
                *("--probe.train", folder / "train", "--probe.test", folder / "test"),
                hook="tests.support.simulated_gpu:install",
            )
        time.sleep(60 * _MINUTES)
        subprocess.run(
            [
                *(sys.executable, "tools/render_dashboards.py", "--url", prometheus.url),
                *("--out", "docs/images", "--minutes", str(_MINUTES), "--remark", REMARK),
            ],
            cwd=ROOT,
            check=True,
        )
    finally:
        server.close()
        stop(prometheus.process)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
