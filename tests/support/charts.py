"""The chart: its files, and what helm makes of it."""

from __future__ import annotations

import json
import subprocess
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ckpt2pt_operator.rules.defaults import OF_SPEC
from documents import root_schema
from goldens import REPOSITORY
from helm import helm

CHART = REPOSITORY / "charts" / "ckpt2pt"
DEPLOY = REPOSITORY / "deploy"
CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
KUBERNETES = "1.32.0"
MONITORING = "monitoring.coreos.com/v1"

NOT_DEFAULTS = {"image"}
"""Fields of spec.workers that have a value of their own in the chart."""

Object = dict[str, Any]


def case_file(case: str) -> Path:
    """Values of one way to install the chart."""
    return CHART / "ci" / f"{case}-values.yaml"


@cache
def _values() -> Object:
    found: Object = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def values(*cases: str) -> Object:
    """The chart's values, with those of ``cases`` put over them as helm does it."""
    found = deepcopy(_values())
    for case in cases:
        found = _over(found, yaml.safe_load(case_file(case).read_text()))
    return found


def _over(base: Object, over: Object) -> Object:
    both = {key: (base[key], value) for key, value in over.items() if key in base}
    merged = {k: _over(a, b) if isinstance(a, dict) and isinstance(b, dict) else b for k, (a, b) in both.items()}
    return {**base, **over, **merged}


def values_schema() -> Object:
    """values.schema.json."""
    found: Object = json.loads((CHART / "values.schema.json").read_text())
    return found


def worker_defaults_schema() -> Object:
    """What ``worker.defaults`` may hold: the CRD's own schema of spec.workers, in the words of JSON Schema."""
    workers = root_schema()["properties"]["spec"]["properties"]["workers"]
    plain: Object = _plain(
        {**workers, "description": "Fields of spec.workers, and a few of spec, for every conversion that gives none."}
    )
    # What the API server fills in, every conversion gives.
    given = {name for name, schema in workers["properties"].items() if schema.get("default")} - {"queueKind"}
    kept = plain["properties"].keys() - NOT_DEFAULTS - given
    plain["properties"] = {name: schema for name, schema in plain["properties"].items() if name in kept}
    spec = _plain(root_schema()["properties"]["spec"])["properties"]
    plain["properties"] |= {name: spec[name] for name in OF_SPEC}
    # The kind that the API server fills in counts for no other queue than the conversion's own.
    plain["dependencies"] = {"queueKind": ["queueName"]}
    return plain


def _plain(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: _plain(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key not in {"default", "format"}
    }
    if "properties" in schema and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept["properties"] = {name: _plain(inner) for name, inner in schema["properties"].items()}
        kept["additionalProperties"] = False
    return kept


@dataclass(frozen=True, slots=True)
class Rendered:
    """What one call of helm gave."""

    code: int
    stdout: str
    stderr: str

    @property
    def objects(self) -> list[Object]:
        """Every object, hooks too."""
        assert not self.code, self.stderr
        return [document for document in yaml.safe_load_all(self.stdout) if document]

    def of(self, *kinds: str) -> list[Object]:
        """Those of some kinds."""
        return [document for document in self.objects if document["kind"] in kinds]


def run(major: str, *arguments: str | Path) -> Rendered:
    """Run helm ``v3`` or ``v4`` without a cluster."""
    done = subprocess.run([helm(major), *arguments], capture_output=True, text=True, check=False, timeout=100)
    return Rendered(done.returncode, done.stdout, done.stderr)


def template(major: str, *arguments: str | Path) -> Rendered:
    """``helm template`` in namespace ``ops``, as release ``ckpt2pt``, in a cluster with the Prometheus Operator.

    Later ``--values`` win over the registry that has to be given.
    """
    return template_of(CHART, major, *arguments)


def template_of(chart: Path, major: str, *arguments: str | Path) -> Rendered:
    """The same of a changed copy of the chart."""
    cluster = ["--namespace", "ops", "--kube-version", KUBERNETES, "--api-versions", MONITORING]
    return run(major, "template", "ckpt2pt", chart, *cluster, "--values", case_file("default"), *arguments)


def rendered_case(major: str, case: str) -> Rendered:
    """The chart under the values of a case."""
    return _rendered_case(major, case)


@cache
def _rendered_case(major: str, case: str) -> Rendered:
    return template(major, "--values", case_file(case))


def images(rendered: Rendered) -> list[str]:
    """The operator's image and the workers'."""
    [container] = rendered.of("Deployment")[0]["spec"]["template"]["spec"]["containers"]
    [worker] = [flag.partition("=")[2] for flag in container["args"] if flag.startswith("--worker-image=")]
    [test] = rendered.of("Pod")[0]["spec"]["containers"]
    assert test["image"] == container["image"]
    return [container["image"], worker]
