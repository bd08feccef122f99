"""Alerts, dashboard and on-call page: about metrics that exist, and each about the other."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from charts import CHART
from ckpt2pt.kube.worker import endpoint
from ckpt2pt_operator.metrics import Metrics
from goldens import REPOSITORY

PREFIX = "ckpt2pt_operator_"
METRICS = [metric for metric in Metrics("0").registry.collect() if metric.name.startswith(PREFIX)]
WORKER = "ckpt2pt_worker_"
HISTOGRAMS = {metric.name.removeprefix(PREFIX) for metric in METRICS if metric.type == "histogram"}


# A metric with labels has no sample at first, so its labels are asked of the operator's own object.
OWN = {
    described.name: set(collector._labelnames)
    for collector in vars(Metrics("0")).values()
    if isinstance(collector, Counter | Gauge | Histogram)
    for described in collector.describe()
}
SUFFIX = {"counter": "_total", "info": "_info"}
LABELS = {
    metric.name.removeprefix(PREFIX) + SUFFIX.get(metric.type, ""): OWN.get(metric.name, {"version"})
    for metric in METRICS
}
"""The operator's metrics and their labels; a scrape adds ``namespace``."""

ALERTS: list[dict[str, Any]] = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((CHART / "files" / "dashboards" / "ckpt2pt.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]


def check(expression: str) -> None:
    """Every metric exists, a histogram is asked for its buckets, every label is one that the metric has."""
    assert expression.count("(") == expression.count(")")
    if worker := re.findall(rf"{WORKER}(\w+)", expression):
        assert set(worker) <= {name for name, *_ in endpoint._METRICS}, worker
        return
    used = re.findall(rf"{PREFIX}(\w+)(?:\{{([^}}]*)\}})?", expression)
    assert used, expression
    for name, selector in used:
        base = name.removesuffix("_bucket")
        assert base in LABELS, name
        assert name.endswith("_bucket") == (base in HISTOGRAMS), name
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        assert labels <= LABELS[base] | {"namespace"}, (name, labels)
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        names = set(re.split(r",\s*", grouped)) - {"le"}
        assert all(names <= LABELS[name.removesuffix("_bucket")] | {"namespace"} for name, _ in used), grouped


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_is_about_metrics_that_exist_and_says_what_it_means(alert: dict[str, Any]) -> None:
    check(alert["expr"].replace("HOME", 'namespace="ops"'))
    assert alert["expr"].count("HOME") == alert["expr"].count(PREFIX), "limit every metric to this release"
    assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
    assert alert["labels"]["severity"] in {"info", "warning", "critical"}
    assert set(alert["annotations"]) == {"summary", "description"}
    assert all(text.endswith(".") for text in alert["annotations"].values())


def test_every_alert_has_its_section_in_the_on_call_page_and_the_other_way_round() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == [alert["alert"] for alert in ALERTS]


def test_the_on_call_page_names_metrics_that_exist() -> None:
    named = re.findall(rf"{PREFIX}(\w+)", (REPOSITORY / "docs" / "operations.md").read_text())
    assert named
    assert set(named) <= set(LABELS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_about_metrics_that_exist(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        check(target["expr"])
        wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        # Those of a worker and of its pod come from it and from the PodMonitor.
        assert wanted <= set().union(*LABELS.values()) | {"namespace", "instance", "conversion", "stage"}


def test_the_dashboard_shows_every_metric_once_and_no_panel_lies_on_another() -> None:
    shown = {
        name
        for panel in PANELS
        for target in panel["targets"]
        for name in re.findall(rf"{PREFIX}(\w+)", target["expr"])
    }
    assert {name.removesuffix("_bucket") for name in shown} == set(LABELS)
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [
        (x, y) for p in PANELS for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]  # fmt: skip
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) == 23


def test_the_operator_has_the_metrics_that_these_tests_take_from_it() -> None:
    assert LABELS["conversions"] == {"phase"}
    assert LABELS["conversions_finished_total"] == {"result", "reason"}
    assert LABELS["build_info"] == {"version"}
    assert len(HISTOGRAMS) == 4
    assert len(LABELS) == 16
