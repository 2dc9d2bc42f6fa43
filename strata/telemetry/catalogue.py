"""Loads catalogue.toml: every metric that Strata exports, with its unit, meaning and remedy."""

import tomllib
from importlib import resources
from typing import Literal

import msgspec

__all__ = ["CATALOGUE", "Metric", "Role", "Section"]

Kind = Literal["counter", "gauge", "histogram"]
Role = Literal["train", "evaluate", "preprocess"]
Section = Literal["Bottleneck", "Training", "Data path", "GPU", "Host", "Process"]


class Metric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the catalogue.

    Args:
        name: Full Prometheus name, with unit.
        kind: Prometheus type.
        unit: What a value counts, in base units.
        help: One sentence that says what the metric means.
        section: Section of docs/metrics.md that explains it.
        advice: What to do when the values look wrong.
        labels: Label names.
        max_series: Largest number of combinations of label values in a process; more are refused.
        buckets: Upper bounds, for histograms.
        roles: The processes that export it.
        absent: When it has no value; empty if it always has one once training runs.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    section: Section
    advice: str
    labels: tuple[str, ...] = ()
    max_series: int = 1
    buckets: tuple[float, ...] = ()
    roles: tuple[Role, ...] = ("train",)
    absent: str = ""


def parse(text: str) -> tuple[Metric, ...]:
    """The metrics of a catalogue in the order of the file.

    Args:
        text: TOML: the table `reasons` of sentences for `absent`, then for each section of
            docs/metrics.md a table of metrics by name and optionally of their `defaults`.

    Raises:
        msgspec.ValidationError: A field is missing, unknown or of another type.
        KeyError: `absent` names a reason that does not exist.
    """
    sections = tomllib.loads(text)
    reasons = sections.pop("reasons")
    metrics = []
    for section, entries in sections.items():
        defaults = entries.pop("defaults", {})
        for name, entry in entries.items():
            fields = {**defaults, **entry, "name": name, "section": section}
            fields["absent"] = fields.get("absent", "").format(**reasons)
            metrics.append(msgspec.convert(fields, Metric))
    return tuple(metrics)


CATALOGUE = parse(
    resources.files("strata.telemetry").joinpath("catalogue.toml").read_text(encoding="utf-8")
)
