"""Readings of one GPU by NVML, as a Prometheus collector.

The values are read in the exporter's thread when Prometheus scrapes them, not by the training loop.
A reading that the machine does not offer is absent, never zero.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pynvml
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from strata.logs import get_logger, warn_once
from strata.telemetry.readings import Reading, families

__all__ = ["GpuCollector"]

logger = get_logger(__name__)

_PERCENT = 0.01
_MILLI = 0.001
_MEGA = 1e6
_KIB = 1024
_MIB = 1024**2
_FINAL = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
"""Answers after which NVML gives no more readings of this GPU."""
_STALE = (pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_INVALID_ARGUMENT)
"""Answers after which the handle must be asked for again."""


_THROTTLE = {
    "power": pynvml.nvmlClocksEventReasonSwPowerCap,
    "thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown
    | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
    "hardware": pynvml.nvmlClocksThrottleReasonHwSlowdown
    | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    "settings": pynvml.nvmlClocksEventReasonApplicationsClocksSetting
    | pynvml.nvmlClocksThrottleReasonSyncBoost,
}
_CLOCKS = {
    "sm": pynvml.NVML_CLOCK_SM,
    "memory": pynvml.NVML_CLOCK_MEM,
    "video": pynvml.NVML_CLOCK_VIDEO,
}
_Values = list[tuple[str, float, dict[str, str]]]
"""Name without `strata_gpu_`, value, labels besides `gpu`."""


def _utilization(handle: Any) -> _Values:
    rates: Any = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return [
        ("utilization_ratio", rates.gpu * _PERCENT, {}),
        ("memory_bandwidth_ratio", rates.memory * _PERCENT, {}),
    ]


def _memory(handle: Any) -> _Values:
    memory: Any = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return [
        ("memory_used_bytes", float(memory.used), {}),
        ("memory_total_bytes", float(memory.total), {}),
    ]


def _clock(domain: str) -> Callable[[Any], _Values]:
    def read(handle: Any) -> _Values:
        mega = pynvml.nvmlDeviceGetClockInfo(handle, _CLOCKS[domain])
        return [("clock_hertz", mega * _MEGA, {"domain": domain})]

    return read


def _throttled(handle: Any) -> _Values:
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return [("throttled", float(bool(reasons & m)), {"reason": r}) for r, m in _THROTTLE.items()]


def _pcie(handle: Any) -> _Values:
    counters = {"tx": pynvml.NVML_PCIE_UTIL_TX_BYTES, "rx": pynvml.NVML_PCIE_UTIL_RX_BYTES}
    return [
        (
            "pcie_bytes_per_second",
            float(pynvml.nvmlDeviceGetPcieThroughput(handle, counter)) * _KIB,
            {"direction": direction},
        )
        for direction, counter in counters.items()
    ]


def _memory_temperature(handle: Any) -> _Values:
    (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_MEMORY_TEMP])
    if field.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(field.nvmlReturn)
    return [("memory_temperature_celsius", float(field.value.uiVal), {})]


def _remapped_rows(handle: Any) -> _Values:
    correctable, uncorrectable, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    return [
        ("remapped_rows", float(correctable), {"kind": "correctable"}),
        ("remapped_rows", float(uncorrectable), {"kind": "uncorrectable"}),
        ("row_remap_pending", float(pending), {}),
        ("row_remap_failed", float(failed), {}),
    ]


def _one(name: str, read: Callable[[Any], float], scale: float) -> Callable[[Any], _Values]:
    return lambda handle: [(name, read(handle) * scale, {})]


_CLASSIC: tuple[Callable[[Any], _Values], ...] = (
    _utilization,
    _memory,
    _one(
        "decoder_utilization_ratio",
        lambda h: pynvml.nvmlDeviceGetDecoderUtilization(h)[0],
        _PERCENT,
    ),
    _one("jpeg_utilization_ratio", lambda h: pynvml.nvmlDeviceGetJpgUtilization(h)[0], _PERCENT),
    _one("power_watts", pynvml.nvmlDeviceGetPowerUsage, _MILLI),
    _one("energy_joules_total", pynvml.nvmlDeviceGetTotalEnergyConsumption, _MILLI),
    _one(
        "temperature_celsius",
        lambda h: pynvml.nvmlDeviceGetTemperature(h, pynvml.NVML_TEMPERATURE_GPU),
        1.0,
    ),
    _clock("sm"),
    _clock("memory"),
    _clock("video"),
    _throttled,
    _pcie,
    _memory_temperature,
    _remapped_rows,
    _one("pcie_replays_total", pynvml.nvmlDeviceGetPcieReplayCounter, 1.0),
)

_GPM_VALUES: dict[str, tuple[tuple[int, ...], float, dict[str, str]]] = {
    "utilization_ratio": ((pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL,), _PERCENT, {}),
    "sm_activity_ratio": ((pynvml.NVML_GPM_METRIC_SM_UTIL,), _PERCENT, {}),
    "sm_occupancy_ratio": ((pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,), _PERCENT, {}),
    "tensor_activity_ratio": ((pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,), _PERCENT, {}),
    "memory_bandwidth_ratio": ((pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,), _PERCENT, {}),
    "decoder_utilization_ratio": (
        tuple(getattr(pynvml, f"NVML_GPM_METRIC_NVDEC_{n}_UTIL") for n in range(8)),
        _PERCENT,
        {},
    ),
    "jpeg_utilization_ratio": (
        tuple(getattr(pynvml, f"NVML_GPM_METRIC_NVJPG_{n}_UTIL") for n in range(8)),
        _PERCENT,
        {},
    ),
    "pcie_bytes_per_second/tx": (
        (pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC,),
        _MIB,
        {"direction": "tx"},
    ),
    "pcie_bytes_per_second/rx": (
        (pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC,),
        _MIB,
        {"direction": "rx"},
    ),
    "nvlink_bytes_per_second/tx": (
        (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC,),
        _MIB,
        {"direction": "tx"},
    ),
    "nvlink_bytes_per_second/rx": (
        (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC,),
        _MIB,
        {"direction": "rx"},
    ),
}
"""GPM metrics by name and direction; the value is the mean of those that the GPU offers."""


class _Gpm:
    """GPU performance monitoring (Hopper and later): means between two samples.

    Args:
        handle: The GPU, or the parent of a MIG device.
        instance: The MIG device's GPU instance, or None for a GPU without MIG.
    """

    def __init__(self, handle: Any, instance: int | None) -> None:
        self._handle, self._instance = handle, instance
        self._last: Any = None

    def read(self) -> _Values:
        sample = pynvml.nvmlGpmSampleAlloc()
        try:
            if self._instance is None:
                pynvml.nvmlGpmSampleGet(self._handle, sample)
            else:
                pynvml.nvmlGpmMigSampleGet(self._handle, self._instance, sample)
        except pynvml.NVMLError:
            pynvml.nvmlGpmSampleFree(sample)
            raise
        last, self._last = self._last, sample
        if last is None:
            return []
        try:
            return list(self._between(last, sample))
        finally:
            pynvml.nvmlGpmSampleFree(last)

    @staticmethod
    def _between(first: Any, second: Any) -> Iterator[tuple[str, float, dict[str, str]]]:
        asked = [number for numbers, _, _ in _GPM_VALUES.values() for number in numbers]
        query: Any = pynvml.c_nvmlGpmMetricsGet_t()
        query.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        query.numMetrics = len(asked)
        query.sample1, query.sample2 = first, second
        for place, number in enumerate(asked):
            query.metrics[place].metricId = number
        pynvml.nvmlGpmMetricsGet(query)
        found = {
            number: query.metrics[place].value
            for place, number in enumerate(asked)
            if query.metrics[place].nvmlReturn == pynvml.NVML_SUCCESS
        }
        for name, (numbers, scale, labels) in _GPM_VALUES.items():
            values = [found[n] for n in numbers if n in found]
            # NaN is what GPM gives where the two samples are too close together.
            if values and all(value == value for value in values):
                yield name.partition("/")[0], scale * sum(values) / len(values), labels


class _Xids:
    """Counts the XID errors that the driver reports from now on.

    Args:
        handle: The GPU.
        before: The counter of an earlier handle of the GPU, whose count it continues.

    Raises:
        NVMLError: The GPU does not report them.
    """

    def __init__(self, handle: Any, before: "_Xids | None") -> None:
        self._events: Any = pynvml.nvmlEventSetCreate()
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        self._count, self._last = (before._count, before._last) if before else (0, 0)

    def read(self) -> _Values:
        while True:
            try:
                event: Any = pynvml.nvmlEventSetWait(self._events, 0)
            except pynvml.NVMLError as error:
                if error.value != pynvml.NVML_ERROR_TIMEOUT:  # pyright: ignore[reportAttributeAccessIssue]
                    raise
                break
            self._count, self._last = self._count + 1, int(event.eventData)
        found: _Values = [("xid_errors_total", float(self._count), {})]
        return [*found, ("last_xid", float(self._last), {})] if self._count else found


class GpuCollector(Collector):
    """One GPU, or one MIG device.

    Args:
        uuid: The GPU, as `torch.cuda.get_device_properties(i).uuid` names it, which does not say
            whether it is a MIG device; an index would ignore CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, uuid: str) -> None:
        self._plain = not uuid.startswith(("GPU-", "MIG-"))
        self._uuid = f"GPU-{uuid}" if self._plain else uuid
        self._handle: Any = None
        self._gpm: _Gpm | None = None
        self._xids: _Xids | None = None
        self._seen = False
        self._lost = False
        self._lock = threading.Lock()

    def _open(self) -> Any:
        if self._handle is None:
            pynvml.nvmlInit()
            handle = self._find()
            self._gpm = self._open_gpm(handle)
            try:
                self._xids = _Xids(handle, self._xids)
            except pynvml.NVMLError:
                # A MIG device or an old driver: the count is absent.
                self._xids = None
            self._handle = handle
        return self._handle

    def _find(self) -> Any:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except pynvml.NVMLError as error:
            if not self._plain or error.value != pynvml.NVML_ERROR_NOT_FOUND:  # pyright: ignore[reportAttributeAccessIssue]
                raise
        mig = self._uuid.replace("GPU-", "MIG-", 1)
        handle = pynvml.nvmlDeviceGetHandleByUUID(mig)
        self._uuid, self._plain = mig, False
        return handle

    def _open_gpm(self, handle: Any) -> _Gpm | None:
        try:
            instance = None
            if self._uuid.startswith("MIG-"):
                instance = pynvml.nvmlDeviceGetGpuInstanceId(handle)
                handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            if not pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                return None
        except pynvml.NVMLError:
            # A driver or GPU without it: the classic counters remain.
            return None
        return _Gpm(handle, instance)

    @property
    def has_means(self) -> bool:
        """Whether utilisation is the mean since the last reading, not of the last instant."""
        return self._gpm is not None

    def read(self) -> Iterator[Reading]:
        """Current readings of this GPU; none where there is no NVML."""
        with self._lock:
            readings = self._read()
        for (name, *_), (value, labels) in readings.items():
            yield Reading(f"strata_gpu_{name}", value, {"gpu": self._uuid, **labels})

    def _read(self) -> dict[tuple[str, ...], tuple[float, dict[str, str]]]:
        found: dict[tuple[str, ...], tuple[float, dict[str, str]]] = {}
        try:
            handle = self._open()
        except pynvml.NVMLError as error:
            self._note(error)
            handle = None
        if handle is not None:
            self._seen, self._lost = True, False
            readers = [*_CLASSIC]
            if self._xids is not None:
                xids = self._xids
                readers.append(lambda _: xids.read())
            if self._gpm is not None:
                gpm = self._gpm
                # Last, so that its means replace the instantaneous values of the classic counters.
                readers.append(lambda _: gpm.read())
            for read in readers:
                try:
                    for name, value, labels in read(handle):
                        found[(name, *labels.values())] = (value, labels)
                except pynvml.NVMLError as error:
                    if self._note(error):
                        found.clear()
                        break
        if self._seen:
            found[("up",)] = (float(not self._lost and self._handle is not None), {})
        return found

    def _note(self, error: Any) -> bool:
        """Update the handle's state after an error; returns whether no reading is possible now."""
        code = error.value
        if code in _FINAL:
            self._lost = True
            self._handle = None
            warn_once(logger, f"{self._uuid} does not answer any more: {error}")
            return True
        if code in _STALE:
            self._handle = None
            return True
        return False

    def collect(self) -> Iterator[Metric]:
        """Yield the current readings of this GPU, grouped by metric."""
        yield from families(self.read())
