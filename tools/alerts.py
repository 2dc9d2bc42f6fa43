"""Expands monitoring/alerts.yaml into Prometheus's rules and the runbook."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

__all__ = ["Alert", "load_alerts", "rule_groups", "rules_file", "rules_resource", "runbook"]

_LIVE = {
    "run": "strata_finished == 0",
    "gpu": "strata_gpu_up",
}
"""What there is only while an alert's subject is watched and has not finished."""
_HEAD = "# Written by `python tools/dashboards.py` from monitoring/alerts.yaml. Do not edit.\n"
_ON = {"run": "run", "gpu": "node, gpu"}


class Alert(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of alerts.yaml, whose head explains the fields."""

    alert: str
    expr: str
    severity: Literal["warning", "critical"]
    summary: str
    means: str
    do: str
    panel: str
    duration: str = msgspec.field(name="for", default="")
    live: bool | Literal["gpu"] = False

    @property
    def full_expr(self) -> str:
        """The expression, with the condition that its subject has not ended."""
        if not self.live:
            return self.expr
        subject = "gpu" if self.live == "gpu" else "run"
        return f"({self.expr}) and on ({_ON[subject]}) {_LIVE[subject]}"


def load_alerts(path: Path) -> list[Alert]:
    """The alerts of a file.

    Raises:
        msgspec.ValidationError: It has an unknown, missing or wrong field.
    """
    return msgspec.yaml.decode(path.read_bytes(), type=list[Alert])


def _panel(alert: Alert, pages: Mapping[str, Mapping[str, Any]]) -> tuple[str, int]:
    """Page and number of an alert's panel.

    Raises:
        ValueError: There is no such panel.
    """
    uid, _, title = alert.panel.partition(" / ")
    for panel in pages[uid]["panels"]:
        if panel["title"] == title:
            return pages[uid]["uid"], panel["id"]
    raise ValueError(f"{alert.alert}: the page {uid} has no panel {title!r}")


def _link(alert: Alert, uid: str, number: int) -> str:
    """Path of the panel in Grafana, with the alert's run or node as variables."""
    label = next((n for n in ("run", "node") if f"by ({n}" in alert.expr), "")
    choice = f"&var-{label}={{{{ $labels.{label} | urlquery }}}}" if label else ""
    return f"/d/{uid}?viewPanel={number}{choice}"


def rule_groups(
    alerts: list[Alert], pages: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The alerts as a group of Prometheus's rules.

    Args:
        alerts: In the order of the file.
        pages: Dashboards by page, with their panels' numbers.
    """
    rules = []
    for alert in alerts:
        uid, number = _panel(alert, pages)
        rule: dict[str, Any] = {"alert": alert.alert, "expr": alert.full_expr}
        if alert.duration:
            rule["for"] = alert.duration
        rule["labels"] = {"severity": alert.severity}
        rule["annotations"] = {
            "summary": alert.summary,
            "description": alert.means,
            "action": alert.do,
            "runbook": f"docs/runbook.md#{alert.alert.lower()}",
            "dashboard": _link(alert, uid, number),
            # By these Grafana links an alert of its own list to the panel.
            "__dashboardUid__": uid,
            "__panelId__": str(number),
        }
        rules.append(rule)
    return [{"name": "strata-alerts", "rules": rules}]


def rules_file(groups: list[dict[str, Any]]) -> str:
    """The text of monitoring/rules/alerts.yml."""
    return _HEAD + msgspec.yaml.encode({"groups": groups}).decode()


def rules_resource(groups: list[dict[str, Any]], recording: Path) -> str:
    """The text of monitoring/kubernetes/rules.yaml: all rules, for the Prometheus operator.

    Args:
        groups: The alerts.
        recording: The file of recording rules.
    """
    recorded = msgspec.yaml.decode(recording.read_bytes(), type=dict[str, list[dict[str, Any]]])
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "strata"},
        "spec": {"groups": [*recorded["groups"], *groups]},
    }
    return _HEAD + msgspec.yaml.encode(resource).decode()


def runbook(alerts: list[Alert]) -> str:
    """The text of docs/runbook.md."""
    lines = [
        "# Runbook",
        "",
        "Written by `python tools/dashboards.py` from monitoring/alerts.yaml. Do not edit.",
        "",
        "What each alert means and what to do. Alerts are grouped: one for each run, node, GPU or",
        "disk. Their text names the ranks; the annotation `dashboard` is the path of the panel in",
        "Grafana.",
    ]
    for alert in alerts:
        page, _, title = alert.panel.partition(" / ")
        wait = f" for {alert.duration}" if alert.duration else ""
        lines += ["", f"## {alert.alert}", "", f"{alert.severity}; panel `{title}` of `{page}`."]
        lines += ["", alert.means, "", f"Do: {alert.do}", "", "Fires when this holds" + wait + ":"]
        lines += ["", "```", alert.full_expr, "```"]
    return "\n".join(lines) + "\n"
