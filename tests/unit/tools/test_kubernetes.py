"""The examples for Kubernetes fit the schemas of their kinds, and what they name exists."""

from collections.abc import Mapping
from typing import Any, Literal

import kubernetes_validate
import msgspec
import pytest
import yaml

from strata.config import parse_config
from strata.distributed import World
from strata.tools.dashboards import ROOT
from strata.train.config import TrainConfig

FOLDER = ROOT / "monitoring" / "kubernetes"
VERSION = "1.31"


class _Strict(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Fields of monitoring.coreos.com/v1 that the examples may use; docs: prometheus-operator.dev,
    API reference."""


class Meta(_Strict):
    name: str


class Relabeling(_Strict):
    target_label: str
    source_labels: list[str] = []
    replacement: str = ""


class Endpoint(_Strict):
    port: str
    interval: str
    relabelings: list[Relabeling]


class Selector(_Strict):
    match_labels: dict[str, str]


class MonitorSpec(_Strict):
    job_label: str
    selector: Selector
    pod_metrics_endpoints: list[Endpoint]


class PodMonitor(_Strict):
    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Meta
    spec: MonitorSpec


class Rule(msgspec.Struct, forbid_unknown_fields=True):
    expr: str
    alert: str = ""
    record: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    duration: str = msgspec.field(name="for", default="")


class Group(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    rules: list[Rule]


class RuleSpec(_Strict):
    groups: list[Group]


class PrometheusRule(_Strict):
    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Meta
    spec: RuleSpec


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def test_job_and_service_fit_the_schemas_of_kubernetes():
    service, job = documents("job.yaml")
    for document in (service, job):
        kubernetes_validate.validate(document, VERSION, strict=True)
    job["spec"]["template"]["spec"]["restartPolice"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolice"):
        kubernetes_validate.validate(job, VERSION, strict=True)


def test_the_monitor_finds_the_pods_and_gives_the_labels_of_target_files():
    (document,) = documents("podmonitor.yaml")
    monitor = msgspec.convert(document, PodMonitor)
    service, job = documents("job.yaml")
    pod = job["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert monitor.spec.selector.match_labels.items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    # The alerts ask for this job.
    assert labels[monitor.spec.job_label] == "strata"
    (endpoint,) = monitor.spec.pod_metrics_endpoints
    (container,) = pod["spec"]["containers"]
    assert endpoint.port in [port["name"] for port in container["ports"]]
    assert [r.target_label for r in endpoint.relabelings] == ["run", "node", "rank", "role"]
    assert "strata-run" in labels


def test_the_job_starts_ranks_that_the_program_understands():
    service, job = documents("job.yaml")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment: Mapping[str, Any] = {e["name"]: e.get("value") for e in container["env"]}
    assert environment["WORLD_SIZE"] == str(spec["completions"]) == str(spec["parallelism"])
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"} <= environment.keys()
    assert (ROOT / container["command"][1]).is_file()
    settings = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"])
    settings["config"] = str(ROOT / settings["config"])
    argv = [f"--{name}={value}" for name, value in settings.items()]
    config = parse_config(TrainConfig, argv, prog="test", description="")
    config.check_world(World(size=spec["completions"]))
    assert config.monitor.node == "$(NODE_NAME)"
    for variable in ("POD_IP", "NODE_NAME"):
        assert f"$({variable})" in settings.values()
        assert variable in environment


def test_the_operator_gets_the_same_rules():
    (document,) = documents("rules.yaml")
    made = msgspec.convert(document, PrometheusRule).spec.groups
    files = [ROOT / "monitoring" / "rules" / f"{name}.yml" for name in ("recording", "alerts")]
    groups = [g for path in files for g in yaml.safe_load(path.read_text())["groups"]]
    assert made == msgspec.convert(groups, list[Group])
