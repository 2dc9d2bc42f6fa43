"""The form of catalogue.toml: defaults of a section, sentences by name, refused mistakes."""

import msgspec
import pytest

from strata.telemetry.catalogue import parse

TEXT = """
[reasons]
no_gpu = "Where there is no GPU."

[GPU.defaults]
labels = ["gpu"]
absent = "{no_gpu}"

[GPU.strata_gpu_up]
kind = "gauge"
unit = "0 or 1"
help = "1 while it answers."
advice = "Reset it."

[Host.strata_host_disk_bytes_total]
kind = "counter"
unit = "bytes"
help = "Bytes moved."
advice = "None."
labels = ["direction"]
max_series = 2
roles = ["train", "preprocess"]
"""


def test_a_metric_has_its_own_fields_and_the_defaults_of_its_section():
    gpu, host = parse(TEXT)
    assert (gpu.name, gpu.section, gpu.labels) == ("strata_gpu_up", "GPU", ("gpu",))
    assert gpu.absent == "Where there is no GPU."
    assert (gpu.roles, gpu.max_series) == (("train",), 1)
    assert (host.labels, host.max_series, host.absent) == (("direction",), 2, "")
    assert host.roles == ("train", "preprocess")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "counter"', 'kind = "summary"', "Invalid enum value 'summary'"),
        ("max_series = 2", "series = 2", "unknown field `series`"),
        ('unit = "bytes"\n', "", "missing required field `unit`"),
        ("[Host.", "[Hosts.", "Invalid enum value 'Hosts'"),
    ],
)
def test_a_mistake_in_the_file_is_refused(old: str, new: str, message: str):
    assert old in TEXT
    with pytest.raises(msgspec.ValidationError, match=message):
        parse(TEXT.replace(old, new))


def test_an_unknown_reason_is_refused():
    with pytest.raises(KeyError, match="no_gpus"):
        parse(TEXT.replace("{no_gpu}", "{no_gpus}"))
