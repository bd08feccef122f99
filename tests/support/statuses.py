"""What every status has to be: as the CRD describes it, with nothing that an API server would take out again."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from ckpt2pt.kube.conversion.status import TERMINAL
from documents import root_schema

_RANGES = {"int32": 1 << 31, "int64": 1 << 63}


@cache
def _validator() -> Draft202012Validator:
    schema = deepcopy(root_schema()["properties"]["status"])
    _close(schema)
    return Draft202012Validator(schema)


def _close(schema: dict[str, Any]) -> None:
    """Refuse what would be pruned, and integers that do not fit."""
    if schema.get("type") == "object":
        schema["additionalProperties"] = False
        for inner in schema.get("properties", {}).values():
            _close(inner)
    if schema.get("type") == "array":
        _close(schema["items"])
    if schema.get("format") in _RANGES:
        schema |= {"maximum": _RANGES[schema["format"]] - 1, "minimum": 0}


def check_status(status: object) -> None:
    """Fail with the place that is wrong."""
    wrong = [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in _validator().iter_errors(status)]
    assert not wrong, wrong
    assert isinstance(status, dict)
    conditions = status["conditions"]
    types = Counter(condition["type"] for condition in conditions)
    assert max(types.values()) == 1, types
    reasons = [c["reason"] for c in conditions] + [
        s["reason"] for s in status.get("stageStatuses", []) if "reason" in s
    ]
    odd = [reason for reason in reasons if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", reason)]
    assert not odd, f"not CamelCase: {odd}"
    reported = {condition["type"]: condition["status"] for condition in conditions}
    assert (reported["Complete"] == "True") == (status["phase"] in {"Succeeded", "Planned"})
    assert (reported["Failed"] == "True") == (status["phase"] in {"Failed", "Cancelled"})
    assert reported["Ready"] == reported["Complete"]
    assert expected_of(status) == kstatus(status, status["observedGeneration"]), reported


def expected_of(status: dict[str, Any]) -> str:
    """What whoever waits for the object is to see: the end as it is, and what only somebody can change as a failure."""
    if status["phase"] in TERMINAL:
        return "Current" if status["phase"] in {"Succeeded", "Planned"} else "Failed"
    [stalled] = [c["status"] for c in status["conditions"] if c["type"] == "Stalled"]
    return "Failed" if stalled == "True" else "InProgress"


def kstatus(status: dict[str, Any], generation: int) -> str:
    """As sigs.k8s.io/cli-utils/pkg/kstatus/status computes it (generic.go); ``test_kstatus.py`` holds the two together.

    The first of Reconciling and Stalled that is True decides, so both must not be.
    """
    if status.get("observedGeneration", generation) != generation:
        return "InProgress"
    conditions = status.get("conditions", [])
    for each in conditions:
        if each["type"] in {"Reconciling", "Stalled"} and each["status"] == "True":
            return {"Reconciling": "InProgress", "Stalled": "Failed"}[each["type"]]
    ready = [each["status"] for each in conditions if each["type"] == "Ready"]
    return "InProgress" if ready and ready[0] != "True" else "Current"


def reported(status: dict[str, Any], kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    [found] = [c for c in status["conditions"] if c["type"] == kind]
    return found["status"], found["reason"]
