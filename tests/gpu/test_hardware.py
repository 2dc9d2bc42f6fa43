"""Readings of a working GPU by the real NVML."""

import time

import pytest
import torch

from strata.telemetry.gpu import GpuCollector

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def test_a_busy_gpu_is_seen_as_such():
    properties = torch.cuda.get_device_properties(0)
    collector = GpuCollector(str(properties.uuid))
    first = {(r.name, *sorted(r.labels.items())): r.value for r in collector.read()}
    assert first, "NVML does not know this GPU by the name that torch gives it"
    matrix, deadline = torch.randn(4096, 4096, device="cuda"), time.monotonic() + 3
    while time.monotonic() < deadline:
        matrix = (matrix @ matrix).clamp(-1, 1)
        torch.cuda.synchronize()
    readings = list(collector.read())
    found = {r.name: r.value for r in readings}
    assert found["strata_gpu_up"] == 1
    assert found["strata_gpu_utilization_ratio"] > 0.3
    total = found["strata_gpu_memory_total_bytes"]
    assert total == pytest.approx(properties.total_memory, rel=0.1)
    assert 3 * 4096**2 * 4 < found["strata_gpu_memory_used_bytes"] <= total
    for reading in readings:
        if reading.name.endswith("_ratio"):
            assert 0 <= reading.value <= 1, reading
    if "strata_gpu_power_watts" in found:
        assert 10 < found["strata_gpu_power_watts"] < 3000
    if collector.has_means:
        assert found["strata_gpu_sm_activity_ratio"] > 0.3
