"""What NVML tells of the GPUs, as a Prometheus collector. Where there is no NVML, nothing."""

from collections.abc import Iterator
from typing import Any

import pynvml
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["GpuCollector"]

_PERCENT = 0.01
_MILLI = 0.001


def _utilization(handle: Any) -> float:
    return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) * _PERCENT


def _memory_used(handle: Any) -> float:
    return float(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def _power(handle: Any) -> float:
    return pynvml.nvmlDeviceGetPowerUsage(handle) * _MILLI


def _temperature(handle: Any) -> float:
    return float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _decoder(handle: Any) -> float:
    return pynvml.nvmlDeviceGetDecoderUtilization(handle)[0] * _PERCENT


def _jpeg(handle: Any) -> float:
    return pynvml.nvmlDeviceGetJpgUtilization(handle)[0] * _PERCENT


_READINGS = (
    ("strata_gpu_utilization_ratio", "Share of time in which a kernel ran.", _utilization),
    ("strata_gpu_memory_used_bytes", "Device memory in use.", _memory_used),
    ("strata_gpu_power_watts", "Power draw.", _power),
    ("strata_gpu_temperature_celsius", "Temperature of the chip.", _temperature),
    ("strata_gpu_decoder_utilization_ratio", "Share of time the video decoders worked.", _decoder),
    ("strata_gpu_jpeg_utilization_ratio", "Share of time the JPEG engines worked.", _jpeg),
)


class GpuCollector(Collector):
    """Reads one GPU at the moment of the scrape, in the exporter's thread, off the training path.

    A reading that the GPU or driver does not support is absent from the scrape, never zero.

    Args:
        uuid: The GPU, as `torch.cuda.get_device_properties(i).uuid` names it; an index would
            ignore CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        self._handle: Any = None

    def _open(self) -> Any:
        if self._handle is None:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
        return self._handle

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the readings that this GPU gives."""
        try:
            handle = self._open()
        except pynvml.NVMLError:
            return
        for name, help_text, read in _READINGS:
            try:
                value = read(handle)
            except pynvml.NVMLError:
                continue
            family = GaugeMetricFamily(name, help_text, labels=["gpu"])
            family.add_metric([self._uuid], value)
            yield family
