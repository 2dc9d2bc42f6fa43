"""Readings of the GPU from an NVML that answers as its manual says, and of this host."""

from pathlib import Path

import pynvml
import pytest

from strata.telemetry.gpu import GpuCollector
from strata.telemetry.host import HostCollector, ProcessCollector
from tests.support.fake_nvml import FakeNvml


def read(collector: GpuCollector) -> dict[str, float]:
    """Values by name without the prefix, with the label besides `gpu`."""
    found = {}
    for reading in collector.read():
        more = [v for k, v in reading.labels.items() if k != "gpu"]
        found["/".join([reading.name.removeprefix("strata_gpu_"), *more])] = reading.value
    return found


CLASSIC = {
    "up": 1,
    "utilization_ratio": 0.87,
    "memory_bandwidth_ratio": 0.40,
    "memory_used_bytes": 2**30,
    "memory_total_bytes": 2**33,
    "decoder_utilization_ratio": 0.12,
    "jpeg_utilization_ratio": 0.34,
    "power_watts": 350,
    "energy_joules_total": 7,
    "temperature_celsius": 61,
    "clock_hertz/sm": 1.98e9,
    "clock_hertz/memory": 2.619e9,
    "clock_hertz/video": 1.545e9,
    "throttled/power": 1,
    "throttled/thermal": 0,
    "throttled/hardware": 0,
    "throttled/settings": 0,
    "pcie_bytes_per_second/tx": 10 * 1024,
    "pcie_bytes_per_second/rx": 20 * 1024,
    "memory_temperature_celsius": 72,
    "remapped_rows/correctable": 3,
    "remapped_rows/uncorrectable": 1,
    "row_remap_pending": 1,
    "row_remap_failed": 0,
    "pcie_replays_total": 5,
    "xid_errors_total": 0,
}


def test_classic_counters_in_base_units(monkeypatch: pytest.MonkeyPatch):
    FakeNvml(monkeypatch)
    assert read(GpuCollector("abc")) == pytest.approx(CLASSIC)


def test_gpm_readings_are_means_and_samples_are_freed(
    monkeypatch: pytest.MonkeyPatch,
):
    nvml = FakeNvml(monkeypatch, gpm=True)
    nvml.gpm_values = {
        pynvml.NVML_GPM_METRIC_SM_UTIL: 75.0,
        pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: 20.0,
        pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: 55.0,
        pynvml.NVML_GPM_METRIC_NVJPG_0_UTIL: 100.0,
        pynvml.NVML_GPM_METRIC_NVJPG_1_UTIL: 50.0,
        pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC: 3.0,
    }
    collector = GpuCollector("GPU-abc")
    assert read(collector) == pytest.approx(CLASSIC)
    expected = CLASSIC | {
        "sm_activity_ratio": 0.75,
        "tensor_activity_ratio": 0.20,
        "memory_bandwidth_ratio": 0.55,
        "jpeg_utilization_ratio": 0.75,
        "nvlink_bytes_per_second/tx": 3 * 2**20,
    }
    for _ in range(5):
        assert read(collector) == pytest.approx(expected)
    assert nvml.live_samples == 1
    nvml.gpm_values[pynvml.NVML_GPM_METRIC_SM_UTIL] = float("nan")
    assert "sm_activity_ratio" not in read(collector)


def test_xid_errors_are_counted_and_the_last_is_named(monkeypatch: pytest.MonkeyPatch):
    nvml = FakeNvml(monkeypatch)
    collector = GpuCollector("abc")
    read(collector)
    nvml.xids = [31, 79]
    for _ in range(2):
        found = read(collector)
        assert (found["xid_errors_total"], found["last_xid"]) == (2, 79)
    # A driver that was started again: the events are registered again, and the count stays.
    nvml.errors["nvmlEventSetWait_v2"] = pynvml.NVML_ERROR_UNINITIALIZED
    assert "xid_errors_total" not in read(collector)
    del nvml.errors["nvmlEventSetWait_v2"]
    nvml.xids = [48]
    assert read(collector)["xid_errors_total"] == 3
    nvml.errors["nvmlDeviceRegisterEvents"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert "xid_errors_total" not in read(GpuCollector("abc"))


@pytest.mark.parametrize("uuid", ["MIG-def", "def"])
def test_a_mig_device_is_sampled_through_its_parent(uuid: str, monkeypatch: pytest.MonkeyPatch):
    nvml = FakeNvml(monkeypatch, gpm=True)
    nvml.gpm_values = {pynvml.NVML_GPM_METRIC_SM_UTIL: 75.0}
    for name in ("UtilizationRates", "DecoderUtilization", "JpgUtilization", "PcieThroughput"):
        nvml.errors[f"nvmlDeviceGet{name}"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    collector = GpuCollector(uuid)
    read(collector)
    found = read(collector)
    assert found["sm_activity_ratio"] == 0.75
    assert found["memory_used_bytes"] == 2**30
    assert "utilization_ratio" not in found
    assert nvml.mig_samples == [3, 3]
    assert {r.labels["gpu"] for r in collector.read()} == {"MIG-def"}


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        ("nvmlDeviceGetUtilizationRates", {"utilization_ratio", "memory_bandwidth_ratio"}),
        ("nvmlDeviceGetJpgUtilization", {"jpeg_utilization_ratio"}),
        ("nvmlDeviceGetTotalEnergyConsumption", {"energy_joules_total"}),
        ("nvmlDeviceGetPcieThroughput", {k for k in CLASSIC if k.startswith("pcie_b")}),
        ("nvmlDeviceGetCurrentClocksEventReasons", {k for k in CLASSIC if k.startswith("thro")}),
    ],
)
def test_what_is_not_supported_is_absent_not_zero(
    function: str, gone: set[str], monkeypatch: pytest.MonkeyPatch
):
    nvml = FakeNvml(monkeypatch)
    nvml.errors[function] = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert set(read(GpuCollector("abc"))) == set(CLASSIC) - gone


def test_readings_that_an_old_driver_lacks_are_absent(monkeypatch: pytest.MonkeyPatch):
    missing = ("nvmlDeviceGetJpgUtilization", "nvmlGpmQueryDeviceSupport")
    FakeNvml(monkeypatch, missing=missing)
    found = read(GpuCollector("abc"))
    assert set(found) == set(CLASSIC) - {"jpeg_utilization_ratio"}


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED])
def test_a_lost_gpu_reports_only_that_it_is_down(code: int, monkeypatch: pytest.MonkeyPatch):
    nvml = FakeNvml(monkeypatch, gpm=True)
    collector = GpuCollector("abc")
    assert read(collector)["up"] == 1
    nvml.every_error = code
    assert read(collector) == {"up": 0}
    assert read(collector) == {"up": 0}
    nvml.every_error = None
    assert read(collector)["up"] == 1


def test_without_nvml_there_are_no_readings(monkeypatch: pytest.MonkeyPatch):
    nvml = FakeNvml(monkeypatch)
    nvml.errors["nvmlInitWithFlags"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert read(GpuCollector("abc")) == {}
    nvml.errors.clear()
    assert read(GpuCollector("another")) == {}


def test_families_carry_help_and_labels(monkeypatch: pytest.MonkeyPatch):
    FakeNvml(monkeypatch)
    families = {f.name: f for f in GpuCollector("abc").collect()}
    clocks = families["strata_gpu_clock_hertz"]
    assert [s.labels for s in clocks.samples] == [
        {"gpu": "GPU-abc", "domain": d} for d in ("sm", "memory", "video")
    ]
    assert families["strata_gpu_energy_joules"].type == "counter"
    assert clocks.documentation == "Current clock."


def test_the_host_is_read(tmp_path: Path):
    found = {
        (r.name, *r.labels.values()): r.value
        for r in HostCollector({"run": tmp_path, "shards": tmp_path / "gone"}, "n7").read()
    }
    (disk,) = {key[2] for key in found if key[0] == "strata_disk_size_bytes"}
    # The same for every folder of the file system, so for every run.
    assert Path(disk.removeprefix("n7:")).is_mount()
    assert found[("strata_host_cpu_seconds_total", "busy")] > 0
    total = found[("strata_host_memory_total_bytes",)]
    assert 0 < found[("strata_host_memory_available_bytes",)] <= total
    size = found[("strata_disk_size_bytes", "run", disk)]
    assert 0 < found[("strata_disk_free_bytes", "run", disk)] <= size
    assert ("strata_disk_free_bytes", "shards", disk) not in found
    process = {r.name: r.value for r in ProcessCollector().read()}
    assert process["strata_process_resident_memory_bytes"] > 2**20
