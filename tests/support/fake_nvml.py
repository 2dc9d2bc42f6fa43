"""A fake NVML library for tests, with the functions of the C library that pynvml calls.

pynvml's wrappers and structures are real; only the function pointers of the library are replaced.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import pynvml
import pytest

Answer = Callable[..., int]
_OK = pynvml.NVML_SUCCESS


class FakeNvml:
    """A library with one GPU and one MIG device; every answer can be replaced by an error.

    Args:
        monkeypatch: Restores pynvml after the test.
        gpm: Whether the GPU has GPM.
        missing: Functions that this driver's library does not have.
    """

    UUID = b"GPU-abc"
    MIG = b"MIG-def"

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, gpm: bool = False, missing: tuple[str, ...] = ()
    ) -> None:
        self.errors: dict[str, int] = {}
        self.every_error: int | None = None
        self.gpm, self.missing = gpm, missing
        self.xids: list[int] = []
        self.live_samples = 0
        self.gpm_values: dict[int, float] = {}
        self.mig_samples: list[int] = []
        monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", self._pointer)

    def _pointer(self, name: str) -> Answer:
        if name in self.missing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

        def call(*args: Any) -> int:
            code = self.errors.get(name, self.every_error)
            if code is not None and name != "nvmlGpmSampleFree":
                return code
            return getattr(self, name)(*args)

        return call

    @staticmethod
    def _put(reference: Any, value: Any) -> int:
        reference._obj.value = value
        return _OK

    def nvmlInitWithFlags(self, _: Any) -> int:
        return _OK

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        if uuid.value not in (self.UUID, self.MIG):
            return pynvml.NVML_ERROR_NOT_FOUND
        return _OK

    def nvmlDeviceGetUtilizationRates(self, _: Any, rates: Any) -> int:
        rates._obj.gpu, rates._obj.memory = 87, 40
        return _OK

    def nvmlDeviceGetMemoryInfo(self, _: Any, memory: Any) -> int:
        memory._obj.used, memory._obj.total = 2**30, 2**33
        return _OK

    def nvmlDeviceGetDecoderUtilization(self, _: Any, value: Any, period: Any) -> int:
        period._obj.value = 1000
        return self._put(value, 12)

    def nvmlDeviceGetJpgUtilization(self, _: Any, value: Any, period: Any) -> int:
        period._obj.value = 1000
        return self._put(value, 34)

    def nvmlDeviceGetPowerUsage(self, _: Any, milliwatts: Any) -> int:
        return self._put(milliwatts, 350_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, _: Any, millijoules: Any) -> int:
        return self._put(millijoules, 7_000)

    def nvmlDeviceGetTemperature(self, _: Any, sensor: Any, value: Any) -> int:
        return self._put(value, 61)

    def nvmlDeviceGetClockInfo(self, _: Any, domain: Any, megahertz: Any) -> int:
        clocks = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}
        clocks[pynvml.NVML_CLOCK_VIDEO] = 1545
        return self._put(megahertz, clocks[getattr(domain, "value", domain)])

    def nvmlDeviceGetCurrentClocksEventReasons(self, _: Any, reasons: Any) -> int:
        return self._put(reasons, pynvml.nvmlClocksEventReasonSwPowerCap)

    def nvmlDeviceGetPcieThroughput(self, _: Any, counter: Any, kib: Any) -> int:
        transmitted = getattr(counter, "value", counter) == pynvml.NVML_PCIE_UTIL_TX_BYTES
        return self._put(kib, 10 if transmitted else 20)

    def nvmlDeviceGetFieldValues(self, _: Any, count: Any, fields: Any) -> int:
        assert count.value == 1
        for field in fields._obj:
            assert field.fieldId == pynvml.NVML_FI_DEV_MEMORY_TEMP
            field.nvmlReturn, field.value.uiVal = _OK, 72
        return _OK

    def nvmlDeviceGetRemappedRows(self, _: Any, *found: Any) -> int:
        for reference, value in zip(found, (3, 1, 1, 0), strict=True):
            self._put(reference, value)
        return _OK

    def nvmlDeviceGetPcieReplayCounter(self, _: Any, count: Any) -> int:
        return self._put(count, 5)

    def nvmlEventSetCreate(self, _: Any) -> int:
        return _OK

    def nvmlDeviceRegisterEvents(self, _: Any, kinds: Any, events: Any) -> int:
        assert getattr(kinds, "value", kinds) == pynvml.nvmlEventTypeXidCriticalError
        return _OK

    def nvmlEventSetWait_v2(self, _: Any, event: Any, timeout_ms: Any) -> int:
        if not self.xids:
            return pynvml.NVML_ERROR_TIMEOUT
        event._obj.eventData = self.xids.pop(0)
        return _OK

    def nvmlGpmQueryDeviceSupport(self, _: Any, support: Any) -> int:
        assert support._obj.version == pynvml.NVML_GPM_SUPPORT_VERSION
        support._obj.isSupportedDevice = int(self.gpm)
        return _OK

    def nvmlGpmSampleAlloc(self, sample: Any) -> int:
        self.live_samples += 1
        return _OK

    def nvmlGpmSampleFree(self, sample: Any) -> int:
        self.live_samples -= 1
        return _OK

    def nvmlGpmSampleGet(self, _: Any, sample: Any) -> int:
        return _OK

    def nvmlGpmMigSampleGet(self, _: Any, instance: Any, sample: Any) -> int:
        self.mig_samples.append(getattr(instance, "value", instance))
        return _OK

    def nvmlGpmMetricsGet(self, query: Any) -> int:
        found = query._obj
        assert found.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        for place in range(found.numMetrics):
            metric = found.metrics[place]
            if metric.metricId in self.gpm_values:
                metric.value, metric.nvmlReturn = self.gpm_values[metric.metricId], _OK
            else:
                metric.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
        return _OK

    def nvmlDeviceGetGpuInstanceId(self, _: Any, instance: Any) -> int:
        return self._put(instance, 3)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, _: Any, handle: Any) -> int:
        assert isinstance(handle._obj, ctypes._Pointer)
        return _OK
