"""The chart's files: in step with the CRD, the code and one another.  No helm is needed."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from charts import CASES, CHART, DEPLOY, values, values_schema, worker_defaults_schema
from ckpt2pt.kube.conversion.document import validate
from documents import CRD_PATH
from goldens import REPOSITORY

VALIDATOR = jsonschema.Draft7Validator(values_schema())


def set_value(path: str, value: object) -> dict[str, Any]:
    """The chart's values with one of them changed."""
    found = values()
    node = found
    *parents, leaf = path.split(".")
    for name in parents:
        node = node[name]
    node[leaf] = value
    return found


def errors_of(document: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in VALIDATOR.iter_errors(document)]


# -------------------------------------------------------------------------------------------------------------- in step


def test_chart_and_static_manifests_carry_the_crd_byte_for_byte() -> None:
    copies = list((CHART / "files" / "crds").iterdir())
    assert [copy.name for copy in copies] == [CRD_PATH.name]
    assert copies[0].read_bytes() == CRD_PATH.read_bytes(), "make crds"
    assert (DEPLOY / CRD_PATH.name).read_bytes() == CRD_PATH.read_bytes(), "make crds"


def test_no_folder_that_helm_would_never_upgrade() -> None:
    assert not (CHART / "crds").exists()


def test_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert chart["version"] == str(chart["appVersion"]) == project["version"]


def test_the_first_conversion_is_a_valid_dry_run() -> None:
    document = yaml.safe_load((CHART / "files" / "first-conversion.yaml").read_text())
    found: Any = validate(document, where="first-conversion.yaml")
    assert found["spec"]["dryRun"] is True


def test_the_readme_shows_every_value_and_its_words() -> None:
    readme = (CHART / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([\w.]+) \| \w+ \| .*? \| (.*) \|$", readme, re.MULTILINE))
    reported = dict(comments())
    assert {path: text for path, text in rows.items() if path in reported} == reported, "make chart"
    assert set(rows) == {"Key", *reported}, "make chart"


def comments() -> Iterator[tuple[str, str]]:
    """Path of each value that has a ``# --`` comment -> the comment, read from the text of values.yaml."""
    path: list[tuple[int, str]] = []
    words: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        if comment := re.match(r" *# ?(-- )?(.*)", line):
            words = [comment[2]] if comment[1] else [*words, comment[2]] if words else []
        elif field := re.match(r"( *)(\w+):", line):
            path = [(depth, name) for depth, name in path if depth < len(field[1])] + [(len(field[1]), field[2])]
            if words:
                yield ".".join(name for _, name in path), " ".join(words)
            words = []


# --------------------------------------------------------------------------------------------------------------- schema


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(values_schema())


@pytest.mark.parametrize("case", CASES)
def test_the_values_and_each_case_fulfil_the_schema(case: str) -> None:
    assert errors_of(values()) == []
    assert errors_of(values(case)) == []


def test_worker_defaults_are_those_of_the_crd() -> None:
    path, schema = CHART / "values.schema.json", values_schema()
    if os.environ.get("GOLDEN") == "update":
        schema["definitions"]["workerDefaults"] = worker_defaults_schema()
        path.write_text(json.dumps(schema, indent=2) + "\n")
    assert schema["definitions"]["workerDefaults"] == worker_defaults_schema(), "GOLDEN=update pytest tests/charts"


def objects_of(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema["properties"], dict):
            yield path, schema
        for key, inner in schema.items():
            yield from objects_of(inner, f"{path}/{key}")


def test_every_object_of_the_schema_is_closed_and_every_field_described() -> None:
    found = {path: schema for path, schema in objects_of(values_schema()) if "workerDefaults" not in path}
    assert len(found) > 20
    assert not [path for path, schema in found.items() if schema.get("additionalProperties") is not False]
    bare = [
        f"{path}/{name}"
        for path, schema in found.items()
        for name, inner in schema["properties"].items()
        if not ({"description", "$ref"} & set(inner) or "properties" in inner)
    ]
    assert not bare


def test_every_value_has_its_place_in_the_schema_and_the_other_way_round() -> None:
    schema = values_schema()

    def compare(value: Any, inner: dict[str, Any], path: str) -> None:
        if "$ref" in inner:
            inner = schema["definitions"][inner["$ref"].rpartition("/")[2]]
        if path == "worker.defaults" or "properties" not in inner:
            return
        assert set(value) == set(inner["properties"]) - ({"global"} if not path else set()), path
        for name, below in value.items():
            compare(below, inner["properties"][name], f"{path}.{name}".lstrip("."))

    compare(values(), schema, "")


WRONG = [
    ("replica", 2, "'replica' was unexpected"),
    ("operator.replicas", "2", "operator.replicas: '2' is not of type 'integer'"),
    ("operator.replicas", -1, "-1 is less than the minimum"),
    ("operator.logLevel", "loud", "'loud' is not one of ['debug', 'info', 'warning', 'error']"),
    ("operator.port", 70000, "70000 is greater than the maximum"),
    ("operator.resource", {}, "'resource' was unexpected"),
    ("operator.extraEnv", {"A": "b"}, "is not of type 'array'"),
    ("operator.kubeAPI.qps", 0, "operator.kubeAPI.qps: 0 is less than or equal to the minimum"),
    ("watchNamespaces", "team-a", "watchNamespaces: 'team-a' is not of type 'array'"),
    ("watchNamespaces", ["team_a"], "watchNamespaces.0: 'team_a' does not match"),
    ("watchNamespaces", ["a", "a"], "has non-unique elements"),
    ("image.tag", 1.0, "image.tag: 1.0 is not of type 'string'"),
    ("image.digest", "latest", "image.digest: 'latest' does not match"),
    ("image.registry", "https://registry.example.com", "does not match"),
    ("image.pullPolicy", "Sometimes", "is not one of ['Always', 'IfNotPresent', 'Never']"),
    ("imagePullSecrets", ["pull"], "imagePullSecrets.0: 'pull' is not of type 'object'"),
    ("worker.defaults", {"resource": {}}, "'resource' was unexpected"),
    ("worker.defaults", {"security": {"runAsUser": "root"}}, "worker.defaults.security.runAsUser: 'root'"),
    ("worker.defaults", {"retries": {"perStage": 99}}, "worker.defaults.retries.perStage: 99"),
    ("worker.defaults", {"suspend": True}, "'suspend' was unexpected"),
    ("worker.defaults", {"queueKind": "Volcano"}, "'queueName' is a dependency of 'queueKind'"),
    ("crds.keep", "yes", "crds.keep: 'yes' is not of type 'boolean'"),
    ("commonLabels", {"tier": 1}, "commonLabels.tier: 1 is not of type 'string'"),
    ("networkPolicy.apiServer.cidrs", ["10.0.0.1"], "networkPolicy.apiServer.cidrs.0: '10.0.0.1' does not match"),
    ("podDisruptionBudget.maxUnavailable", "half", "podDisruptionBudget.maxUnavailable: 'half' is not valid"),
    ("metrics.serviceMonitor.interval", 30, "metrics.serviceMonitor.interval: 30 is not of type 'string'"),
    ("metrics.prometheusRule.disabled", ["OperatorDown"], "'OperatorDown' is not one of"),
    ("trainingKinds.job.plural", "Jobs", "trainingKinds.job.plural: 'Jobs' does not match"),
    ("trainingKinds.ours", {"enabled": True}, "'apiVersion' is a required property"),
    ("trainingKinds.job.succeeded", {}, "trainingKinds.job.succeeded: {} is not valid"),
    ("trainingKinds.job.failed", {"phases": ["Failed"]}, "trainingKinds.job.failed: {'phases': ['Failed']} is not valid"),
    ("extraObjects", [1], "extraObjects.0: 1 is not valid"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=[f"{path}={value}"[:60] for path, value, _ in WRONG])
def test_a_wrong_value_is_refused_and_named(path: str, value: object, words: str) -> None:
    found = errors_of(set_value(path, value))
    assert any(words in error for error in found), found
